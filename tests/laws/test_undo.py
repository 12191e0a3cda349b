"""Law 4: unfuse gives every bit back, and refuses when it cannot."""

from __future__ import annotations

import pytest
import torch

from graft import kernel, undo
from graft.delta import Delta
from graft.errors import StateError
from graft.layout import Layout
from graft.rounding import bits

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def pair(dtype: torch.dtype, ratio: float, shape: tuple[int, int] = (96, 130)) -> tuple[torch.Tensor, Delta]:
    torch.manual_seed(7)
    w = torch.randn(shape).mul(0.02).to(dtype)
    a, b = torch.randn(8, shape[1]), torch.randn(shape[0], 8)
    scale = ratio * float(w.double().norm() / (b.double() @ a.double()).norm())
    return w, Delta.of(a, b, scale, Layout(), shape)


@pytest.fixture(params=["c", "torch"])
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(kernel, "usable", lambda tensor: False)
    return request.param


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("ratio", [1e-4, 1e-2, 1.0, 100.0])
def test_every_bit_comes_back(dtype: torch.dtype, ratio: float, road: str) -> None:
    shape = (12, 13) if dtype == torch.float64 else (96, 130)
    w, delta = pair(dtype, ratio, shape)
    w[0, 0], w[1] = -0.0, 0.0
    before = bits(w).clone()
    kept = undo.fuse(w, delta)
    assert not torch.equal(bits(w), before)
    undo.unfuse(w, delta, kept)
    assert torch.equal(bits(w), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hundred_cycles_with_new_factors_leave_no_trace(dtype: torch.dtype) -> None:
    w, _ = pair(dtype, 1e-2, (33, 47))
    before = bits(w).clone()
    for cycle in range(100):
        torch.manual_seed(cycle)
        delta = Delta.of(torch.randn(4, 47), torch.randn(33, 4) * 10 ** -(cycle % 5), 0.37, Layout(), w.shape)
        undo.unfuse(w, delta, undo.fuse(w, delta))
    assert torch.equal(bits(w), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_and_torch_keep_the_same_exceptions(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, delta = pair(dtype, 0.5)
    other = w.clone()
    one = undo.fuse(w, delta)
    monkeypatch.setattr(kernel, "usable", lambda tensor: False)
    two = undo.fuse(other, delta)
    assert torch.equal(bits(w), bits(other))
    assert (one.base, one.fused, one.factors) == (two.base, two.fused, two.factors)
    for x, y in zip(one.blocks, two.blocks, strict=True):
        assert (
            torch.equal(x.gap, y.gap) and torch.equal(x.fix, y.fix) and torch.equal(bits(x.raw), bits(y.raw))
        )


@pytest.mark.parametrize(("ratio", "most"), [(1e-4, 0.1), (1e-3, 0.1), (1e-2, 0.7), (1e-1, 3.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_while_fused(dtype: torch.dtype, ratio: float, most: float) -> None:
    w, delta = pair(dtype, ratio, (512, 768))
    assert undo.fuse(w, delta).nbytes * 8 / w.numel() <= most


def test_a_shard_is_fused_like_the_whole() -> None:
    w, delta = pair(torch.bfloat16, 0.1)
    shard = w.view(-1)[1001:7777].clone()
    before = bits(shard).clone()
    undo.fuse(w, delta)
    kept = undo.fuse(shard, delta, start=1001)
    assert torch.equal(bits(shard), bits(w.view(-1)[1001:7777]))
    undo.unfuse(shard, delta, kept, start=1001)
    assert torch.equal(bits(shard), before)


def test_channels_last_weights_are_fused_and_restored() -> None:
    torch.manual_seed(0)
    w = torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last)
    plain = w.contiguous().clone()
    delta = Delta.of(torch.randn(2, 45), torch.randn(6, 2), 0.5, Layout(), w.shape)
    kept, kept_plain = undo.fuse(w, delta), undo.fuse(plain, delta)
    assert torch.equal(w, plain) and w.is_contiguous(memory_format=torch.channels_last)
    undo.unfuse(w, delta, kept)
    undo.unfuse(plain, delta, kept_plain)
    assert torch.equal(w, plain)


def test_an_edited_weight_is_refused_and_left_alone() -> None:
    w, delta = pair(torch.bfloat16, 0.1)
    kept = undo.fuse(w, delta)
    w[5, 5] += 1
    now = w.clone()
    with pytest.raises(StateError, match="edited after fuse"):
        undo.unfuse(w, delta, kept)
    assert torch.equal(w, now)


def test_changed_factors_are_refused_and_nothing_is_written() -> None:
    w, delta = pair(torch.bfloat16, 0.1)
    kept = undo.fuse(w, delta)
    now = w.clone()
    delta.terms[0].left[0, 0] += 1
    with pytest.raises(StateError, match="changed while fused"):
        undo.unfuse(w, delta, kept)
    assert torch.equal(w, now)


def test_overflow_leaves_the_weight_unfused(road: str) -> None:
    w = torch.full((4, 8), 60000.0).half()
    before = w.clone()
    delta = Delta.of(torch.ones(1, 8), torch.full((4, 1), 30000.0), 1.0, Layout(), w.shape)
    with pytest.raises(StateError, match=r"beyond the range of torch\.float16"):
        undo.fuse(w, delta)
    assert torch.equal(w, before)


def test_infinite_and_nan_weights_survive(road: str) -> None:
    w, delta = pair(torch.bfloat16, 0.1)
    w[0, 0], w[0, 1], w[0, 2] = float("inf"), float("-inf"), float("nan")
    before = bits(w).clone()
    kept = undo.fuse(w, delta)
    assert torch.equal(bits(w)[0, :3], before[0, :3])
    undo.unfuse(w, delta, kept)
    assert torch.equal(bits(w), before)
