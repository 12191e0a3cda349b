"""Verify accepts what fuse wrote and names whatever was changed after."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from graft.errors import FormatError, VerifyError
from graft.fuse_files import fuse
from graft.tensors import open_checkpoint, save_file
from graft.verify_files import verify

from . import make

Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done")
    model = make.llama()
    make.save(model, folder / "base", max_shard_size=40000)
    make.peft(model, folder / "adapter", target_modules=["q_proj"])
    fuse(folder / "base", folder / "adapter", folder / "out")
    return folder


@pytest.fixture
def copy(done: Path, tmp_path: Path) -> Path:
    shutil.copytree(done, tmp_path / "copy")
    return tmp_path / "copy"


def _verify(folder: Path) -> None:
    verify(folder / "out", folder / "base", folder / "adapter")


def _flip(folder: Path, name: str) -> None:
    """Flip the last bit of a tensor's first element."""
    entry = open_checkpoint(folder).entries[name]
    with entry.file.open("r+b") as f:
        f.seek(entry.offset)
        byte = f.read(1)[0]
        f.seek(entry.offset)
        f.write(bytes([byte ^ 1]))


def test_accepts(done: Path) -> None:
    report = verify(done / "out", done / "base", done / "adapter")
    assert (report.tensors, report.recomputed) == (21, 2)
    assert {f.split()[0] for f in report.files} == {"output", "base", "adapter"}
    assert json.dumps(report.to_dict())


def _one_bit(name: str) -> Callable[[Path], None]:
    return lambda folder: _flip(folder / "out", name)


def _rewrite(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = open_checkpoint(folder / "out").entries[K].file
        held = {n: t.clone() for n, t in make.load_file(path).items()}
        change(held)
        save_file(held, path, {"format": "pt"})

    return damage


def _edit(path: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / path).write_text(text) and None


DAMAGED = {
    "a touched tensor": (_one_bit(Q), rf"{Q} differs in 1 bytes"),
    "a copied tensor": (_one_bit(K), rf"{K} differs in 1 bytes"),
    "another base": (lambda f: _flip(f / "base", K), K),
    "another adapter": (lambda f: _other_adapter(f), r"q_proj\.weight differs"),
    "config": (_edit("out/config.json", "{}"), r"output config\.json"),
    "card": (_edit("out/README.md", "hello"), r"output README\.md"),
    "base config": (lambda f: _reformat(f / "base" / "config.json"), r"base config\.json"),
    "adapter config": (lambda f: _reformat(f / "adapter" / "adapter_config.json"), r"adapter adapter_config"),
    "a file gone": (lambda f: (f / "out" / "README.md").unlink(), r"README\.md is missing"),
}  # fmt: skip


def _other_adapter(folder: Path) -> None:
    path = folder / "adapter" / "adapter_model.safetensors"
    held = {n: t * 2 for n, t in make.load_file(path).items()}
    path.unlink()
    save_file(held, path, {"format": "pt"})


def _reformat(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text())) + "\n")


@pytest.mark.parametrize("name", DAMAGED)
def test_names_what_differs(copy: Path, name: str) -> None:
    damage, said = DAMAGED[name]
    damage(copy)
    with pytest.raises(VerifyError, match=said):
        _verify(copy)


def test_other_shapes_and_names(copy: Path) -> None:
    out = open_checkpoint(copy / "out")
    base = open_checkpoint(copy / "base")
    file = out.entries[K].file
    held = {n: t.clone() for n, t in make.load_file(file).items()}
    held[K] = held[K][:-1]
    file.unlink()
    save_file(held, file, {"format": "pt"})
    assert base.shapes != open_checkpoint(copy / "out").shapes
    with pytest.raises(VerifyError, match=rf"{K} has shape"):
        _verify(copy)


def test_what_fuse_did_not_write(copy: Path) -> None:
    (copy / "out" / "graft.json").unlink()
    with pytest.raises(FormatError, match=r"no graft\.json"):
        _verify(copy)
    with pytest.raises(FormatError, match="not a directory"):
        verify(copy / "nothing", copy / "base", copy / "adapter")
    (copy / "out" / "graft.json").write_text('{"version": 99}')
    with pytest.raises(FormatError, match="version 99"):
        _verify(copy)
