"""The demo's account of itself: numbered steps, facts, a progress bar, a closing table."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.rule import Rule
from rich.text import Text

_terminal = Console(highlight=False)
console = Console(highlight=False, width=min(_terminal.width, 100) if _terminal.is_terminal else 100)
_steps = iter(range(1, 100))
_started = time.perf_counter()


def title(name: str, line: str) -> None:
    console.print()
    console.print(Text.assemble((name, "bold green"), "  ", line))


def step(what: str) -> None:
    """A heading with the seconds since the start at its right end."""
    left, right = f"{next(_steps)}  {what} ", f" {time.perf_counter() - _started:.1f} s"
    line = "─" * max(0, console.width - len(left) - len(right))
    console.print()
    console.print(Text.assemble((left, "bold"), (line + right, "dim")))


def fact(text: str) -> None:
    console.print(Text("   " + text))


def proof(text: str) -> None:
    console.print(Text.assemble(("   ✓ ", "bold green"), text))


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def bytes_for_people(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


@contextmanager
def training_bar(steps: int, score: float) -> Generator[Callable[[float, float], None], None, None]:
    """Yields ``report(loss, score)``, to be called after every step."""
    columns = (
        TextColumn("   training"),
        BarColumn(bar_width=32),
        TextColumn("{task.completed:.0f}/{task.total:.0f} steps   loss {task.fields[loss]:.3f}"),
        TextColumn("[bold]held-out {task.fields[score]:.1%}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, refresh_per_second=5) as bar:
        task = bar.add_task("", total=steps, loss=0.0, score=score)

        def report(loss: float, score: float) -> None:
            bar.update(task, advance=1, loss=loss, score=score)

        yield report


def graft(*arguments: str | Path) -> None:
    """Run the ``graft`` command in a process of its own, as a user would; its output is shown as it is."""
    words = [str(a) for a in arguments]
    console.print()
    console.print(Text.assemble(("$ ", "dim"), ("graft " + " ".join(words), "cyan")))
    sys.stdout.flush()
    environment = os.environ | {"COLUMNS": str(console.width)}
    done = subprocess.run([sys.executable, "-m", "graft", *words], env=environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def summary(rows: Iterable[tuple[str, str]]) -> None:
    console.print()
    console.print(Rule(Text("In short", style="bold green"), align="left", style="green"))
    for name, value in rows:
        console.print(Text.assemble((f"   {name:<16}", "bold"), value))
