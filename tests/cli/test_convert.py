"""``graft convert``: every writer by its name, losses refused and accepted, what comes next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from graft.cli.app import cli
from graft.formats import SERVERS, WRITERS

from ..pairs import Pair, edit_json, edit_tensors, write_pair


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return write_pair(tmp_path / "work")


def convert(pair: Pair, *words: str) -> Result:
    arguments = ["convert", str(pair.adapter), "-o", str(pair.root / "out"), *words]
    return CliRunner().invoke(cli, arguments, catch_exceptions=False, terminal_width=200)


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_every_writer_has_its_name(name: str, pair: Pair) -> None:
    done = convert(pair, "--to", name, "--base", str(pair.base), "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["written_as"] == name


@pytest.mark.parametrize("name", sorted(SERVERS))
def test_every_server_has_its_name(name: str, pair: Pair) -> None:
    done = convert(pair, "--for", name, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["written_as"] == name


def test_help_and_mistakes_list_the_names(pair: Pair) -> None:
    text = CliRunner().invoke(cli, ["convert", "--help"], terminal_width=200).stdout
    assert f"[{'|'.join(WRITERS)}]" in text and f"[{'|'.join(SERVERS)}]" in text
    done = convert(pair, "--to", "nonsense")
    assert done.exit_code == 2 and all(name in done.stderr for name in WRITERS)


def test_losses_are_refused_until_accepted(pair: Pair) -> None:
    edit_json(pair.settings, lambda c: c.update(use_dora=True))
    edit_tensors(pair.weights, _normed)
    done = convert(pair, "--to", "loralib")
    assert done.exit_code == 2 and done.stderr.count("loralib has no DoRA") == 4
    assert "--accept-loss" in done.stderr and not (pair.root / "out").exists()
    done = convert(pair, "--to", "loralib", "--accept-loss")
    assert done.exit_code == 0 and done.stdout.count("lost: ") == 4


def _normed(tensors: dict[str, object]) -> None:
    import torch

    for name in [n for n in tensors if n.endswith("lora_B.weight")]:
        rows = tensors[name].shape[0]  # type: ignore[attr-defined]
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(rows)


def test_what_comes_next_names_the_alpha(pair: Pair) -> None:
    assert f"graft inspect {pair.root / 'out'} --alpha 8" in convert(pair, "--to", "loralib").stdout
