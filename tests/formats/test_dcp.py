"""Directories of torch.distributed.checkpoint: what torch writes is read, and no code in them is run."""

from __future__ import annotations

import collections
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader

from graft.errors import FormatError
from graft.formats import read
from graft.formats.dcp.checkpoint import DistributedCheckpoint, find_folder
from graft.formats.dcp.writer import save_checkpoint

KEY = "decoder.layers.0.self_attention.linear_proj.adapter.linear_{}.weight"
STATE = {KEY.format("in"): torch.arange(8.0).view(2, 4), KEY.format("out"): torch.ones(6, 2)}


def save(state: dict[str, Any], folder: Path) -> Path:
    """As torch itself saves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def opened(folder: Path) -> dict[str, torch.Tensor]:
    return dict(DistributedCheckpoint().open(folder).tensors)


def change(folder: Path, edit: Callable[[Any], None]) -> Path:
    """The directory with its metadata edited."""
    path = folder / ".metadata"
    metadata = FileSystemReader(folder).read_metadata()
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))
    return folder


def test_every_dtype_and_shape_as_torch_writes_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {
        **{f"t.{d}": torch.randn(3, 4).to(d) for d in (torch.float32, torch.bfloat16, torch.float16)},
        "scalar": torch.tensor(2.5), "turned": torch.randn(4, 3).T, "long": torch.arange(5),
    }  # fmt: skip
    found = opened(save({**state, "extra": {"a": 1}, "text": "x"}, tmp_path / "c"))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in state.items())


def test_torch_reads_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    state = {"a": torch.randn(3, 4), "b": torch.randn(2).bfloat16(), "turned": torch.randn(4, 3).T}
    save_checkpoint(state, tmp_path / "c")
    found = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(found, storage_reader=FileSystemReader(tmp_path / "c"), no_dist=True)
    assert all(torch.equal(found[name], t) for name, t in state.items())
    assert str(tmp_path) not in (tmp_path / "c" / ".metadata").read_bytes().decode("latin-1")


class Runs:
    """A pickle that makes a directory when it is loaded."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.where),)


@pytest.mark.parametrize("place", ["whole", "planner_data", "storage_meta", "beside a tensor"])
def test_code_in_the_metadata_is_refused_by_name(place: str, tmp_path: Path) -> None:
    folder, trap = save(dict(STATE), tmp_path / "c"), tmp_path / "trap"
    if place == "whole":
        (folder / ".metadata").write_bytes(pickle.dumps(Runs(trap)))
    elif place == "beside a tensor":
        change(folder, lambda m: m.state_dict_metadata.update({"x": Runs(trap)}))
    else:
        change(folder, lambda m: setattr(m, place, Runs(trap)))
    assert not trap.exists()
    with pytest.raises(FormatError, match=r"\.metadata holds more.*\(posix\.mkdir\).*Nothing was run"):
        read(folder, alpha=1)
    assert not trap.exists()


@pytest.mark.parametrize(
    "odd",
    [
        eval,
        getattr,
        pickle.loads,
        torch.load,
        torch.nn.Linear,
        collections.UserDict,
        torch.distributed.barrier,
    ],
)
def test_no_other_name_has_a_place_in_metadata(odd: Any, tmp_path: Path) -> None:
    folder = save(dict(STATE), tmp_path / "c")
    change(folder, lambda m: setattr(m, "planner_data", odd))
    with pytest.raises(FormatError, match="more than the metadata"):
        opened(folder)


def test_a_name_that_only_begins_like_an_allowed_one_is_refused(tmp_path: Path) -> None:
    folder = save(dict(STATE), tmp_path / "c")
    path = folder / ".metadata"
    text = b"ctorch.distributed.checkpointer\nrun\n(tR."
    path.write_bytes(text)
    with pytest.raises(FormatError, match=r"torch\.distributed\.checkpointer\.run"):
        opened(folder)


def test_classes_of_the_metadata_are_not_called(tmp_path: Path) -> None:
    """Even an allowed class is a record: its own constructor and setters do not run."""
    data = b"\x80\x04ctorch.distributed.checkpoint.filesystem\nFileSystemWriter\n(Vx\ntR."
    path = save(dict(STATE), tmp_path / "c") / ".metadata"
    path.write_bytes(data)
    with pytest.raises(FormatError, match="does not describe a checkpoint"):
        opened(path.parent)
    assert not Path("x").exists()


def test_bytes_beside_the_tensors_are_not_loaded(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    folder = save({**STATE, "rng_state": Runs(trap)}, tmp_path / "c")
    assert set(opened(folder)) == set(STATE) and not trap.exists()


def test_code_in_a_tensors_bytes_is_refused(tmp_path: Path) -> None:
    folder, trap = save(dict(STATE), tmp_path / "c"), tmp_path / "trap"
    torch.save(Runs(trap), folder / "evil.distcp")

    def edit(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path, info.offset = "evil.distcp", 0
            info.length = (folder / "evil.distcp").stat().st_size

    with pytest.raises(FormatError, match="damaged or cut short"):
        opened(change(folder, edit))
    assert not trap.exists()


def _first(metadata: Any) -> Any:
    return next(iter(metadata.storage_data.values()))


def _drop_block(metadata: Any) -> None:
    metadata.state_dict_metadata[KEY.format("in")].chunks = []


def _wrong_shape(metadata: Any) -> None:
    metadata.state_dict_metadata[KEY.format("in")].chunks[0].sizes = torch.Size([4, 2])
    metadata.state_dict_metadata[KEY.format("in")].size = torch.Size([4, 2])


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda m: setattr(_first(m), "relative_path", "../x.distcp"), "outside the checkpoint"),
        (lambda m: setattr(_first(m), "relative_path", "/x.distcp"), "outside the checkpoint"),
        (lambda m: setattr(_first(m), "relative_path", "gone.distcp"), "missing; copy the whole"),
        (lambda m: setattr(_first(m), "transform_descriptors", ["zstd"]), r"compressed \(zstd\)"),
        (lambda m: setattr(_first(m), "length", 40), "damaged or cut short"),
        (lambda m: setattr(_first(m), "offset", "no"), "damaged or cut short"),
        (lambda m: m.storage_data.clear(), "does not describe a checkpoint"),
        (lambda m: setattr(m, "state_dict_metadata", None), "does not describe a checkpoint"),
        (_drop_block, "does not hold all of its blocks"),
        (_wrong_shape, r"holds \[2, 4\], not \[4, 2\]"),
    ],
)
def test_damaged_checkpoints_are_refused(edit: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=said):
        opened(change(save(dict(STATE), tmp_path / "c"), edit))


@pytest.mark.parametrize("data", [b"", b"not a pickle", b"\x80\x04K\x01.", b"\x80\x04]."])
def test_metadata_that_is_none(data: bytes, tmp_path: Path) -> None:
    folder = save(dict(STATE), tmp_path / "c")
    (folder / ".metadata").write_bytes(data)
    with pytest.raises(FormatError, match=r"\.metadata (is not readable|holds a)"):
        opened(folder)


def test_older_megatrons_metadata_is_read(tmp_path: Path) -> None:
    """Megatron-Core before 0.16 leaves objects of its own in the metadata."""
    import types

    module = types.ModuleType("megatron.core.dist_checkpointing.strategies.torch")
    kind = type("MCoreMetadata", (), {"__module__": module.__name__})
    module.MCoreMetadata = kind  # type: ignore[attr-defined]
    folder = save(dict(STATE), tmp_path / "c")
    import sys

    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module
    try:
        change(folder, lambda m: setattr(m, "planner_data", kind()))
    finally:
        sys.modules.pop(module.__name__)
        if before is not None:
            sys.modules[module.__name__] = before
    assert set(opened(folder)) == set(STATE)


def test_the_folder_of_a_run(tmp_path: Path) -> None:
    """Megatron's iterations and their tracker, NeMo's weights; several without a tracker are none."""
    run = tmp_path / "run"
    for n in (5, 20):
        save(dict(STATE), run / f"iter_{n:07d}")
    assert find_folder(run) is None
    (run / "latest_checkpointed_iteration.txt").write_text("5\n")
    assert find_folder(run) == run / "iter_0000005"
    (run / "latest_checkpointed_iteration.txt").write_text("release")
    assert find_folder(run) is None
    assert find_folder(run / "iter_0000020") == run / "iter_0000020"
    one = tmp_path / "one"
    save(dict(STATE), one / "iter_0000001")
    assert find_folder(one) == one / "iter_0000001"
    save(dict(STATE), tmp_path / "nemo" / "weights")
    assert find_folder(tmp_path / "nemo") == tmp_path / "nemo" / "weights"
    assert len(read(tmp_path / "nemo", alpha=4).sites) == 1
