"""graft.compat.deepspeed_chat against the originals' formulas, in one process."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graft
from graft.compat import deepspeed_chat as dschat
from graft.compat.deepspeed_chat import LinearLayer_LoRA
from tests.compat.dschat_reference import Plain, Reference, model, refer
from tests.laws.exact import fused

DTYPES = [torch.float32, torch.bfloat16]


def converted(dtype: torch.dtype = torch.float32, part: str = "layers.", **kwargs: Any) -> Plain:
    """A converted model whose factors are no longer zero."""
    m = dschat.convert_linear_layer_to_lora(model(dtype), part, **{"lora_dim": 3, **kwargs})
    torch.manual_seed(5)
    for layer in loras(m):
        nn.init.normal_(layer.lora_left_weight, std=0.2)
    return m


def loras(m: nn.Module) -> list[LinearLayer_LoRA]:
    return [layer for layer in m.modules() if isinstance(layer, LinearLayer_LoRA)]


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, 17, (4, 6), generator=torch.Generator().manual_seed(step))


def curve(m: nn.Module, steps: range) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2)
    losses: list[float] = []
    for step in steps:
        ids = batch(step)
        loss = nn.functional.cross_entropy(m(ids).flatten(0, 1).float(), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def bits(m: nn.Module) -> dict[str, bytes]:
    """Every parameter and buffer, byte for byte."""
    found = {**dict(m.named_parameters()), **dict(m.named_buffers())}
    return {n: t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for n, t in found.items()}


# --- names, first values, forward ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (LinearLayer_LoRA, "weight lora_dim=0 lora_scaling=1 lora_droppout=0 bias=None"),
        (
            dschat.convert_linear_layer_to_lora,
            "model part_module_name lora_dim=0 lora_scaling=1 lora_droppout=0",
        ),
        (dschat.convert_lora_to_linear_layer, "model fuse_lora=True"),
        (dschat.fuse_lora, "model"),
        (dschat.unfuse_lora, "model"),
        (dschat.only_optimize_lora_parameters, "model force_optimize_params=()"),
        (dschat.make_model_gradient_checkpointing_compatible, "model"),
        (dschat._z3_params_to_fetch, "param_list"),
        (dschat.save_zero_three_model, "model_ema global_rank save_dir zero_stage=0 sub_folder="),
        (dschat.save_hf_format, "model tokenizer args sub_folder="),
        (dschat.recursive_getattr, "model module_name"),
        (dschat.recursive_setattr, "model module_name module"),
    ],
)
def test_signatures(function: Any, wanted: str) -> None:
    parameters = inspect.signature(function).parameters.values()
    said = [p.name + ("" if p.default is p.empty else f"={p.default}") for p in parameters]
    assert " ".join(said) == wanted


def test_the_layer_alone() -> None:
    linear = nn.Linear(5, 7)
    torch.manual_seed(3)
    layer = LinearLayer_LoRA(linear.weight, 2, 6, 0.5, linear.bias)
    torch.manual_seed(3)
    want = Reference(linear, 2, 6, 0.5)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert layer.lora_right_weight.shape == (5, 2) and layer.lora_left_weight.shape == (2, 7)
    assert torch.equal(layer.lora_right_weight, want.right) and not layer.lora_left_weight.any()
    assert layer.lora_right_weight.abs().max() <= 1 / math.sqrt(2)
    assert layer.lora_scaling == 3.0 and layer.fuse_lora is False
    assert not layer.weight.requires_grad and layer.bias.requires_grad
    assert list(layer.state_dict()) == ["weight", "bias", "lora_right_weight", "lora_left_weight"]
    assert isinstance(layer.lora_dropout, nn.Dropout) and layer.lora_dropout.p == 0.5
    assert layer.eval() is layer and not layer.lora_dropout.training
    assert "LinearLayer_LoRA" in repr(layer)
    plain = LinearLayer_LoRA(nn.Linear(5, 7).weight, 4)
    assert plain.bias is None and isinstance(plain.lora_dropout, nn.Identity) and plain.lora_scaling == 0.25


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.floats(0.1, 9), st.booleans(), st.booleans(),
    st.sampled_from(DTYPES),
)  # fmt: skip
def test_forward_and_gradients_are_the_formula(
    wide: int, out: int, rank: int, scaling: float, bias: bool, drop: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(rank)
    linear = nn.Linear(wide, out, bias=bias).to(dtype)
    ours = nn.Sequential(copy.deepcopy(linear))
    torch.manual_seed(1)
    theirs = Reference(linear, rank, scaling, 0.3 * drop)
    torch.manual_seed(1)
    dschat.convert_linear_layer_to_lora(ours, "0", rank, scaling, 0.3 * drop)
    (layer,) = loras(ours)
    left = torch.randn(rank, out).to(dtype)
    x = torch.randn(2, 3, wide).to(dtype)
    found: list[list[torch.Tensor]] = []
    pairs = ((theirs.right, theirs.left), (layer.lora_right_weight, layer.lora_left_weight))
    for m, pair in zip((theirs, layer), pairs, strict=True):
        pair[1].data.copy_(left)
        torch.manual_seed(2)
        y = m(x)
        y.square().sum().backward()
        found.append([y, *(p.grad for p in pair if p.grad is not None)])
    assert len(found[0]) == len(found[1]) == 3
    for want, got in zip(*found, strict=True):
        assert torch.equal(want, got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_loss_curve_is_the_originals(dtype: torch.dtype, dropout: float) -> None:
    theirs, ours = model(dtype), model(dtype)
    torch.manual_seed(7)
    refer(theirs, "layers.", 4, 2, dropout)
    torch.manual_seed(7)
    assert dschat.convert_linear_layer_to_lora(ours, "layers.", 4, 2, dropout) is ours
    for m in (theirs, ours):
        m.embed.requires_grad_(False)
    torch.manual_seed(8)
    want = curve(theirs, range(12))
    torch.manual_seed(8)
    got = curve(ours, range(12))
    assert got == pytest.approx(want, abs=1e-6 if dtype == torch.float32 else 5e-3)
    assert abs(want[0] - want[-1]) > 0.05


# --- fuse and unfuse ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_fused_is_the_sum_rounded_once_and_every_bit_comes_back(dtype: torch.dtype) -> None:
    m = converted(dtype, lora_scaling=2)
    before = bits(m)
    # layer → W, ΔW as the originals compute it, and W + ΔW in rationals
    want = {}
    for layer in loras(m):
        w, right, left = (
            t.detach().clone() for t in (layer.weight, layer.lora_right_weight, layer.lora_left_weight)
        )
        scale = layer.lora_scaling
        want[layer] = w, scale * (left.t() @ right.t()), fused(w, left.t(), right.t(), scale)
    for _ in range(30):
        assert dschat.fuse_lora(m) is m
        assert all(
            layer.fuse_lora and torch.equal(layer.weight, exact) for layer, (*_, exact) in want.items()
        )
        assert dschat.unfuse_lora(m) is m
        assert bits(m) == before
    # what this would miss if fusing and unfusing added and subtracted, as the originals do
    assert any(not torch.equal(w + naive - naive, w) for w, naive, _ in want.values())


def test_training_goes_on_as_if_nothing_had_been_fused() -> None:
    plain, cycled = converted(), converted()
    want = [loss for n in range(3) for loss in curve(plain, range(4 * n, 4 * n + 4))]
    got: list[float] = []
    for n in range(3):
        got += curve(cycled, range(4 * n, 4 * n + 4))
        dschat.unfuse_lora(dschat.fuse_lora(cycled))
    assert got == want


def test_a_fused_model_computes_what_it_did() -> None:
    m = converted().eval()
    want = m(batch(0))
    dschat.convert_lora_to_linear_layer(m)
    assert torch.allclose(m(batch(0)), want, atol=1e-5) and not torch.equal(m(batch(0)), want)
    dschat.convert_lora_to_linear_layer(m, fuse_lora=False)
    assert torch.equal(m(batch(0)), want)


def test_one_layer_fuses_alone_and_flags_follow() -> None:
    m = converted()
    first, *rest = loras(m)
    first.fuse_lora_weight()
    first.fuse_lora_weight()
    assert first.fuse_lora and not any(layer.fuse_lora for layer in rest)
    dschat.fuse_lora(m)
    dschat.unfuse_lora(m)
    first.unfuse_lora_weight()
    assert not first.fuse_lora and bits(m) == bits(converted())


def test_a_model_without_lora_is_returned_as_it_is() -> None:
    m = model()
    assert dschat.fuse_lora(m) is m and dschat.unfuse_lora(m) is m


def test_what_would_not_come_back_is_refused() -> None:
    m = converted()
    first = loras(m)[0]
    dschat.fuse_lora(m)
    with pytest.raises(graft.StateError, match="is fused, so training"):
        m.train()(batch(0))
    with pytest.raises(graft.StateError, match="unfuse_lora_weight"):
        first.reset_parameters()
    with pytest.raises(AttributeError):
        first.fuse_lora = False
    scale = first.lora_scaling
    first.lora_scaling = 7
    with pytest.raises(graft.StateError, match="another than at fuse"):
        dschat.unfuse_lora(m)
    first.lora_scaling = scale
    saved = m.state_dict()
    dschat.unfuse_lora(m)
    with pytest.raises(graft.StateError, match="was fused when this state dict was saved"):
        m.load_state_dict(saved)


# --- which layers -------------------------------------------------------------------------------------


def test_a_part_of_the_name_chooses() -> None:
    m = dschat.convert_linear_layer_to_lora(model(), "s.1.", 2)
    names = {n for n, layer in m.named_modules() if isinstance(layer, LinearLayer_LoRA)}
    assert names == {"layers.1.q_proj", "layers.1.flora_gate", "layers.1.down_proj"}
    dschat.convert_linear_layer_to_lora(m, "q_proj", 5)  # the other one; the first keeps its rank
    assert [layer.lora_right_weight.shape[1] for layer in loras(m)] == [5, 2, 2, 2]


def _parametrised(m: Plain) -> None:
    nn.utils.parametrizations.weight_norm(m.layers[0].q_proj)


class _Loud(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def _own_forward(m: Plain) -> None:
    m.layers[0].q_proj = _Loud(12, 12)


def _adapted(m: Plain) -> None:
    graft.adapt(m, ["0.q_proj"], quiet=True)


@pytest.mark.parametrize(
    ("part", "change", "arguments", "says"),
    [
        ("model.layers.", None, {}, "no nn.Linear's name contains 'model.layers.'; linears are layers."),
        ("layers.", None, {"lora_dim": 0}, "lora_dim=0"),
        ("layers.", None, {"lora_droppout": -0.5}, "lora_droppout=-0.5"),
        ("head", None, {}, "its weight is embed.weight too"),
        ("q_proj", _parametrised, {}, "its weight is not a parameter"),
        ("q_proj", _own_forward, {}, "_Loud has a forward of its own"),
        ("q_proj", _adapted, {}, "it has an adapter of graft.adapt"),
    ],
)
def test_what_cannot_be_converted_is_named(part: str, change: Any, arguments: Any, says: str) -> None:
    m = model()
    if change is not None:
        change(m)
    before = [(n, type(layer)) for n, layer in m.named_modules()]
    with pytest.raises(graft.TargetError) as error:
        dschat.convert_linear_layer_to_lora(m, part, **{"lora_dim": 2, **arguments})
    assert says in str(error.value)
    assert [(n, type(layer)) for n, layer in m.named_modules()] == before


def test_converting_again_is_said() -> None:
    with pytest.raises(graft.TargetError, match=r"all 6 linears whose names contain 'layers\.' are LoRA"):
        dschat.convert_linear_layer_to_lora(converted(), "layers.", 9)


def test_a_layer_at_two_paths_is_one_layer() -> None:
    m = model()
    m.layers[1].q_proj = m.layers[0].q_proj
    dschat.convert_linear_layer_to_lora(m, "0.q_proj", 2)
    assert m.layers[1].q_proj is m.layers[0].q_proj and isinstance(m.layers[1].q_proj, LinearLayer_LoRA)


def test_the_linear_inside_of_attention_trains() -> None:
    torch.manual_seed(0)
    m = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True))
    with pytest.raises(graft.TargetError, match="reads its weight itself"):
        dschat.convert_linear_layer_to_lora(m, "out_proj", 2, lora_droppout=0.1)
    dschat.convert_linear_layer_to_lora(m, "out_proj", 2)
    (layer,) = loras(m)
    x = torch.randn(2, 3, 8)
    plain = m[0](x, x, x)[0]
    nn.init.ones_(layer.lora_left_weight)
    y = m[0](x, x, x)[0]
    y.sum().backward()
    assert layer.lora_right_weight.grad is not None and layer.lora_right_weight.grad.any()
    assert not torch.allclose(y, plain)
    m.eval()
    want = m[0](x, x, x)[0]
    dschat.fuse_lora(m)
    assert torch.allclose(m[0](x, x, x)[0], want, atol=1e-6)


def test_only_the_factors_train() -> None:
    m = converted()
    assert dschat.only_optimize_lora_parameters(m, ["layers.0.norm.weight"]) is m
    trained = {n for n, p in m.named_parameters() if p.requires_grad}
    factors = {n for n in dict(m.named_parameters()) if n.endswith(("lora_left_weight", "lora_right_weight"))}
    assert trained == {*factors, "layers.0.norm.weight"} and len(factors) == 12
    with pytest.raises(graft.TargetError, match=r"called 'layers\.0\.nrom\.weight'; nearest: layers"):
        dschat.only_optimize_lora_parameters(m, ["layers.0.nrom.weight"])
    with pytest.raises(graft.StateError, match="no LoRA layer"):
        dschat.only_optimize_lora_parameters(model())


def test_gradient_checkpointing() -> None:
    class Reward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model()
            self.inner.get_input_embeddings = lambda: self.inner.embed  # type: ignore[method-assign]

    reward = Reward()
    reward.requires_grad_(False)
    assert dschat.make_model_gradient_checkpointing_compatible(reward) is reward
    assert reward.inner.embed(batch(0)).requires_grad
    with pytest.warns(UserWarning, match="use_reentrant=False"):
        dschat.make_model_gradient_checkpointing_compatible(nn.Linear(2, 2))


def test_dotted_names() -> None:
    m = model()
    assert dschat.recursive_getattr(m, "layers.1.norm.weight") is m.layers[1].norm.weight
    norm = nn.LayerNorm(12)
    dschat.recursive_setattr(m, "layers.1.norm", norm)
    dschat.recursive_setattr(m, "head", norm)
    assert m.layers[1].norm is norm and m.head is norm


# --- with the rest of Graft ---------------------------------------------------------------------------


def test_state_dicts_load_in_both_directions() -> None:
    m = converted()
    theirs = refer(model(), "layers.", 3)
    named = [re.sub(r"\.(right|left)$", r".lora_\1_weight", name) for name in theirs.state_dict()]
    assert list(m.state_dict()) == named
    again = dschat.convert_linear_layer_to_lora(model(), "layers.", 3)
    again.load_state_dict(m.state_dict(), strict=True)
    assert bits(again) == bits(m)


def test_copies_are_their_own() -> None:
    m = converted()
    for copied in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):  # noqa: S301
        dschat.fuse_lora(copied)
        assert bits(m) == bits(converted()) and not loras(m)[0].fuse_lora
        dschat.unfuse_lora(copied)
        assert bits(copied) == bits(m)


def test_unadapt_gives_plain_linears() -> None:
    m = converted()
    dschat.fuse_lora(m)
    graft.unadapt(m)
    assert bits(m) == bits(model())
    assert [(n, type(x)) for n, x in m.named_modules()] == [(n, type(x)) for n, x in model().named_modules()]


def test_a_failed_adapt_leaves_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    m = converted()
    want, parameters, modules = m(batch(0)), dict(m.named_parameters()), dict(m.named_modules())
    monkeypatch.setattr("graft.adapting.new_factors", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        graft.adapt(m, ["embed"], quiet=True)
    for now, before in (
        (dict(m.named_parameters()), parameters),
        (dict(m.named_modules()), modules),
    ):
        assert list(now) == list(before) and all(now[name] is value for name, value in before.items())
    assert len(loras(m)) == 6 and torch.equal(m(batch(0)), want) and bits(m) == bits(converted())


def test_the_adapter_is_a_plain_lora(tmp_path: Any) -> None:
    """Saved in PEFT's form it is what graft.adapt would have made; loaded, it is the same factors."""
    m = converted(lora_scaling=2)
    graft.verify(m, batch(0))
    graft.save(m, tmp_path / "adapter", trained=False)
    plain = model()
    graft.load(plain, tmp_path / "adapter", quiet=True)
    q = plain.layers[0].q_proj
    assert torch.equal(q.lora_A, loras(m)[0].lora_right_weight.T)
    assert torch.equal(q.lora_B, loras(m)[0].lora_left_weight.T)
    assert torch.allclose(plain(batch(0)), m(batch(0)), atol=1e-6)
    graft.fuse(plain)
    dschat.fuse_lora(m)
    assert torch.equal(q.weight, loras(m)[0].weight)
    dschat.unfuse_lora(m)
    again = dschat.convert_linear_layer_to_lora(model(), "layers.", 3, 2)
    graft.load(again, tmp_path / "adapter", quiet=True)
    assert bits(again) == bits(m)
    names = list(graft.state_dict(m))
    assert names[:2] == ["layers.0.q_proj.lora_right_weight", "layers.0.q_proj.lora_left_weight"]


def test_factors_are_no_targets() -> None:
    with pytest.raises(graft.TargetError, match="matches nothing"):
        graft.adapt(converted(), "*.lora_right_weight", quiet=True)
