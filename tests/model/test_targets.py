"""Patterns: what they match, what they must not, and what a user is told."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import graft
from graft.attach import sites


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({n: nn.Linear(8, 8) for n in ("q_proj", "k_proj", "v_proj")})
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x) for layer in self.self_attn.values())
        return x + self.mlp(self.norm(q * k + v))


class Net(nn.Module):
    def __init__(self, layers: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.lm_head = nn.Linear(8, 20, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def adapted(targets: Any, **options: Any) -> list[str]:
    model = Net()
    graft.adapt(model, targets, rank=2, quiet=True, **options)
    return list(sites(model))


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("q_proj", 12),
        (["q_proj", "v_proj"], 24),
        ("self_attn.q_proj", 12),
        ("layers.1.self_attn.q_proj", 1),
        ("*.1.*.q_proj", 1),
        ("layers.1.*.q_proj", 1),
        ("layers.1?.*.q_proj", 2),
        ("layers.[0-3].mlp", 4),
        ("re:layers\\.(1|10)\\..*_proj", 6),
        (re.compile(r".*(embed|head)"), 2),
        ("layers.3.mlp.weight", 1),
        ("all-linear", 48),
        (["all-linear", "lm_head"], 49),
        ("lm_head", 1),
    ],
)
def test_patterns_match_what_they_say(targets: Any, count: int) -> None:
    assert len(adapted(targets)) == count


def test_dots_are_literal_and_layer_1_is_not_layer_10() -> None:
    assert adapted("layers.1.*.q_proj") == ["layers.1.self_attn.q_proj.weight"]
    assert adapted("re:layers.1.self_attn.q_proj") == ["layers.1.self_attn.q_proj.weight"]


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("q_porj", "q_proj"),
        ("layers.99.mlp", "mlp"),
        (["q_proj", "up_proj"], "'up_proj' matches nothing"),
        ("self_attn", "without a weight to adapt; inside it are layers.0.self_attn.q_proj"),
        ("norm", "LayerNorm without a weight to adapt"),
        ("re:(", "not a regular expression"),
        ([], "no targets"),
        ([3], "got 3"),
        ("", "got ''"),
    ],
)
def test_what_matches_nothing_is_an_error_with_the_nearest_names(targets: Any, said: str) -> None:
    model = Net(2)
    with pytest.raises(graft.TargetError, match=re.escape(said)):
        graft.adapt(model, targets, quiet=True)
    assert not any(isinstance(m, graft.Adapted) for m in model.modules())


def test_every_fault_is_in_one_message() -> None:
    with pytest.raises(graft.TargetError) as error:
        graft.adapt(Net(1), ["q_porj", "k_porj"], exclude="v_porj", quiet=True)
    assert all(name in str(error.value) for name in ("q_porj", "k_porj", "exclude: 'v_porj'"))


def test_exclude() -> None:
    model = Net(3)
    report = graft.adapt(model, "all-linear", exclude=["mlp", "layers.0"], quiet=True)
    assert len(report.sites) == 6 and len(report.excluded) == 6
    assert str(report).startswith("6 of 12 targets, ")
    with pytest.raises(graft.TargetError, match="leaves none"):
        graft.adapt(Net(1), "mlp", exclude="mlp", quiet=True)


def test_first_matching_pattern_decides_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    model = Net(2)
    targets = {"layers.0.*.q_proj": {"rank": 1}, "q_proj": {"rank": 3, "alpha": 12}, "mlp": {}}
    graft.adapt(model, targets, rank=5, rslora=False)
    ranks = {n: m.graft_slots[p].site.options.rank for n, (m, p) in sites(model).items()}
    assert [ranks[f"layers.{i}.self_attn.q_proj.weight"] for i in (0, 1)] == [1, 3]
    assert ranks["layers.1.mlp.weight"] == 5
    assert model.layers[1].self_attn["q_proj"].graft_slots["weight"].site.scale == 4.0
    assert re.match(
        r"4 of 4 targets, \d+ of 1\.\dk parameters train \(\d+\.\d\d %\)", capsys.readouterr().out
    )
    with pytest.raises(graft.TargetError, match="unknown option 'rnk'"):
        graft.adapt(Net(1), {"mlp": {"rnk": 3}}, quiet=True)


def test_applying_twice_is_refused_or_replaces_but_never_nests() -> None:
    model = Net(1)
    graft.adapt(model, "mlp", rank=2, quiet=True)
    old = model.layers[0].mlp.lora_A
    with pytest.raises(graft.TargetError, match="replace=True"):
        graft.adapt(model, ["mlp", "q_proj"], quiet=True)
    assert model.layers[0].mlp.lora_A is old and len(sites(model)) == 1
    graft.adapt(model, ["mlp", "q_proj"], rank=3, replace=True, quiet=True)
    assert model.layers[0].mlp.lora_A.shape == (3, 8) and len(sites(model)) == 2
    assert type(model.layers[0].mlp).__mro__.count(graft.Adapted) == 1
    assert not isinstance(model.layers[0].mlp.weight, graft.Linear)
    graft.fuse(model)
    with pytest.raises(graft.TargetError, match=r"fused; call graft\.unfuse"):
        graft.adapt(model, "mlp", replace=True, quiet=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank must be"),
        ({"rank": 2.0}, "rank must be"),
        ({"rank": True}, "rank must be"),
        ({"alpha": float("nan")}, "alpha must be"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"dropout_position": "before"}, "dropout_position must be"),
        ({"init": "ones"}, "init must be"),
        ({"dtype": torch.int8}, "floating-point"),
        ({"bias": "some"}, "bias must be"),
        ({"train": "clasifier"}, "train: 'clasifier' matches nothing"),
        ({"layout": graft.Layout("(g o) i", 3)}, "do not divide"),
    ],
)
def test_bad_options_change_nothing(options: dict[str, Any], said: str) -> None:
    model = Net(1)
    with pytest.raises(graft.GraftError, match=re.escape(said)):
        graft.adapt(model, "mlp", quiet=True, **options)
    assert not any(isinstance(m, graft.Adapted) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_a_failure_half_way_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
    with pytest.raises(graft.TargetError, match="dropout"):
        graft.adapt(model, ["0", "1"], dropout=0.1, quiet=True)
    assert [type(m) for m in model] == [nn.Linear, nn.LSTM]
    assert list(model.state_dict()) == list(nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4)).state_dict())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nn.Embedding(8, 4, max_norm=1.0), "max_norm"),
        (lambda: nn.LazyLinear(4), "has no shape yet"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "without a weight to adapt"),
    ],
)
def test_weights_that_cannot_be_adapted_are_named(make: Any, said: str) -> None:
    with pytest.raises(graft.TargetError, match=said):
        graft.adapt(nn.Sequential(make()), "0", quiet=True)


def test_a_quantised_weight_is_refused() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)

    with pytest.raises(graft.TargetError, match=r"torch\.uint8 \(quantised\)"):
        graft.adapt(nn.Sequential(Quantised()), "0", quiet=True)


def test_a_forward_replaced_on_the_instance_is_refused() -> None:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(graft.TargetError, match="forward replaced"):
        graft.adapt(layer, "weight", quiet=True)
