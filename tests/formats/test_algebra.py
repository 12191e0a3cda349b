"""Sums, scales and ranks of adapters, and read(write(adapter)) == adapter, over random adapters."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graft import algebra
from graft.adapter import Adapter, LowRank
from graft.bind import bind
from graft.errors import FormatError, LayoutError
from graft.formats import read, write
from graft.layout import Layout

from . import peers
from .carrying import update

KINDS = {
    "linear": (Layout("o i"), (5, 7)),
    "conv1d": (Layout("i o"), (7, 5)),
    "embedding": (Layout("i o"), (9, 4)),
    "conv": (Layout("o i"), (4, 3, 2, 2)),
    "parameter": (Layout("g o i", 3), (3, 4, 5)),
    "turned parameter": (Layout("g i o", 3), (3, 4, 5)),
}
FUSED = {
    "fused": (Layout("(g o) i", 3, (0, 2)), (6, 5)),
    "fused turned": (Layout("i (g o)", 2), (5, 6)),
    "loralib conv": (Layout("o i", matrix=(6, 12)), (2, 4, 3, 3)),
    "some experts": (Layout("g o i", 4, (3, 1)), (4, 2, 3)),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(
    layout: Layout, shape: tuple[int, ...], kind: str, rank: int, scale: float, dtype: torch.dtype
) -> LowRank:
    (n_a, i), (n_b, r) = layout.factor_shapes(shape, rank)
    a, b = torch.randn(n_a, i).to(dtype), torch.randn(n_b, r).to(dtype)
    fan = None if kind in ("embedding", "conv", "parameter") else False
    return LowRank(a, b, scale, layout, kind=kind, shape=shape, fan_in_fan_out=fan)


@st.composite
def sites(draw: st.DrawFn, table: dict[str, tuple[Layout, tuple[int, ...]]]) -> tuple[str, LowRank]:
    name = draw(st.sampled_from(sorted(table)))
    layout, shape = table[name]
    kind = {"conv1d": "linear", "turned parameter": "parameter", "some experts": "parameter"}.get(name, name)
    kind = "linear" if kind.startswith("fused") else "conv" if kind.startswith("loralib") else kind
    torch.manual_seed(draw(st.integers(0, 2**31)))
    rank = draw(st.integers(1, 9))
    scale = draw(st.integers(1, 4096)) / 16 / rank
    return name, make(layout, shape, kind, rank, scale, draw(st.sampled_from(DTYPES)))


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    drawn = draw(st.lists(sites(KINDS), min_size=1, max_size=5))
    found = {}
    for n, (_, site) in enumerate(drawn):
        leaf = "packed" if site.kind == "parameter" else "weight"
        found[f"layers.{n}.m.{leaf}"] = site
    full = {"norm.bias": torch.randn(4)} if draw(st.booleans()) else {}
    rows = {"embed_tokens.weight": ((4, 0), torch.randn(2, 3))} if draw(st.booleans()) else {}
    return Adapter(found, full, rows=rows)


def shapes_of(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    extra = {"norm.bias": (4,), "embed_tokens.weight": (6, 3)}
    return {**{name: site.shape or () for name, site in adapter.sites.items()}, **extra}


@settings(max_examples=25)
@given(adapters())
def test_peft_round_trip(adapter: Adapter) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(adapter, Path(folder) / "a")
        peers.assert_same(bind(read(Path(folder) / "a"), shapes_of(adapter)), adapter)


def test_scales_of_rslora_come_back_to_the_last_bit(tmp_path: Path) -> None:
    ranks = [1, 2, 3, 5, 6, 7, 11, 13]
    found = {
        f"layers.{r}.weight": make(*KINDS["linear"], "linear", r, 5 / math.sqrt(r), torch.float32)
        for r in ranks
    }
    assert write(Adapter(found), tmp_path / "a") == []
    peers.assert_same(bind(read(tmp_path / "a"), shapes_of(Adapter(found))), Adapter(found))


def test_a_scale_that_no_alpha_gives_is_said(tmp_path: Path) -> None:
    scales = [1.9 + n * 2.0**-52 for n in range(1, 40)]
    found = {
        f"layers.{n}.weight": make(*KINDS["linear"], "linear", 3, s, torch.float32)
        for n, s in enumerate(scales)
    }
    assert any("16th digit" in note for note in write(Adapter(found), tmp_path / "a"))
    back = bind(read(tmp_path / "a"), shapes_of(Adapter(found)))
    assert all(math.isclose(back.sites[n].scale, site.scale, rel_tol=3e-16) for n, site in found.items())


def dense(site: LowRank) -> torch.Tensor:
    assert site.shape is not None
    return site.delta(site.shape).dense()


@settings(max_examples=30)
@given(sites(FUSED))
def test_blocks_are_written_as_the_same_delta(drawn: tuple[str, LowRank]) -> None:
    name, site = drawn
    leaf = "packed" if name == "some experts" else "weight"
    adapter = Adapter({f"layers.0.m.{leaf}": site})
    with tempfile.TemporaryDirectory() as folder:
        write(adapter, Path(folder) / "a")
        back = bind(read(Path(folder) / "a"), shapes_of(adapter)).sites[f"layers.0.m.{leaf}"]
    zero = torch.zeros(site.shape or (), dtype=torch.float64)
    assert torch.equal(update(back, zero), update(site, zero))


@settings(max_examples=40)
@given(sites(KINDS | FUSED), st.integers(1, 6), st.floats(0.01, 100))
def test_a_sum_of_updates_is_one_update(drawn: tuple[str, LowRank], rank: int, scale: float) -> None:
    _, one = drawn
    assert one.layout and one.shape
    other = make(one.layout, one.shape, one.kind, rank, scale, torch.float32)
    total = algebra.plus(one, other)
    assert total.rank == one.rank + other.rank
    want = dense(one) + dense(other)
    torch.testing.assert_close(dense(total), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@settings(max_examples=40)
@given(sites(KINDS | FUSED), st.integers(0, 4))
def test_padding_changes_nothing(drawn: tuple[str, LowRank], extra: int) -> None:
    _, site = drawn
    wide = algebra.padded(site, site.rank + extra)
    zero = torch.zeros(site.shape or (), dtype=torch.float64)
    assert wide.rank == site.rank + extra and torch.equal(update(wide, zero), update(site, zero))


@settings(max_examples=30)
@given(sites({"linear": KINDS["linear"]}), st.integers(1, 9))
def test_resizing_is_the_best_approximation(drawn: tuple[str, LowRank], rank: int) -> None:
    _, site = drawn
    small = algebra.resized(site, rank)
    delta = dense(site)
    lost = torch.linalg.svdvals(delta)[rank:].norm()
    error = (dense(small) - delta).norm()
    assert small.rank == rank and error <= lost + 1e-5 * delta.norm() + 1e-12


def test_scale_is_exact_and_refused_where_it_means_nothing() -> None:
    site = make(*KINDS["linear"], "linear", 2, 0.3, torch.bfloat16)
    assert algebra.scale(Adapter({"a.weight": site}), 0.5).sites["a.weight"].scale == 0.15
    for bad in (
        Adapter({}, {"head.weight": torch.ones(2)}),
        Adapter({"a.weight": replace(site, magnitude=torch.ones(5))}),
        Adapter({}, rows={"e.weight": ((1,), torch.ones(1, 2))}),
    ):
        with pytest.raises(LayoutError, match=r"scaled by 0\.5"):
            algebra.scale(bad, 0.5)


def test_sums_that_mean_nothing_are_refused() -> None:
    site = make(*KINDS["linear"], "linear", 2, 1.0, torch.float32)
    dora = replace(site, magnitude=torch.ones(5))
    with pytest.raises(LayoutError, match="DoRA"):
        algebra.plus(site, dora)
    with pytest.raises(LayoutError, match="cannot be added"):
        algebra.plus(site, make(*KINDS["conv1d"], "linear", 2, 1.0, torch.float32))
    full = Adapter({}, {"a.weight": torch.ones(5, 7)})
    with pytest.raises(LayoutError, match=r"replaces a\.weight"):
        algebra.add(full, Adapter({"a.weight": site}))
    both = algebra.add(
        Adapter({"a.weight": site}, shift={"a.bias": (torch.ones(5), 2.0)}),
        Adapter({"b.weight": site}, shift={"a.bias": (torch.ones(5), 1.0)}),
    )
    assert set(both.sites) == {"a.weight", "b.weight"} and torch.equal(
        both.shift["a.bias"][0], torch.full((5,), 3.0).double()
    )


@pytest.mark.parametrize(
    ("name", "layout", "shape", "said"),
    [
        ("rnn.weight_ih_l0", Layout("o i"), (8, 3), "recurrent"),
        ("attn.k_proj_weight", Layout("o i"), (8, 3), "separate projections"),
        ("up.weight", Layout("(g i) o"), (4, 6, 3), "transposed convolutions"),
        ("conv.weight", Layout("(g o) i", 2), (4, 3, 3), "grouped convolution"),
        ("conv.weight", Layout("o i", matrix=(6, 12)), (4, 2, 3, 3), "no module with layout"),
    ],
)
def test_what_peft_cannot_hold(
    name: str, layout: Layout, shape: tuple[int, ...], said: str, tmp_path: Path
) -> None:
    site = make(layout, shape, "conv" if len(shape) > 2 else "linear", 2, 1.0, torch.float32)
    with pytest.raises(FormatError) as error:
        write(Adapter({name: site}), tmp_path / "a")
    assert said in str(error.value) and name in str(error.value) and not (tmp_path / "a").exists()


def test_unbound_and_uneven_adapters_are_not_written(tmp_path: Path) -> None:
    site = make(*KINDS["linear"], "linear", 2, 1.0, torch.float32)
    cases = {
        "not bound": Adapter({"a.weight": replace(site, layout=None)}),
        "DoRA on some": Adapter({"a.weight": site, "b.weight": replace(site, magnitude=torch.ones(5))}),
        "no low-rank": Adapter({}, {"a.weight": torch.ones(2)}),
        "its scale": Adapter({"a.weight": site}, shift={"a.bias": (torch.ones(5), 2.0)}),
        "not adapted": Adapter({"a.weight": site}, shift={"b.bias": (torch.ones(5), 1.0)}),
    }
    for said, adapter in cases.items():
        with pytest.raises(FormatError, match=said):
            write(adapter, tmp_path / "a")
    assert not list(tmp_path.iterdir())
