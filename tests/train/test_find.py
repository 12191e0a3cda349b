"""Which part of a trainer's module is exported."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import graft
from graft.train.find import find, trained_outside
from tests.checkpoints import models


class Harness(nn.Module):
    """Code around models, as a LightningModule is."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def llama() -> nn.Module:
    return models.llama()


def adapted() -> nn.Module:
    model = llama()
    graft.adapt(model, ["q_proj"], quiet=True)
    return model


def plain(targets: str = "") -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    if targets:
        graft.adapt(model, targets, quiet=True)
    return model


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda: Harness(net=adapted(), teacher=llama(), head=nn.Linear(2, 2)), "net"),
        (lambda: Harness(vlm=Harness(vision=llama(), language=adapted())), "vlm.language"),
        (lambda: Harness(body=plain("1.0"), head=plain()), "body"),
        (lambda: Harness(body=Harness(deep=plain("1.*"), other=plain("0"))), "body"),
        (adapted, ""),
    ],
)
def test_the_one_adapted_part(make: Any, path: str) -> None:
    root = make()
    assert find(root, None, harness=True) is root.get_submodule(path)


def test_the_one_that_peft_adapted() -> None:
    root = Harness(net=models.with_peft(llama(), r=2, target_modules=["q_proj"]), teacher=llama())
    assert find(root, None, harness=True) is root.net


def test_one_model_under_two_names() -> None:
    root = Harness(net=adapted())
    root.again = root.net
    assert find(root, None, harness=True) is root.net


def test_a_model_that_is_itself_adapted() -> None:
    layer = nn.Linear(3, 3)
    graft.adapt(Harness(inner=layer), "inner", quiet=True)
    assert find(layer, None, harness=True) is layer


def test_the_trainers_model_is_the_whole_one() -> None:
    root = Harness(net=adapted())
    assert find(root, None, harness=False) is root
    assert find(root, "net", harness=False) is root.net


def test_several_parts_need_a_name() -> None:
    root = Harness(actor=adapted(), critic=adapted())
    with pytest.raises(graft.TargetError, match=r'2 adapted parts, actor, critic; name .* model="actor"'):
        find(root, None, harness=True)
    assert find(root, "critic", harness=True) is root.critic
    assert find(root, "", harness=True) is root


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("nett", graft.TargetError, "no part 'nett', which model= names; it has net, teacher"),
        ("net.lora_A", graft.TargetError, "no part"),
        ("teacher", graft.StateError, "model='teacher': the model has no adapter"),
    ],
)
def test_a_name_of_nothing(name: str, kind: Any, text: str) -> None:
    with pytest.raises(kind, match=text):
        find(Harness(net=adapted(), teacher=llama()), name, harness=True)


def test_nothing_is_adapted() -> None:
    with pytest.raises(graft.StateError, match=r"has no adapter; call graft.adapt.*configure_model"):
        find(Harness(net=llama()), None, harness=True)


def test_what_trains_outside_is_told() -> None:
    head = nn.Linear(2, 2)
    root = Harness(net=adapted(), head=head)
    assert trained_outside(root, root.net) == [
        "trained outside the exported model, so in neither output: head.weight, head.bias"
    ]
    head.requires_grad_(False)
    assert trained_outside(root, root.net) == trained_outside(root, root) == []
