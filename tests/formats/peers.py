"""Tiny models adapted by PEFT and loralib, and what their adapters must do to the base."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graft.adapter import Adapter
from graft.bind import bind
from graft.formats import read
from graft.rounding import round_once

Weights = dict[str, torch.Tensor]


class Net(nn.Module):
    """One of each module that PEFT's LoRA knows, with no two dimensions alike by accident."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(23, 12)
        self.wide = nn.Linear(12, 20)
        self.square = nn.Linear(20, 20, bias=False)
        self.conv1 = nn.Conv1d(20, 10, 3)
        self.conv2 = nn.Conv2d(3, 8, (3, 2))
        self.conv3 = nn.Conv3d(2, 6, 2)
        self.pointwise = nn.Conv2d(8, 5, 1)
        self.head = nn.Linear(10, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.square(self.wide(self.embed_tokens(ids)))
        x = self.conv1(x.transpose(1, 2)).transpose(1, 2)
        image = self.pointwise(self.conv2(x[:, :3, None, :].expand(-1, -1, 4, -1)[..., :5]))
        volume = self.conv3(x[:, :2, :, None, None].expand(-1, -1, -1, 3, 3))
        return self.head(x).sum() + image.sum() + volume.sum()


ALL = ["embed_tokens", "wide", "square", "conv1", "conv2", "conv3", "pointwise", "head"]


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Every trainable number random, so that no mistake hides behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def adapted(model: nn.Module, **settings: Any) -> Any:
    """The model under PEFT with random adapters."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 5, **settings}))
    randomise(wrapped)
    return wrapped.eval()


def save(wrapped: Any, path: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(path, **options)
    return path


def load(base: nn.Module, path: Path) -> Any:
    """What PEFT makes of an adapter directory."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, str(path)).eval()


def merged(wrapped: Any) -> Weights:
    """PEFT's own merge, by the base's names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: p.detach().clone() for name, p in wrapped.merge_and_unload().named_parameters()}


def bound(path: Path, base: Weights, **options: Any) -> Adapter:
    given = {key: options.pop(key) for key in ("config", "transposed") if key in options}
    return bind(read(path, **options), {name: tuple(w.shape) for name, w in base.items()}, **given)


def reference(adapter: Adapter, base: Weights) -> Weights:
    """The fused weights in float64 torch operations, from the definition: the oracle of Delta."""
    fused = {name: w.detach().double() for name, w in base.items()}
    for name, tensor in adapter.replace.items():
        fused[name] = tensor.double()
    for name, (tensor, scale) in adapter.shift.items():
        fused[name] = fused[name] + scale * tensor.double()
    for name, (indices, tensor) in adapter.rows.items():
        fused[name] = fused[name].clone()
        fused[name][list(indices)] = tensor.double()
    for name, site in adapter.sites.items():
        assert site.layout is not None
        fused[name] = fused[name].clone()
        m = site.layout.view(fused[name].view(site.layout.matrix or fused[name].shape))
        n, r = len(site.layout.enabled), site.rank
        a, b = site.A.double().reshape(n, r, -1), site.B.double().reshape(n, -1, r)
        for index, g in enumerate(site.layout.enabled):
            m[g] += site.scale * (b[index] @ a[index])
        if site.magnitude is not None:
            m *= (site.magnitude.double() / m[0].norm(dim=1))[None, :, None]
    return fused


def fused(adapter: Adapter, base: Weights) -> Weights:
    """What Graft makes of the base: Delta, rounded once."""
    result = {name: w.detach().clone() for name, w in base.items()}
    for name, tensor in adapter.replace.items():
        result[name] = tensor.to(base[name].dtype).clone()
    for name, site in adapter.sites.items():
        if site.magnitude is None:
            flat = result[name].view(-1)
            site.delta(result[name].shape).add(flat, flat)
    return result


def assert_exact(adapter: Adapter, base: Weights) -> None:
    """Delta on every site equals the float64 reference rounded once."""
    want, got = reference(adapter, base), fused(adapter, base)
    for name, site in adapter.sites.items():
        if site.magnitude is None:
            rounded = round_once(want[name], base[name].dtype)
            wrong = (got[name].view(-1).double() != rounded.view(-1).double()).sum()
            assert wrong == 0, (name, int(wrong))


def assert_like(want: Weights, adapter: Adapter, base: Weights, tolerance: float = 1e-5) -> None:
    """The peer's own merge agrees with the definition on every parameter, the untouched ones included."""
    got = reference(adapter, base)
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(
            got[name], tensor.double(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same(one: Adapter, other: Adapter) -> None:
    """Two adapters hold the same numbers at the same places."""
    assert set(one.sites) == set(other.sites)
    for name, site in one.sites.items():
        twin = other.sites[name]
        assert (site.scale, site.layout, site.shape) == (twin.scale, twin.layout, twin.shape), name
        assert torch.equal(site.A, twin.A) and torch.equal(site.B, twin.B), name
        assert (site.magnitude is None) == (twin.magnitude is None)
        assert site.magnitude is None or torch.equal(site.magnitude, twin.magnitude)
    assert one.replace.keys() == other.replace.keys() and one.shift.keys() == other.shift.keys()
    assert all(torch.equal(t, other.replace[n]) for n, t in one.replace.items())
    assert all(
        torch.equal(t, other.shift[n][0]) and s == other.shift[n][1] for n, (t, s) in one.shift.items()
    )
    assert {n: i for n, (i, _) in one.rows.items()} == {n: i for n, (i, _) in other.rows.items()}
    assert all(torch.equal(t, other.rows[n][1]) for n, (_, t) in one.rows.items())
