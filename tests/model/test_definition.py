"""Law 1: an adapted module computes what the plain module would compute with W + ΔW; forward and backward."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import graft
from graft.adapted import factor_names, factors
from graft.attach import sites

from .kinds import KINDS, Kind, dense, randomise, run


def build(kind: Kind, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The adapted module and its plain twin, in float64."""
    torch.manual_seed(0)
    module = kind.make().double()
    plain = copy.deepcopy(module)
    graft.adapt(module, kind.targets, rank=3, alpha=6.0, quiet=True, **{**kind.options, **options})
    randomise(module)
    return module, plain


def inputs(kind: Kind) -> torch.Tensor:
    x = kind.inputs()
    return x.double() if x.is_floating_point() else x


def effective(module: nn.Module) -> dict[str, torch.Tensor]:
    """W + ΔW of every site by the test's own definition, with gradients to A and B."""
    found: dict[str, torch.Tensor] = {}
    for name, (owner, parameter) in sites(module).items():
        f = factors(owner, parameter)
        w = getattr(owner, parameter)
        found[name] = w.detach() + dense(f.a, f.b, f.scale, f.layout, tuple(w.shape))
    return found


def reference(plain: nn.Module, weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    if not isinstance(plain, nn.RNNBase):
        return _call(plain, weights, x)
    flat = [weights.get(n, getattr(plain, n).detach()) for n in plain._flat_weights_names]
    plain._flat_weights = flat  # functional_call does not reach this list
    return run(plain, x)


def _call(plain: nn.Module, weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    class Runner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = plain

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return run(self.m, x)

    return torch.func.functional_call(Runner(), {f"m.{n}": w for n, w in weights.items()}, (x,))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_forward_and_gradients_are_those_of_the_effective_weight(name: str, training: bool) -> None:
    kind = KINDS[name]
    module, plain = build(kind)
    module.train(training), plain.train(training)
    x = inputs(kind)
    wanted = reference(plain, effective(module), x)
    got = run(module, x)
    base = run(plain.requires_grad_(False), x) if not isinstance(plain, nn.RNNBase) else None
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    assert base is None or not torch.allclose(base, got)
    params = [getattr(o, n) for o, p in sites(module).values() for n in factor_names(p)]
    weights = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((got * weights).sum(), params)
    theirs = torch.autograd.grad((wanted * weights).sum(), params)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-9)
        assert mine.abs().sum() > 0


@pytest.mark.parametrize("name", KINDS)
def test_no_grad_eval_takes_the_fast_paths_and_still_adapts(name: str) -> None:
    kind = KINDS[name]
    module, plain = build(kind)
    module.eval(), plain.eval()
    x = inputs(kind)
    weights = {n: w.detach() for n, w in effective(module).items()}
    with torch.no_grad():
        torch.testing.assert_close(run(module, x), reference(plain, weights, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_one_of_the_two_roads_is_taken(name: str) -> None:
    module, _ = build(KINDS[name])
    roads = {
        slot.factored
        for m in module.modules()
        if isinstance(m, graft.Adapted)
        for slot in m.graft_slots.values()
    }
    # an encoder layer mixes them: its attention is shadowed, its linears are not
    assert roads == ({True, False} if name == "encoder layer" else {KINDS[name].factored})


@pytest.mark.parametrize("name", KINDS)
def test_fresh_adapter_changes_nothing_and_shadows_are_gone(name: str) -> None:
    kind = KINDS[name]
    torch.manual_seed(0)
    module = kind.make().double().eval()
    x = inputs(kind)
    before, keys = run(module, x), set(module.state_dict())
    graft.adapt(module, kind.targets, rank=3, quiet=True, **kind.options)
    torch.testing.assert_close(run(module, x), before, rtol=0, atol=1e-12)
    assert keys <= set(module.state_dict())
    extra = set(module.state_dict()) - keys
    assert extra and all(k.split(".")[-1].startswith(("lora_A", "lora_B")) for k in extra)
    for m in module.modules():
        assert not (set(m.__dict__) & set(m._parameters)) and "_graft_shadow" not in m.__dict__


@pytest.mark.parametrize("name", KINDS)
def test_fuse_is_the_delta_rounded_once_and_unfuse_gives_every_bit_back(name: str) -> None:
    kind = KINDS[name]
    module, _ = build(kind)
    module = module.to(torch.bfloat16).eval()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    wanted = {}
    for site, (owner, parameter) in sites(module).items():
        f, w = factors(owner, parameter), getattr(owner, parameter).detach()
        exact = w.double() + dense(f.a.double(), f.b.double(), f.scale, f.layout, tuple(w.shape)).detach()
        wanted[site] = graft.rounding.round_once(exact, torch.bfloat16)
    for _ in range(5):
        assert graft.fuse(module) == len(wanted) and graft.fuse(module) == 0
        for site, value in wanted.items():
            assert torch.equal(module.get_parameter(site), value), site
        assert graft.unfuse(module) == len(wanted) and graft.unfuse(module) == 0
        for n, p in module.named_parameters():
            assert torch.equal(p.view(torch.int16), before[n].view(torch.int16)), n


@pytest.mark.parametrize("name", KINDS)
def test_pickle_and_deepcopy_keep_the_model_whole(name: str) -> None:
    kind = KINDS[name]
    module, _ = build(kind)
    module.eval()
    x = inputs(kind)
    y = run(module, x)
    graft.fuse(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):  # noqa: S301
        assert type(twin) is type(module) and list(twin.state_dict()) == list(module.state_dict())
        torch.testing.assert_close(run(twin, x), y, rtol=1e-9, atol=1e-9)
        graft.unfuse(twin)
        torch.testing.assert_close(run(twin, x), y, rtol=1e-9, atol=1e-9)
    graft.unfuse(module)


@pytest.mark.parametrize("name", KINDS)
def test_unadapt_gives_the_plain_classes_and_the_same_weights_back(name: str) -> None:
    kind = KINDS[name]
    torch.manual_seed(0)
    module = kind.make()
    classes = [type(m) for m in module.modules()]
    params = {n: (p, p.detach().clone()) for n, p in module.named_parameters()}
    graft.adapt(module, kind.targets, rank=2, quiet=True, **kind.options)
    assert [type(m) for m in module.modules()] != classes
    assert all(isinstance(m, c) for m, c in zip(module.modules(), classes, strict=True))
    randomise(module)
    graft.fuse(module)
    graft.unadapt(module)
    assert [type(m) for m in module.modules()] == classes
    assert dict(module.named_parameters()).keys() == params.keys()
    for n, p in module.named_parameters():
        assert p is params[n][0] and torch.equal(p, params[n][1])
    assert not any("graft" in key for m in module.modules() for key in m.__dict__)


@pytest.mark.parametrize("name", KINDS)
def test_verify_agrees(name: str) -> None:
    kind = KINDS[name]
    module, _ = build(kind)
    x = inputs(kind)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    args = (x, x) if isinstance(module, nn.Bilinear) else (x,)
    report = graft.verify(module, *args)
    assert report.difference < 1e-8 and len(report.sites) == len(sites(module)) and module.training
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
