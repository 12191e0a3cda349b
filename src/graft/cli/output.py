"""What the verbs print: progress on stderr, summaries and JSON on stdout."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

Progress = Callable[[int, int], None]


@contextmanager
def progress_bar(what: str, *, quiet: bool) -> Generator[Progress | None, None, None]:
    """A bar of bytes done with bytes per second, on stderr; None unless stderr is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich import progress as p
    from rich.console import Console

    columns = (
        p.TextColumn("[bold]{task.description}"),
        p.BarColumn(),
        p.DownloadColumn(),
        p.TransferSpeedColumn(),
        p.TimeRemainingColumn(compact=True),
    )
    with p.Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=5) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_json(data: Mapping[str, Any]) -> None:
    """``data`` as one JSON object on stdout; NaN and infinities become null, which JSON lacks."""
    click.echo(json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def print_facts(title: str, facts: Sequence[tuple[str, str]], notes: Sequence[str] = ()) -> None:
    """A titled list of facts, two columns, then the notes; rows without a value are left out."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(title, style="bold green"))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        if value:
            table.add_row(f"  {name}", Text(value))
    console.print(table)
    for note in notes:
        console.print(Text.assemble(("  note  ", "yellow"), note))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """A table; the columns in ``right`` are aligned right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for n, header in enumerate(headers):
        table.add_column(header, justify="right" if n in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(highlight=False)
    width = console.measure(table).maximum
    console.print(table, width=max(console.width, width), crop=False, soft_wrap=not console.is_terminal)


def next_step(command: str) -> None:
    """Say what to run next."""
    from rich.console import Console
    from rich.text import Text

    Console(highlight=False, soft_wrap=True).print(Text.assemble(("  next  ", "dim"), (command, "cyan")))


def size(n: float) -> str:
    """Bytes for people, in powers of ten as ``--max-shard-size`` reads them: 4.92 GB."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if n >= 10**power:
            return f"{n / 10**power:.3g} {unit}" if n < 999.5 * 10**power else f"{n / 10**power:.0f} {unit}"
    return f"{n:.0f} B"


def duration(seconds: float) -> str:
    """Time for people: 74 ms, 4.6 s, 2 min 5 s."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def count(n: int) -> str:
    """Parameters for people: 8.4M, 1.24B."""
    for unit, power in (("B", 9), ("M", 6), ("k", 3)):
        if n >= 10**power:
            return f"{n / 10**power:.3g}{unit}"
    return str(n)


def exactly(n: int) -> str:
    """A large count for people and in full: 8.4M (8,388,608)."""
    return str(n) if n < 1000 else f"{count(n)} ({n:,})"


def number(x: float | None) -> str:
    """Three significant digits; nothing for None."""
    return "" if x is None else f"{x:.3g}"


def percent(x: float | None) -> str:
    """A share as a percentage of two digits; nothing for None."""
    return "" if x is None else f"{100 * x:.2g} %"
