"""Each layer against loralib's own: names, initial numbers, outputs, gradients, and merging."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graft.compat.loralib.layers
import graft.compat.loralib.utils

from .loralib_models import IDS, ORIGINAL, OURS, base, everything, randomise, same_bits

ALPHAS = st.sampled_from([1, 2, 3.0, 8, 0.5, -1, 0])
DTYPES = st.sampled_from([torch.float32, torch.float64])


@dataclass
class Case:
    """A layer's class, its arguments, and an input for it."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    x: torch.Tensor
    dtype: torch.dtype = torch.float32

    def make(self, lora: ModuleType, seed: int) -> Any:
        torch.manual_seed(seed)
        layer = getattr(lora, self.name)(*self.args, **self.kwargs, dtype=self.dtype)
        self.rest = torch.rand(3)  # the next random numbers
        return layer


def _x(draw: Any, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return torch.randn(shape, generator=generator, dtype=dtype)


def _options(draw: Any) -> dict[str, Any]:
    return {"r": draw(st.integers(0, 7)), "lora_alpha": draw(ALPHAS), "merge_weights": draw(st.booleans())}


@st.composite
def linears(draw: Any) -> Case:
    into, out, dtype = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(DTYPES)
    own = {"fan_in_fan_out": draw(st.booleans()), "bias": draw(st.booleans())}
    shape = [*draw(st.lists(st.integers(1, 3), max_size=2)), into]
    return Case("Linear", (into, out), own | _options(draw), _x(draw, *shape, dtype=dtype), dtype)


@st.composite
def merged(draw: Any) -> Case:
    enabled = draw(st.lists(st.booleans(), min_size=1, max_size=4).filter(any))
    into, out, dtype = draw(st.integers(1, 9)), len(enabled) * draw(st.integers(1, 4)), draw(DTYPES)
    own = {"enable_lora": enabled, "fan_in_fan_out": draw(st.booleans()), "bias": draw(st.booleans())}
    return Case("MergedLinear", (into, out), own | _options(draw), _x(draw, 2, 3, into, dtype=dtype), dtype)


@st.composite
def embeddings(draw: Any) -> Case:
    words, dim, dtype = draw(st.integers(2, 9)), draw(st.integers(1, 6)), draw(DTYPES)
    own = {"padding_idx": draw(st.sampled_from([None, 0, -1]))}
    x = torch.tensor(draw(st.lists(st.integers(0, words - 1), min_size=1, max_size=6)))
    return Case("Embedding", (words, dim), own | _options(draw), x, dtype)


@st.composite
def convolutions(draw: Any) -> Case:
    axes, k = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (2, 3), (3, 1)]))
    groups, dtype = draw(st.integers(1, 3)), draw(DTYPES)
    into, out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    own = {
        "groups": groups,
        "padding": draw(st.integers(0, 1)),
        "stride": draw(st.integers(1, 2)),
        "padding_mode": draw(st.sampled_from(["zeros", "circular"])),
        "bias": draw(st.booleans()),
    }
    x = _x(draw, 2, into, *[4, 5, 4][:axes], dtype=dtype)
    return Case(f"Conv{axes}d", (into, out, k), own | _options(draw), x, dtype)


CASES = st.one_of(linears(), merged(), embeddings(), convolutions())


def outputs_and_gradients(layer: Any, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_(x.is_floating_point())
    y = layer(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    wanted = [p for p in layer.parameters() if p.requires_grad] + [x] * x.requires_grad
    if not y.requires_grad:  # merged, A and B get no gradient
        return [y]
    gradients = torch.autograd.grad((y * weights).sum(), wanted, allow_unused=True)
    return [y, *(g for g in gradients if g is not None)]


@settings(max_examples=150, deadline=None)
@given(CASES, st.integers(0, 99))
def test_a_layer_is_the_originals(case: Case, seed: int) -> None:
    theirs = case.make(ORIGINAL, seed)
    rest = case.rest
    ours = case.make(OURS, seed)
    assert torch.equal(case.rest, rest), "the original's random numbers, and no more of them"
    assert type(ours).__name__ == type(theirs).__name__ and isinstance(ours, OURS.LoRALayer)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    for name, value in mine.items():
        assert torch.equal(value, other[name]) and value.stride() == other[name].stride(), name
    for (name, p), (other_name, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other_name and p.requires_grad == q.requires_grad and p.dtype == q.dtype
    for attribute in (
        "r",
        "lora_alpha",
        "merge_weights",
        "merged",
        "scaling",
        "fan_in_fan_out",
        "enable_lora",
    ):
        assert getattr(ours, attribute, None) == getattr(theirs, attribute, None), attribute


@settings(max_examples=150, deadline=None)
@given(CASES, st.lists(st.booleans(), min_size=1, max_size=6))
def test_forward_gradients_and_merging_are_the_originals(case: Case, modes: list[bool]) -> None:
    ours, theirs = case.make(OURS, 0), case.make(ORIGINAL, 0)
    randomise(ours), randomise(theirs)
    if case.kwargs["r"] and case.kwargs.get("padding_idx") is not None:
        for layer in (ours, theirs):  # as training leaves it: padding gives A no gradient
            layer.lora_A.data[:, layer.padding_idx] = 0
    before = base(ours)
    for mode in (True, *modes):
        assert ours.train(mode) is ours and ours.training is mode
        theirs.train(mode)
        assert ours.merged is theirs.merged
        mine, other = outputs_and_gradients(ours, case.x), outputs_and_gradients(theirs, case.x)
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    live, merged_there = dict(ours.named_parameters()), dict(theirs.named_parameters())
    for name, p in live.items():
        torch.testing.assert_close(p, merged_there[name], rtol=1e-4, atol=1e-5)
    ours.train()
    assert same_bits(base(ours), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_parents_cycles_give_every_bit_back(dtype: torch.dtype) -> None:
    model = everything(OURS).to(dtype)
    before = base(model)
    for _ in range(20):
        model.eval(), model.eval()
        assert not same_bits(base(model), before)
        model.train(), model.train()
        assert same_bits(base(model), before)


@pytest.mark.parametrize("name", OURS.__all__)
def test_signatures_are_the_originals(name: str) -> None:
    def form(thing: Any) -> list[tuple[str, Any, Any]]:
        parameters = inspect.signature(thing).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    assert form(getattr(OURS, name)) == form(getattr(ORIGINAL, name))
    home = "utils" if name.islower() else "layers"
    assert getattr(getattr(graft.compat.loralib, home), name) is getattr(OURS, name)


def test_bases_are_the_originals() -> None:
    for name in OURS.__all__:
        theirs, ours = getattr(ORIGINAL, name), getattr(OURS, name)
        for kind in (nn.Linear, nn.Embedding, nn.Module):
            if isinstance(theirs, type):
                assert issubclass(ours, kind) == issubclass(theirs, kind)


class TheUsersOwn(nn.Module):
    """A layer on LoRALayer alone, as loralib's users write them."""

    def __init__(self, lora: ModuleType) -> None:
        super().__init__()
        lora.LoRALayer.__init__(self, r=2, lora_alpha=4, lora_dropout=0.5, merge_weights=True)
        self.lora_C = nn.Parameter(torch.ones(2))
        self.bias = nn.Parameter(torch.ones(2))
        self.merged = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lora_dropout(x) * self.lora_C * self.lora_alpha / self.r + self.bias


def test_a_layer_of_the_users_own() -> None:
    kinds = {
        lora: type("Own", (TheUsersOwn, lora.LoRALayer), {})(lora) for lora in (ORIGINAL, OURS)
    }  # the same code on both bases
    for bias in ("none", "all", "lora_only"):
        trains, saved = [], []
        for lora, layer in kinds.items():
            layer.requires_grad_(True)
            lora.mark_only_lora_as_trainable(layer, bias)
            trains.append([n for n, p in layer.named_parameters() if p.requires_grad])
            saved.append(list(lora.lora_state_dict(layer, bias)))
        assert trains[0] == trains[1] and saved[0] == saved[1]
    x = torch.randn(3, 2)
    torch.manual_seed(0)
    y = kinds[OURS](x)
    torch.manual_seed(0)
    assert torch.equal(kinds[ORIGINAL](x), y) and kinds[OURS].merged is True


@pytest.mark.parametrize("bias", ["none", "all"])
def test_what_trains_and_what_is_saved(bias: str) -> None:
    found = []
    for lora in (ORIGINAL, OURS):
        model = everything(lora)
        lora.mark_only_lora_as_trainable(model, bias)
        state = lora.lora_state_dict(model, bias)
        found.append(([n for n, p in model.named_parameters() if p.requires_grad], list(state)))
        assert all(torch.equal(v, model.state_dict()[n]) for n, v in state.items())
    assert found[0] == found[1]


def test_dropout_drops_the_same_elements() -> None:
    x = torch.randn(4, 6)
    for name, kwargs in (("Linear", {}), ("MergedLinear", {"enable_lora": [False, True]})):
        results = []
        for lora in (ORIGINAL, OURS):
            layer = getattr(lora, name)(6, 8, r=2, lora_dropout=0.5, **kwargs)
            with torch.no_grad():
                layer.weight.zero_(), layer.bias.zero_()
            randomise(layer)
            layer.lora_dropout.p = 0.3
            torch.manual_seed(2)
            results.append(layer(x))
            layer.lora_dropout = nn.Identity()
            results[-1] = results[-1] + layer(x)
        torch.testing.assert_close(*results)


def test_methods_of_merged_linear() -> None:
    for kwargs in ({}, {"fan_in_fan_out": True}):
        theirs, ours = (
            lora.MergedLinear(5, 9, r=2, enable_lora=[True, False, True], **kwargs)
            for lora in (ORIGINAL, OURS)
        )
        randomise(theirs), randomise(ours)
        assert torch.equal(ours.lora_ind, theirs.lora_ind)
        rows = torch.randn(6, 4)
        assert torch.equal(ours.zero_pad(rows), theirs.zero_pad(rows))
        torch.testing.assert_close(ours.merge_AB(), theirs.merge_AB())
        ours.merge_AB().sum().backward(), theirs.merge_AB().sum().backward()
        torch.testing.assert_close(ours.lora_A.grad, theirs.lora_A.grad)


def test_scaling_may_be_set_as_in_the_original() -> None:
    ours, theirs = everything(OURS), everything(ORIGINAL)
    before = base(ours)
    for model in (theirs, ours.eval()):
        for layer in model.modules():
            if hasattr(layer, "scaling"):
                layer.scaling = 2
    theirs.eval()
    torch.testing.assert_close(ours(IDS), theirs(IDS))
    assert same_bits(base(ours.train()), before)
