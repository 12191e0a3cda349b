"""State dicts, loading, copies and conversions, in every mode and between both libraries."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graft
from graft.compat.loralib import guard

from .loralib_models import IDS, ORIGINAL, OURS, base, everything, randomise, same_bits

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def shaken(lora: Any, mode: bool) -> nn.Module:
    """A model with other weights and factors, to load into."""
    model = everything(lora, seed=3)
    return model.train(mode)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def without_a_mark(state: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize("saved", [True, False], ids=["saved in train", "saved in eval"])
@pytest.mark.parametrize("loaded", [True, False], ids=["loaded in train", "loaded in eval"])
def test_the_mode_does_not_show_in_a_state_dict(saved: bool, loaded: bool) -> None:
    model = everything(OURS)
    want, before = model(IDS), base(model)
    state = through_a_file(model.train(saved).state_dict())
    assert list(state) == list(everything(ORIGINAL).state_dict())
    assert same_bits(base(model.train()), before)
    assert same_bits({n: v for n, v in state.items() if "lora_" not in n}, before)

    ours = shaken(OURS, loaded)
    assert not any(ours.load_state_dict(state))
    torch.testing.assert_close(ours(IDS), want, **CLOSE)
    assert same_bits(base(ours.train()), before)
    torch.testing.assert_close(ours(IDS), want, **CLOSE)

    theirs = shaken(ORIGINAL, True)
    assert not any(theirs.load_state_dict(state))
    for mode in (False, True):
        theirs.train(mode)
        torch.testing.assert_close(theirs(IDS), want, **CLOSE)


def test_the_log_says_once_that_a_state_dict_holds_the_base(caplog: pytest.LogCaptureFixture) -> None:
    guard._note_base.cache_clear()
    model = everything(OURS)
    with caplog.at_level(logging.WARNING):
        model.state_dict()
        OURS.lora_state_dict(model.eval())
        assert caplog.messages == []
        model.state_dict(), model.state_dict()
    assert len(caplog.messages) == 1 and "keep_fused=True" in caplog.text


def test_the_way_to_a_merged_state_dict_that_the_log_names() -> None:
    model = everything(OURS).eval()
    want, merged = model(IDS), base(model)
    graft.unadapt(model, keep_fused=True)
    assert same_bits(dict(model.state_dict()), merged)
    torch.testing.assert_close(model.train()(IDS), want, **CLOSE)


@pytest.mark.parametrize("mode", [True, False])
def test_a_whole_state_dict_of_loralib_loads(mode: bool) -> None:
    theirs = everything(ORIGINAL)
    want = theirs(IDS)
    ours = shaken(OURS, mode)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert not any(ours.load_state_dict(theirs.state_dict(), strict=True))
    assert all("may hold" in str(w.message) or "hold ΔW already" in str(w.message) for w in said)
    assert bool(said) is not mode
    torch.testing.assert_close(ours(IDS), want, **CLOSE)
    torch.testing.assert_close(ours.train()(IDS), want, **CLOSE)


def test_loading_the_models_own_base_in_eval_mode_is_no_reason_to_warn() -> None:
    """A trainer that loads its best checkpoint: in eval mode, and marks were lost on the way."""
    model = everything(OURS).eval()
    best, want, before = without_a_mark(model.state_dict()), model(IDS), base(copy.deepcopy(model).train())
    model.train()
    randomise(model, seed=8)
    model.eval()
    assert not torch.allclose(model(IDS), want)
    model.load_state_dict(best)
    torch.testing.assert_close(model(IDS), want, **CLOSE)
    assert same_bits(base(model.train()), before)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_factors_alone_go_both_ways(mode: bool, bias: str) -> None:
    """Saved and loaded in any mode; in loralib, loading while merged leaves the model without ΔW."""
    for trained, fresh in ((OURS, ORIGINAL), (ORIGINAL, OURS), (OURS, OURS)):
        model, other = everything(trained), everything(fresh)
        want = model(IDS)
        randomise(other, seed=4)
        state = through_a_file(trained.lora_state_dict(model.train(mode), bias))
        other.train(mode or fresh is ORIGINAL)
        found = other.load_state_dict(state, strict=False)
        assert found.unexpected_keys == []
        assert {n for n in found.missing_keys if "lora_" in n} == set()
        for later in (mode, False, True):
            torch.testing.assert_close(other.train(later)(IDS), want, **CLOSE)


def test_a_plain_layers_weights_load_in_any_mode() -> None:
    for mode in (True, False):
        model = shaken(OURS, mode)
        plain = nn.Linear(18, 8)
        model.wide.load_state_dict(plain.state_dict(), strict=False)
        convolution = nn.Conv2d(1, 4, 3)
        model.image.conv.load_state_dict(convolution.state_dict())
        model.train()
        assert torch.equal(model.wide.weight, plain.weight)
        assert torch.equal(model.image.conv.weight, convolution.weight)


def test_assign() -> None:
    state = {n: v.clone() for n, v in everything(OURS, seed=5).state_dict().items()}
    want = everything(OURS, seed=5)(IDS)
    for mode in (True, False):
        model = everything(OURS).train(mode)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.load_state_dict(without_a_mark(state), assign=True)
        torch.testing.assert_close(model(IDS), want, **CLOSE)
        torch.testing.assert_close(model.train()(IDS), want, **CLOSE)


@pytest.mark.parametrize("mode", [True, False])
def test_copies_and_pickles(mode: bool) -> None:
    model = everything(OURS).train(mode)
    want, before = model(IDS), base(copy.deepcopy(model).train())
    file = io.BytesIO()
    torch.save(model, file)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]  # noqa: S301
    twins.append(torch.load(io.BytesIO(file.getvalue()), weights_only=False))
    for twin in twins:
        assert torch.equal(twin(IDS), want) and twin.wide.merged is not mode
        randomise(twin.train(), seed=9)
        assert not torch.allclose(twin(IDS), want), "a convolution's factors are the copy's own"
        assert not torch.allclose(twin.image(torch.ones(1, 1, 4, 4)), model.image(torch.ones(1, 1, 4, 4)))
        assert same_bits(base(twin), before)
    assert torch.equal(model(IDS), want)
    assert not hasattr(pickle.loads(pickle.dumps(model.plain)), "scaling")  # noqa: S301


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_conversions_while_merged(dtype: torch.dtype) -> None:
    model = everything(OURS)
    before = {n: v.to(dtype) for n, v in base(model).items()}
    want = model.to(torch.float64)(IDS)
    model.float().eval()
    assert model.to(dtype) is model and model.image.merged and model.image.conv.weight.dtype == dtype
    tolerance = 3e-2 if dtype is torch.bfloat16 else 5e-3
    torch.testing.assert_close(model(IDS).double(), want, rtol=tolerance, atol=tolerance)
    assert same_bits(base(model.train()), before)
    model.eval().image.conv.float()
    widened = base(model.train().image.conv)
    assert {v.dtype for v in widened.values()} == {torch.float32}
    assert all(torch.equal(v.to(dtype), before[f"image.conv.{n}"]) for n, v in widened.items())


def test_construction_in_half_precision_and_on_the_meta_device() -> None:
    layer = OURS.Linear(8, 8, r=2, dtype=torch.bfloat16)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.bfloat16
    with torch.device("meta"):
        model = everything(OURS)
    model.eval(), model.train()
    model.eval()
    assert not model.wide.merged
    filled = everything(OURS)
    model.load_state_dict(filled.state_dict(), assign=True)
    torch.testing.assert_close(model(IDS), filled(IDS), **CLOSE)
    assert model.eval().wide.merged


def test_reset_parameters_is_a_new_layer() -> None:
    for mode in (True, False):
        torch.manual_seed(6)
        fresh = [
            OURS.Linear(5, 7, r=2, fan_in_fan_out=True),
            OURS.MergedLinear(5, 8, r=2, enable_lora=[True, False], fan_in_fan_out=True),
            OURS.Conv2d(2, 4, 3, r=2),
            OURS.Embedding(5, 3, r=2),
        ]
        for layer in fresh:
            randomise(layer)
            layer.train(mode)
            # a new layer draws its weights twice, and only the second time counts
            torch.manual_seed(6)
            layer.reset_parameters()
            layer.train()
            got = {n: v.clone() for n, v in layer.state_dict().items()}
            torch.manual_seed(6)
            layer.reset_parameters()
            assert same_bits(got, dict(layer.state_dict()))
    bound = OURS.Linear(400, 4, fan_in_fan_out=True)
    bound.reset_parameters()
    assert bound.weight.abs().max() <= 1 / 20, "drawn from the fan-in"


def test_functional_calls() -> None:
    model, other = everything(OURS), everything(OURS, seed=3)
    values = {n: p.detach() * 1.0 for n, p in other.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(model, values, (IDS,)), other(IDS))


@pytest.mark.parametrize("mode", [True, False])
def test_torch_compile_traces_the_layers_without_a_break(mode: bool) -> None:
    model = everything(OURS).train(mode)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS), model(IDS))
    compiled(IDS).sum().backward() if mode else None
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", [True, False])
def test_grafts_own_verbs(mode: bool, tmp_path: Path) -> None:
    model = everything(OURS)
    want, before = model(IDS), base(model)
    model.train(mode)
    assert "7 sites" not in str(graft.verify(model, IDS)) and model.training is mode
    assert list(graft.state_dict(model)) == list(OURS.lora_state_dict(model))
    graft.export(model, tmp_path / "exported")
    assert same_bits(base(copy.deepcopy(model).train()), before)
    model.train()
    with graft.disabled(model):
        assert not torch.allclose(model(IDS), want)
        assert not model.eval().wide.merged
    torch.testing.assert_close(model(IDS), want, **CLOSE)
    model.train()
    graft.fuse(model)
    assert all(layer.merged for layer in model.modules() if hasattr(layer, "scaling"))
    from graft.tensors import open_checkpoint

    exported = open_checkpoint(tmp_path / "exported")
    assert same_bits({n: exported.read(n) for n in exported.entries}, base(model))
    graft.unfuse(model)
    graft.freeze(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == list(graft.state_dict(model))
    graft.unadapt(model)
    assert same_bits(dict(model.state_dict()), before)
    assert not any(isinstance(m, graft.Adapted) for m in model.modules())


def test_graft_save_and_load(tmp_path: Path) -> None:
    """loralib's file and PEFT's from a compat model, and back into one."""

    def make(seed: int) -> nn.Module:
        torch.manual_seed(1)
        model = nn.ModuleDict(
            {
                "wide": OURS.Linear(18, 8, r=2, lora_alpha=4),
                "qkv": OURS.MergedLinear(6, 18, 2, 4, enable_lora=[True, False, True]),
                "image": OURS.Conv2d(1, 4, 3, r=2, lora_alpha=4),
            }
        )
        randomise(model, seed)
        return model

    model = make(0)
    for format, path in (("peft", tmp_path / "peft"), ("loralib", tmp_path / "lora.pt")):
        graft.save(model, path, format=format, trained=False)
        other = make(5)
        options = {"alpha": 4} if format == "loralib" else {}
        if format == "loralib":
            state = torch.load(path, weights_only=True)
            assert same_bits(state, dict(OURS.lora_state_dict(model)))
            continue
        graft.load(other, path, replace=True, quiet=True, **options)
        for twin in (model, other):
            graft.fuse(twin)
        for name, value in base(model).items():
            torch.testing.assert_close(base(other)[name], value)
