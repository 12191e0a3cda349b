"""Every bad input gives one message and exit code 2, writes nothing and changes nothing."""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from graft.cli.app import cli

from .bad_cases import ADAPTER, CASES, REPAIRED, Case
from .pairs import Pair, edit_json, snapshot, write_pair


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return write_pair(tmp_path / "work")


def run(words: list[str]) -> Result:
    result = CliRunner().invoke(cli, words, catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_bad_input_is_refused(case: Case, pair: Pair) -> None:
    case.damage(pair)
    before = snapshot(pair.root)
    result = run(pair.call)
    assert result.exit_code == 2, result.output
    assert re.search(case.says, result.stderr, re.DOTALL), result.stderr
    assert len(re.findall(r"^error: |^Error: ", result.stderr, re.MULTILINE)) == 1, result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert snapshot(pair.root) == before


@pytest.mark.parametrize("case", REPAIRED, ids=lambda c: c.name)
def test_what_can_be_proven_is_fused(case: Case, pair: Pair) -> None:
    case.damage(pair)
    before = snapshot(pair.root)
    result = run(pair.call)
    assert result.exit_code == 0, result.output
    assert re.search(case.says, result.stdout), result.stdout
    after = snapshot(pair.root)
    assert {k: v for k, v in after.items() if not k.startswith("out")} == before
    assert (
        run(["verify", str(pair.out), "--base", str(pair.base), "--adapter", str(pair.adapter)]).exit_code
        == 0
    )


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to let any file grow beyond ``size``, as a full disk would."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 5000, 20_000])
def test_files_cannot_grow(size: int, pair: Pair) -> None:
    before = snapshot(pair.root)
    with largest_file(size):
        result = run(pair.call)
    assert result.exit_code == 2, result.output
    assert "Free some space" in result.stderr
    assert snapshot(pair.root) == before
    assert run(pair.call).exit_code == 0


@pytest.mark.parametrize("room", [16, 32, 44])
def test_disk_is_full(room: int, pair: Pair) -> None:
    """A real file system of so many kB, too small for a model of 40 kB and its cards."""
    disk = pair.root / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room}k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        pair.out = disk / "out"
        result = run(pair.call)
        assert result.exit_code == 2, result.output
        assert "space" in result.stderr and not list(disk.iterdir())
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("case", ADAPTER, ids=lambda c: c.name)
def test_inspect_never_ends_in_a_traceback(case: Case, pair: Pair) -> None:
    case.damage(pair)
    before = snapshot(pair.root)
    result = run(["inspect", str(pair.adapter)])
    assert result.exit_code == 0 or (result.exit_code == 2 and "error: " in result.stderr), result.output
    assert snapshot(pair.root) == before


ODD = [
    *(None, True, -1, 0, 2.5, 10**30, float("nan"), float("inf"), "", "x"),
    *(
        [],
        [1],
        ["q_proj"],
        [[1]],
        {},
        {"q_proj": None},
        {"q_proj": "8"},
        {"*bad[": 4},
        {"": 2},
        {"q_proj": [1]},
    ),
]


@pytest.mark.parametrize(
    "key",
    [
        *("r", "lora_alpha", "peft_type", "bias", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
        *("fan_in_fan_out", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices"),
        *("init_lora_weights", "peft_version", "base_model_name_or_path", "layer_replication"),
    ],
)
def test_odd_settings_never_end_in_a_traceback(key: str, pair: Pair) -> None:
    whole = pair.settings.read_bytes()
    for value in ODD:
        edit_json(pair.settings, lambda config, value=value: config.__setitem__(key, value))
        result = run(["inspect", str(pair.adapter)])
        assert result.exit_code in (0, 2), (value, result.output)
        pair.settings.write_bytes(whole)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_bytes_never_end_in_a_traceback(seed: int, pair: Pair) -> None:
    """Random damage to headers and tables; a change of the numbers alone may pass."""
    dice = random.Random(seed)
    files = [pair.weights, pair.shards[0], pair.settings, pair.index, pair.base / "config.json"]
    for _ in range(30):
        file = dice.choice(files)
        whole = file.read_bytes()
        at = dice.randrange(min(len(whole), 1500))
        junk = bytes(dice.choices(b'0123456789{}[]",:e-\xff\x00', k=dice.choice([0, 1, 4])))
        file.write_bytes(whole[:at] + junk + whole[at + dice.choice([0, 1, 4, 100]) :])
        result = run(pair.call)
        assert result.exit_code in (0, 2), (file.name, at, junk, result.output)
        assert pair.out.exists() == (result.exit_code == 0)
        shutil.rmtree(pair.out, ignore_errors=True)
        file.write_bytes(whole)
