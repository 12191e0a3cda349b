"""The command group: its verbs, and what every error becomes."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from .. import __version__
from ..errors import GraftError, VerifyError
from . import EXIT_DIFFERS, EXIT_USER
from .convert import convert
from .fuse import fuse
from .inspect import inspect
from .verify import verify

EXIT_CODES = """\b
Exit codes:
  0    done
  1    graft verify: OUT is not BASE + ADAPTER
  2    a mistake in the input or the call; one message on stderr says what
       and how to mend it, and nothing was written
  130  interrupted (143 when terminated); no half-written output is left
"""


class Failure(click.ClickException):
    """A user's mistake: one message on stderr, no traceback."""

    exit_code = EXIT_USER

    def show(self, file: Any = None) -> None:
        click.echo(f"{click.style('error:', fg='red', bold=True)} {self.message}", err=True)


class Differs(Failure):
    """A verification that failed."""

    exit_code = EXIT_DIFFERS


class Stopped(BaseException):
    """SIGINT, SIGTERM or SIGHUP: unwinds everything, so that half-written output is removed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


class GraftGroup(click.Group):
    """A group whose verbs end in an exit code and one message, never in a traceback of the user's fault."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with _stoppable():
            try:
                return super().main(*args, **kwargs)
            except Stopped as stop:
                click.echo("interrupted: no half-written output is left", err=True)
                sys.exit(stop.exit_code)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise Stopped(signal.SIGINT) from stop
        except VerifyError as e:
            raise Differs(str(e)) from e
        except GraftError as e:
            raise Failure(str(e)) from e
        except OSError as e:
            if e.errno == errno.EPIPE:
                raise
            raise Failure(_describe(e)) from e


def _describe(e: OSError) -> str:
    if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{e.strerror}: {e.filename or 'the output'}. Free some space or choose another place for -o"
    return f"{e.strerror}: {e.filename}" if e.strerror and e.filename else str(e)


@contextmanager
def _stoppable() -> Generator[None, None, None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    old: dict[int, Any] = {}
    try:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # a signal that was set to be ignored (nohup) stays ignored
            if number is not None and signal.getsignal(number) in (
                signal.SIG_DFL,
                signal.default_int_handler,
            ):
                old[number] = signal.signal(number, stop)
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        pass
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@click.group(
    cls=GraftGroup,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, "-V", "--version", prog_name="graft", message="%(prog)s %(version)s")
def cli() -> None:
    """LoRA from file to file: fuse an adapter into a model, exactly, and prove it.

    \b
    graft inspect ADAPTER                     what is in it?
    graft fuse BASE ADAPTER -o OUT            write the model W + ΔW
    graft verify OUT --base BASE --adapter ADAPTER
    graft convert CHECKPOINT -o ADAPTER       an adapter in another format
    """


_verbs: list[Callable[..., Any]] = [fuse, verify, inspect, convert]
for _verb in _verbs:
    assert isinstance(_verb, click.Command)
    cli.add_command(_verb)
