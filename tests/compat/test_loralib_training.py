"""loralib's own ways of training, once with each import: the same curve and the same final weights."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .loralib_models import LENGTH, ORIGINAL, OURS, base, gpt2, roberta, same_bits

Step = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def next_word(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1)


def class_of_first(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids[:, 0] % 3).loss


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(2, 8, (8, LENGTH), generator=generator) for _ in range(4)]


def curve(
    lora: ModuleType, make: Any, step: Step, bias: str = "none", **options: Any
) -> tuple[list[float], Any]:
    """Train as the examples do: epochs, a validation in eval mode after each, AdamW with a schedule."""
    model = make(lora, **options)
    lora.mark_only_lora_as_trainable(model, bias)
    for p in getattr(model, "classifier", nn.Identity()).parameters():
        p.requires_grad_(True)
    before = base(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: max(0.0, 1.0 - n / 40))
    losses: list[float] = []
    torch.manual_seed(5)
    for _ in range(5):
        model.train()
        for ids in batches():
            loss = step(model, ids)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            losses.append(sum(step(model, ids).item() for ids in batches()) / 4)
    model.train()
    if lora is OURS:
        frozen = {n: p for n, p in base(model).items() if not model.get_parameter(n).requires_grad}
        assert same_bits(frozen, {n: before[n] for n in frozen})
    return losses, model


@pytest.mark.parametrize(
    ("make", "step", "options"),
    [
        (gpt2, next_word, {}),
        (gpt2, next_word, {"dropout": 0.1}),
        (gpt2, next_word, {"bias": "all"}),
        (roberta, class_of_first, {}),
        (roberta, class_of_first, {"lora_dropout": 0.2, "bias": "lora_only"}),
        (roberta, class_of_first, {"fan_in_fan_out": True}),
    ],
)
def test_the_curve_is_the_originals(make: Any, step: Step, options: dict[str, Any]) -> None:
    theirs, original = curve(ORIGINAL, make, step, **options)
    ours, model = curve(OURS, make, step, **options)
    assert theirs[-1] < theirs[0] - 0.05, "the task is learned, so the curve says something"
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-5)
    other = dict(original.named_parameters())
    for name, p in model.named_parameters():
        if name.endswith("c_attn.bias"):
            # a key's bias moves nothing: its gradient is rounding error, of which AdamW makes whole steps
            p, other[name] = (t.detach().view(3, -1)[[0, 2]] for t in (p, other[name]))
        torch.testing.assert_close(p, other[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_checkpoints_of_a_run_go_both_ways() -> None:
    """lora_state_dict after training, into a fresh model of the other library, by strict=False."""
    for trained, fresh in ((OURS, ORIGINAL), (ORIGINAL, OURS)):
        _, model = curve(trained, roberta, class_of_first)
        other = roberta(fresh)
        other.classifier.load_state_dict(model.classifier.state_dict())
        found = other.load_state_dict(trained.lora_state_dict(model), strict=False)
        assert found.unexpected_keys == [] and all("lora_" not in name for name in found.missing_keys)
        for mode in (True, False):
            model.train(mode), other.train(mode)
            with torch.no_grad():
                torch.manual_seed(0)
                x = class_of_first(model, batches()[0])
                torch.manual_seed(0)
                torch.testing.assert_close(class_of_first(other, batches()[0]), x, rtol=1e-4, atol=1e-5)
