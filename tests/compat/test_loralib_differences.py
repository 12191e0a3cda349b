"""Where loralib fails or is silently wrong: shown on it, and what ours does instead."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graft
from graft.errors import TargetError

from .loralib_models import IDS, ORIGINAL, OURS, base, everything, randomise, same_bits


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [2, 3])
def test_convolutions_of_every_dimension(axes: int, groups: int, kernel: int) -> None:
    layer = getattr(OURS, f"Conv{axes}d")(4, 6, kernel, r=2, lora_alpha=3, groups=groups, padding=1)
    theirs = getattr(ORIGINAL, f"Conv{axes}d")(4, 6, kernel, r=2, groups=groups, padding=1)
    x = torch.randn(2, 4, *[5, 4, 3][:axes])
    assert layer.lora_A.shape == theirs.lora_A.shape
    if axes != 2:
        with pytest.raises(RuntimeError, match="invalid for input"):
            theirs(x)
    randomise(layer)
    weight = layer.conv.weight
    delta = 1.5 * (layer.lora_B @ layer.lora_A).view(weight.shape)
    want = getattr(F, f"conv{axes}d")(x, weight + delta, layer.conv.bias, padding=1, groups=groups)
    y = layer(x)
    torch.testing.assert_close(y, want)
    y.sum().backward()
    assert layer.lora_A.grad.abs().sum() > 0 and layer.lora_B.grad.abs().sum() > 0
    before = base(layer)
    torch.testing.assert_close(layer.eval()(x), want, rtol=1e-4, atol=1e-5)
    assert same_bits(base(layer.train()), before)


def test_kernels_with_several_numbers() -> None:
    layer = OURS.Conv2d(2, 4, (3, 3), r=2)
    assert layer.lora_A.shape == (6, 6) and layer(torch.ones(1, 2, 4, 4)).shape == (1, 4, 2, 2)
    with pytest.raises(TargetError, match=r"kernel_size=\(3, 1\)"):
        OURS.Conv2d(2, 4, (3, 1), r=2)


def test_merged_linear_without_an_enabled_block() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(AttributeError):
        ORIGINAL.MergedLinear(4, 6, r=2)(x)
    layer = OURS.MergedLinear(4, 6, r=2)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert layer.weight.requires_grad and layer.eval().merged
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_enable_lora_may_be_numbers() -> None:
    """loralib takes 0 and 1 for indices."""
    x = torch.randn(2, 4)
    theirs = ORIGINAL.MergedLinear(4, 6, r=2, enable_lora=[1, 0, 1])
    assert theirs.lora_ind.tolist() == [True] * 4 + [False] * 2
    flags, numbers = (OURS.MergedLinear(4, 6, r=2, enable_lora=on) for on in ([True, False, True], (1, 0, 1)))
    numbers.load_state_dict(flags.state_dict())
    randomise(flags), randomise(numbers)
    assert torch.equal(flags(x), numbers(x)) and numbers.enable_lora == [True, False, True]
    with pytest.raises(TargetError, match="out_features=6"):
        OURS.MergedLinear(4, 6, r=2, enable_lora=[True] * 4)


def test_embeddings_keep_the_weight_that_they_are_given() -> None:
    weight = torch.randn(5, 3)
    given = weight.clone()
    ORIGINAL.Embedding.from_pretrained(given)
    assert not torch.equal(given, weight), "loralib overwrites its user's tensor"
    assert torch.equal(OURS.Embedding.from_pretrained(weight.clone()).weight, weight)
    layer = OURS.Embedding(5, 3, r=2, _weight=weight.clone())
    assert (
        torch.equal(layer.weight, weight) and layer.lora_B.abs().sum() > 0 and layer.lora_A.abs().sum() == 0
    )


def test_embeddings_with_options_of_gradients() -> None:
    for options in ({"scale_grad_by_freq": True}, {"sparse": True}):
        layer = OURS.Embedding(9, 4, r=2, **options)
        randomise(layer)
        y = layer(torch.tensor([1, 1, 3]))
        want = (layer.weight + layer.scaling * (layer.lora_B @ layer.lora_A).T)[[1, 1, 3]]
        torch.testing.assert_close(y, want)
        y.sum().backward()
        assert layer.lora_A.grad is not None and not layer.lora_A.grad.is_sparse
    with pytest.raises(TargetError, match="max_norm"):
        OURS.Embedding(9, 4, r=2, max_norm=1.0)
    OURS.Embedding(9, 4, max_norm=1.0)


def test_what_loralib_cannot_copy() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(ORIGINAL.Linear(2, 2))
    assert ORIGINAL.Linear(2, 2).eval() is None
    layer = OURS.Linear(2, 2)
    assert layer.eval() is layer and pickle.loads(pickle.dumps(layer)).r == 0  # noqa: S301


def test_loralib_changes_the_base_and_ours_does_not() -> None:
    ours, theirs = everything(OURS).bfloat16(), everything(ORIGINAL).bfloat16()
    mine, other = base(ours), base(theirs)
    for _ in range(3):
        for model in (ours, theirs):
            model.eval(), model.train()
    assert same_bits(base(ours), mine) and not same_bits(base(theirs), other)


def test_factors_of_another_dtype() -> None:
    layer = OURS.Linear(8, 8, r=2).bfloat16()
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.float(), layer.lora_B.data.float()
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16 and layer.eval()(x).dtype == torch.bfloat16


def test_edits_while_merged_are_refused_and_a_whole_state_dict_mends() -> None:
    x = torch.randn(2, 4)
    for edit in ("weight", "lora_B"):
        layer = OURS.Linear(4, 4, r=2)
        randomise(layer)
        good = copy.deepcopy(layer.state_dict())
        want = layer(x)
        layer.eval()
        getattr(layer, edit).data.add_(1.0)
        for step in (layer.train, layer.state_dict, layer.half):
            with pytest.raises(graft.StateError, match=r"changed while|edited after"):
                step()
        with pytest.raises(graft.StateError):
            layer.load_state_dict(OURS.lora_state_dict(layer), strict=False)
        layer.load_state_dict(good)
        torch.testing.assert_close(layer(x), want)
        torch.testing.assert_close(layer.train()(x), want)
    layer.eval().lora_A.data.add_(1.0)
    with pytest.raises(graft.StateError, match="changed while"):
        layer.eval()


def test_merged_is_told_not_set() -> None:
    layer = OURS.Linear(4, 4, r=2)
    layer.merged = False
    with pytest.raises(graft.StateError, match=r"merged=True .* does not hold ΔW"):
        layer.merged = True
    with pytest.raises(graft.StateError, match="holds ΔW"):
        layer.eval().merged = False
    layer.r = 2
    with pytest.raises(graft.StateError, match=r"r=0 .* rank 2"):
        layer.r = 0


def test_a_sum_beyond_the_range_leaves_the_weight_unmerged() -> None:
    layer = OURS.Linear(4, 4, r=2, dtype=torch.float16)
    with torch.no_grad():
        layer.weight.fill_(60000.0), layer.lora_A.fill_(100.0), layer.lora_B.fill_(100.0)
    before = base(layer)
    with pytest.raises(graft.StateError, match="beyond the range"):
        layer.eval()
    assert same_bits(base(layer), before) and not layer.merged


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": -1}, "r=-1"),
        ({"r": 1.5}, "r=1.5"),
        ({"r": 2, "lora_dropout": -0.1}, "lora_dropout=-0.1"),
        ({"r": 2, "lora_alpha": "8"}, "lora_alpha='8'"),
        ({"r": 2, "lora_alpha": float("nan")}, "alpha"),
    ],
)
def test_arguments_outside_their_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        OURS.Linear(4, 4, **arguments)


def test_scaling_is_a_number() -> None:
    layer = OURS.Linear(4, 4, r=2)
    with pytest.raises(TargetError, match="scaling must be a number"):
        layer.scaling = torch.ones(())


def test_an_unknown_bias_is_refused_before_anything_is_frozen() -> None:
    model = everything(OURS)
    before = [p.requires_grad for p in model.parameters()]
    for call in (OURS.mark_only_lora_as_trainable, OURS.lora_state_dict):
        for kind in (TargetError, NotImplementedError):
            with pytest.raises(kind, match="bias='some'"):
                call(model, "some")
    assert [p.requires_grad for p in model.parameters()] == before


def test_lora_only_means_every_layers_bias() -> None:
    model = everything(OURS)
    OURS.mark_only_lora_as_trainable(model, bias="lora_only")
    biases = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert biases == {
        "qkv.bias",
        "wide.bias",
        "plain.bias",
        "image.conv.bias",
        "grouped.conv.bias",
        "line.conv.bias",
    }
    saved = OURS.lora_state_dict(model, bias="lora_only")
    assert {n for n in saved if "lora_" not in n} == biases
    other = everything(ORIGINAL)
    assert other.load_state_dict(saved, strict=False).unexpected_keys == []


class Odd(nn.Module):
    """Names in which loralib's words are parts of longer ones."""

    def __init__(self) -> None:
        super().__init__()
        self.flora_gate, self.unbiased = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
        self.relative_attention_bias = nn.Embedding(2, 2)
        self.query = OURS.Linear(2, 2, r=1)


def test_loralibs_words_inside_longer_ones_are_told() -> None:
    model = Odd()
    with pytest.warns(UserWarning) as said:
        OURS.mark_only_lora_as_trainable(model, "all")
    assert [str(w.message).split(": ")[0] for w in said] == [
        "flora_gate.weight, flora_gate.bias",
        "unbiased.weight",
    ]
    assert model.unbiased.weight.requires_grad and model.flora_gate.weight.requires_grad, "as in loralib"


def test_dropout_of_a_convolution_is_told() -> None:
    with pytest.warns(UserWarning, match=r"lora_dropout=0.3 .* no effect"):
        OURS.Conv2d(2, 2, 1, r=1, lora_dropout=0.3)


class Tied(nn.Module):
    def __init__(self, lora: Any, **options: Any) -> None:
        super().__init__()
        self.wte = lora.Embedding(9, 4, r=2, **options)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.wte.weight


def test_a_tied_weight_is_told() -> None:
    model = Tied(OURS)
    with pytest.warns(UserWarning, match=r"head.weight = wte.weight is one tied weight"):
        OURS.mark_only_lora_as_trainable(model)
    OURS.mark_only_lora_as_trainable(Tied(OURS, merge_weights=False))
    shared = nn.ModuleList([OURS.Linear(2, 2, r=1)] * 2)
    OURS.mark_only_lora_as_trainable(shared)


class Attention(nn.Module):
    """Modules of torch that read the weight of a child themselves."""

    def __init__(self, lora: Any, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.attend.out_proj = lora.Linear(8, 8, r=2, merge_weights=False, **options)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
        self.layer.linear1 = lora.Linear(8, 12, r=2, merge_weights=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.attend(x, x, x)[0])


def test_modules_that_read_a_childs_weight() -> None:
    x = torch.randn(1, 3, 8)
    theirs, ours = Attention(ORIGINAL), Attention(OURS)
    for lora, model in ((ORIGINAL, theirs), (OURS, ours)):
        lora.mark_only_lora_as_trainable(model)
        randomise(model)
        model(x).sum().backward()
    assert theirs.attend.out_proj.lora_B.grad is None and ours.attend.out_proj.lora_B.grad.abs().sum() > 0
    graft.verify(ours, x)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), ours.train()(x))
    with pytest.warns(UserWarning, match="lora_dropout has no effect there"):
        OURS.mark_only_lora_as_trainable(Attention(OURS, lora_dropout=0.1))


def test_a_backward_through_a_forward_before_the_merge_is_an_error() -> None:
    model = everything(OURS)
    y = model(IDS)
    model.eval(), model.train()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_padding_row_gives_no_gradient() -> None:
    layer = OURS.Embedding(5, 3, r=2, padding_idx=1)
    randomise(layer)
    layer(torch.tensor([1])).sum().backward()
    assert layer.lora_A.grad.abs().sum() == 0 and layer.lora_B.grad.abs().sum() == 0
