"""The command as a whole: help, version, exit codes, what happens without its extra."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from graft import __version__, errors
from graft.cli import main, output
from graft.cli.app import cli
from graft.cli.options import dtype, finite, size, switches
from graft.cli.output import progress_bar


@pytest.mark.parametrize("verb", sorted(cli.commands))
def test_every_option_and_argument_is_documented(verb: str) -> None:
    command = cli.commands[verb]
    text = CliRunner().invoke(cli, [verb, "--help"], terminal_width=100).stdout
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert max(parameter.opts, key=len) in text
        else:
            assert str(parameter.name).upper() in (command.help or ""), parameter.name


def test_help_says_the_exit_codes() -> None:
    text = CliRunner().invoke(cli, ["--help"]).stdout
    for line in ("0    done", "1    graft verify", "2    a mistake", "130  interrupted"):
        assert line in text


def test_version() -> None:
    assert CliRunner().invoke(cli, ["--version"]).stdout == f"graft {__version__}\n"


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from graft.cli.app import cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_real_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "graft", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"graft {__version__}\n"


@pytest.mark.parametrize("name", ["click", "rich"])
def test_without_the_extra(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("graft.cli.find_spec", lambda n: None if n == name else found(n))
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "pip install 'graft-lora[cli]'" in capsys.readouterr().err


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli.commands["inspect"], "callback", fail)
    result = CliRunner().invoke(cli, ["inspect", "x"])
    assert result.stdout == ""
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (errors.FormatError("bad file"), 2, "error: bad file\n"),
        (errors.OutputError("taken"), 2, "error: taken\n"),
        (errors.VerifyError("differs"), 1, "error: differs\n"),
        (KeyboardInterrupt(), 130, "interrupted: no half-written output is left\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "error: Permission denied: /x\n"),
    ],
)
def test_errors_become_exit_codes(
    error: BaseException, code: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert raising(error, monkeypatch) == (code, says)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_says_what_to_do(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = raising(OSError(number, os.strerror(number)), monkeypatch)
    assert code == 2 and "Free some space" in text


def test_a_bug_is_not_dressed_as_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.commands["inspect"], "callback", lambda **_: {}["missing"])
    assert isinstance(CliRunner().invoke(cli, ["inspect", "x"]).exception, KeyError)


def test_terminated_unwinds_like_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(**_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()

    monkeypatch.setattr(cli.commands["inspect"], "callback", wait)
    assert CliRunner().invoke(cli, ["inspect", "x"]).exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("text", "value"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2**31), ("1.5 kb", 1500), ("1000000", 10**6)],
)
def test_sizes(text: str, value: int) -> None:
    assert size(text) == value


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "0", "5 parsecs", "1e9", "inf"])
def test_nonsense_sizes(text: str) -> None:
    with pytest.raises(click.BadParameter, match="size"):
        size(text)


def test_dtypes_and_numbers() -> None:
    assert [dtype(t) for t in ("bf16", "FP16", "torch.float32")] == ["bfloat16", "float16", "float32"]
    assert finite("-2.5") == -2.5
    with pytest.raises(click.BadParameter, match="int8"):
        dtype("int8")
    for text in ("nan", "inf", "two"):
        with pytest.raises(click.BadParameter, match="finite"):
            finite(text)


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar("fusing", quiet=False) as progress:
        assert progress is None
    monkeypatch.setattr(sys, "stderr", Screen())
    with progress_bar("fusing", quiet=True) as progress:
        assert progress is None


def test_progress_shows_bytes_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar("fusing", quiet=False) as progress:
        assert progress is not None
        progress(3_000_000, 12_000_000)
        time.sleep(0.01)
        progress(6_000_000, 12_000_000)
        time.sleep(0.4)
    assert "fusing" in screen.getvalue() and "/s" in screen.getvalue() and "12.0 MB" in screen.getvalue()


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (999_999, "1000 kB"),
        (4_920_000_000, "4.92 GB"),
        (123e9, "123 GB"),
    ],
)
def test_sizes_for_people(n: float, text: str) -> None:
    assert output.size(n) == text


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"a": float("nan"), "b": (1, float("inf")), "c": Path("x"), "d": {2: True}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1, None], "c": "x", "d": {"2": True}}


def test_switches() -> None:
    assert switches([]) is None
    assert switches(["1,0,1"]) == switches(["true, FALSE,1"]) == [True, False, True]
    assert switches(["qkv=1,0", "a.kv=0,1"]) == {"qkv": [True, False], "a.kv": [False, True]}
    for words in ([""], ["2"], ["0,0"], ["1;0"], ["1,0", "qkv=1,0"]):
        with pytest.raises(click.BadParameter, match=r"1,0,1|not both"):
            switches(words)
