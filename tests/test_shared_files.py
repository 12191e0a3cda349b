"""Pieces of weights at their places in files, in any order and from any cut, are the file written at once."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from graft import tensors
from graft.engines import Part
from graft.errors import FormatError
from graft.shared_files import Filler, lay_out

Box = tuple[tuple[int, int], ...]


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    box: list[tuple[int, int]] = []
    for size in shape:
        low = draw(st.integers(0, size))
        box.append((low, draw(st.integers(low, size))))
    return shape, tuple(box)


@given(boxes(), st.integers(1, 7))
def test_runs_are_the_places_of_a_block(drawn: tuple[tuple[int, ...], Box], step: int) -> None:
    shape, box = drawn
    places = torch.arange(math.prod(shape)).view(shape)[tuple(slice(*span) for span in box)]
    part = Part(places, box)
    found: dict[int, int] = {}
    for first in range(0, places.numel(), step):
        for mine, there, count in part.runs(shape, first, min(step, places.numel() - first)):
            found |= {mine + n: there + n for n in range(count)}
    assert [found[n] for n in range(places.numel())] == places.flatten().tolist()


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20))
def test_runs_of_a_flat_piece(start: int, first: int, count: int) -> None:
    assert list(Part(torch.zeros(9), start=start).runs((9,), first, count)) == [(first, start + first, count)]


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(["f32", "bf16", "u8"]))),
    st.sampled_from([None, 1, 40]),
    st.integers(1, 5),
)
def test_files_filled_in_pieces(drawn: list[tuple[list[int], str]], limit: int | None, step: int) -> None:
    dtypes = {"f32": torch.float32, "bf16": torch.bfloat16, "u8": torch.uint8}
    held = {f"t{n}": torch.randn(s).mul(9).to(dtypes[d]) for n, (s, d) in enumerate(drawn)}
    with tempfile.TemporaryDirectory() as name:
        once, pieces = Path(name, "once"), Path(name, "pieces")
        once.mkdir(), pieces.mkdir()
        tensors.write_shards(
            once,
            [(n, tuple(t.shape), t.dtype, lambda t=t: t) for n, t in held.items()],
            max_shard_size=limit,
            metadata={"format": "pt"},
        )
        plan = lay_out(
            ((n, tuple(t.shape), t.dtype) for n, t in held.items()),
            max_shard_size=limit,
            metadata={"format": "pt"},
        )
        plan.prepare(pieces)
        for tensor, t in reversed(held.items()):
            filler = Filler(pieces, plan)  # as another process would
            for at in range(0, t.numel(), step):
                filler.write(tensor, at, t.flatten()[at : at + step])
            filler.close(sync=False)
        plan.finish(pieces)
        files = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in (once, pieces)]
        assert files[0] == files[1]


def test_unfinished_files_cannot_be_read(tmp_path: Path) -> None:
    plan = lay_out([("a", (4, 4), torch.float32)])
    plan.prepare(tmp_path)
    filler = Filler(tmp_path, plan)
    filler.write("a", 0, torch.ones(16))
    filler.close(sync=True)
    file = tmp_path / "model.safetensors"
    with pytest.raises(FormatError):
        tensors.read_header(file)
    with pytest.raises(Exception, match=r"(?i)header"):
        load_file(file)
    plan.finish(tmp_path)
    assert torch.equal(load_file(file)["a"], torch.ones(4, 4))
