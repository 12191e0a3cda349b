"""Random adapters of a small decoder, and the number that each site stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from graft.adapter import Adapter, LowRank
from graft.bind import bind
from graft.formats import Target, Writer, read, written
from graft.formats.holding import carried
from graft.layout import Layout

#: grouped queries, so that q and k differ, and a head of more than two rows, so that their order shows
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 3,
    "vocab_size": 20,
}
TARGET = Target("somebody/tiny", MODEL)

_ATTENTION = {"q_proj": (32, 16), "k_proj": (16, 16), "v_proj": (16, 16), "o_proj": (16, 32)}
_MLP = {"gate_proj": (12, 16), "up_proj": (12, 16), "down_proj": (16, 12)}
LINEAR = {
    f"model.layers.{n}.{block}.{name}.weight": shape
    for n in range(3)
    for block, table in (("self_attn", _ATTENTION), ("mlp", _MLP))
    for name, shape in table.items()
}
#: name → kind, layout, shape; what is not a plain linear weight
OTHER: dict[str, tuple[str, Layout, tuple[int, ...]]] = {
    "model.embed_tokens.weight": ("embedding", Layout("i o"), (20, 16)),
    "h.0.c_fc.weight": ("linear", Layout("i o"), (6, 10)),
    "h.0.qkv.weight": ("linear", Layout("(g o) i", 3, (0, 2)), (6, 5)),
    "stem.weight": ("conv", Layout("o i"), (4, 3, 2, 2)),
    "pointwise.weight": ("conv", Layout("o i"), (4, 3, 1, 1)),
    "model.layers.0.experts.packed": ("parameter", Layout("g o i", 3), (3, 4, 5)),
    "rnn.weight_ih_l0": ("linear", Layout("o i"), (8, 3)),
}
SHAPES: dict[str, tuple[int, ...]] = {
    **LINEAR,
    **{name: shape for name, (_, _, shape) in OTHER.items()},
    **{f"{name.removesuffix('weight')}bias": shape[:1] for name, shape in LINEAR.items()},
    **{f"{module}.bias": (size,) for module, size in (("h.0.c_fc", 10), ("h.0.qkv", 6), ("stem", 4))},
    "pointwise.bias": (4,),
    "norm.weight": (4,),
    "norm.bias": (4,),
    "tokens.embed_tokens.weight": (6, 3),
}


def site(name: str, rank: int, scale: float, dtype: torch.dtype) -> LowRank:
    """A random site of the decoder."""
    kind, layout, shape = OTHER.get(name, ("linear", Layout("o i"), LINEAR.get(name, ())))
    (n_a, i), (n_b, r) = layout.factor_shapes(shape, rank)
    a, b = torch.randn(n_a, i).to(dtype), torch.randn(n_b, r).to(dtype)
    fan = layout.transposed if kind == "linear" else None
    return LowRank(a, b, scale, layout, kind=kind, shape=shape, fan_in_fan_out=fan)


def plain(scale: float = 2.0, rank: int = 2, dtype: torch.dtype = torch.float32) -> Adapter:
    """An adapter that every format can hold: linear weights, one rank, one scale."""
    torch.manual_seed(0)
    return Adapter({name: site(name, rank, scale, dtype) for name in LINEAR})


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    """Sites of several kinds, ranks, scales and dtypes, with or without whatever else adapters carry."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    linear = draw(st.lists(st.sampled_from(sorted(LINEAR)), min_size=1, max_size=4, unique=True))
    other = draw(st.lists(st.sampled_from(sorted(OTHER)), max_size=3, unique=True))
    exact = draw(st.booleans())
    found: dict[str, LowRank] = {}
    for name in sorted([*linear, *other]):
        rank = draw(st.integers(1, 5))
        scale = 2.0 ** draw(st.integers(-3, 4)) if exact else draw(st.integers(1, 4096)) / 16 / rank
        found[name] = site(name, rank, scale, draw(st.sampled_from([torch.float32, torch.bfloat16])))
    norms = draw(st.sampled_from(["none", "none", "some", "all"]))
    for n, name in enumerate(found):
        if norms == "all" or (norms == "some" and n % 2 == 0):
            g, o, _ = _layout(found[name]).dims(SHAPES[name])
            found[name] = replace(found[name], magnitude=torch.rand(g * o) + 0.5)
    full = {"norm.weight": torch.randn(4), "norm.bias": torch.randn(4)} if draw(st.booleans()) else {}
    rows = {"tokens.embed_tokens.weight": ((4, 0), torch.randn(2, 3))} if draw(st.booleans()) else {}
    moved = linear if draw(st.booleans()) else []
    shift = {
        f"{name.removesuffix('weight')}bias": (torch.randn(SHAPES[name][0]), found[name].scale)
        for name in moved
    }
    return Adapter(found, full, shift, rows)


def _layout(one: LowRank) -> Layout:
    assert one.layout is not None
    return one.layout


def through(writer: Writer, adapter: Adapter, path: Path) -> tuple[Adapter, Adapter, bool]:
    """Write what the format holds of the adapter and read it back.

    Returns:
        What it holds, what was read, and whether the writer said that it had to round.
    """
    kept, _ = carried(writer, adapter, TARGET, accept=True)
    done = written(adapter, path, writer, TARGET, accept_loss=True)
    needs: Any = done.needs
    back = bind(read(path, model=MODEL, **needs), SHAPES, config=MODEL)
    return kept, back, any("rounded once" in note or "16th digit" in note for note in done.notes)


def update(one: LowRank, weight: torch.Tensor) -> torch.Tensor:
    """``weight`` + ΔW, rounded once to the weight's dtype: the exact number, whatever the factors' form."""
    flat = weight.clone().view(-1)
    one.delta(weight.shape).add(flat, flat)
    return flat.view(weight.shape)


def assert_same_update(one: Adapter, other: Adapter, *, rounded: bool) -> None:
    """Both change the same parameters by the same numbers, to the last bit unless something was rounded."""
    assert (set(one.sites), set(one.replace)) == (set(other.sites), set(other.replace))
    assert set(one.rows) == set(other.rows)
    for name, mine in one.sites.items():
        twin = other.sites[name]
        zero = torch.zeros(SHAPES[name], dtype=torch.float64)
        weight = torch.randn(SHAPES[name]).bfloat16()
        want, got = update(mine, zero), update(twin, zero)
        if rounded:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))
        else:
            assert torch.equal(got, want), name
            assert torch.equal(update(twin, weight), update(mine, weight)), name
        assert (mine.magnitude is None) == (twin.magnitude is None), name
        assert mine.magnitude is None or torch.equal(mine.magnitude, twin.magnitude), name
    assert all(torch.equal(tensor, other.replace[name]) for name, tensor in one.replace.items())
    for name in {*one.shift, *other.shift}:  # PEFT writes a zero for each module that has none
        (mine, s), (twin, t) = (a.shift.get(name, (torch.zeros(1), 1.0)) for a in (one, other))
        assert bool((mine.double() * s == twin.double() * t).all()), name
    assert all(
        indices == other.rows[name][0] and torch.equal(tensor, other.rows[name][1])
        for name, (indices, tensor) in one.rows.items()
    )
