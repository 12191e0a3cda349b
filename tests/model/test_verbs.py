"""The verbs on a model: freezing, fusing states, contexts, training, dropout, initialisation, layers."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import graft
from graft.attach import sites

from .kinds import Experts, randomise


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4))


def adapted(**options: Any) -> nn.Sequential:
    model = net()
    graft.adapt(model, ["0", "2"], rank=2, quiet=True, **options)
    randomise(model)
    return model


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(9))


def trains(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


FACTORS = {"0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"}


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({}, set()),
        ({"bias": "lora_only"}, {"0.bias", "2.bias"}),
        ({"bias": "all"}, {"0.bias", "2.bias", "3.bias", "4.bias"}),
        ({"train": ["4"]}, {"4.weight", "4.bias"}),
        ({"train": "3.weight"}, {"3.weight"}),
        ({"train": "re:[34]"}, {"3.weight", "3.bias", "4.weight", "4.bias"}),
    ],
)
def test_freeze(options: dict[str, Any], extra: set[str]) -> None:
    model = adapted(**options)
    assert trains(model) == FACTORS | extra
    model.requires_grad_(True)
    count = graft.freeze(model, **options)
    assert trains(model) == FACTORS | extra
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_freeze_needs_an_adapter() -> None:
    with pytest.raises(graft.StateError, match="no adapter"):
        graft.freeze(net())


def test_only_the_factors_move_in_training() -> None:
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(X).square().mean().backward()
    optimizer.step()
    after = model.state_dict()
    assert {k for k in before if not torch.equal(before[k], after[k])} == FACTORS


def test_state_dict_holds_the_adapter_only_and_goes_back() -> None:
    model = adapted(bias="lora_only")
    assert set(graft.state_dict(model)) == FACTORS
    assert set(graft.state_dict(model, trained=True)) == FACTORS | {"0.bias", "2.bias"}
    other = adapted(bias="lora_only")
    randomise(other, seed=8)
    other.load_state_dict(graft.state_dict(model, trained=True), strict=False)
    assert torch.equal(other(X), model(X))


def test_contexts_restore_the_prior_state_also_after_an_exception() -> None:
    model = adapted().eval()
    y, base = model(X), net()(X)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError), graft.fused(model):
        torch.testing.assert_close(model(X), y)
        with graft.disabled(model):
            assert torch.equal(model(X), base)
        torch.testing.assert_close(model(X), y)
        raise RuntimeError
    assert torch.equal(model(X), y)
    with graft.fused(model, "0"), graft.fused(model):
        assert all(m.graft_slots[p].site.fusion for m, p in sites(model).values())
    with pytest.raises(RuntimeError), graft.disabled(model):
        assert torch.equal(model(X), base)
        raise RuntimeError
    assert torch.equal(model(X), y)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_fuse_by_target_and_the_disabled_state() -> None:
    model = adapted().eval()
    assert graft.fuse(model, "0") == 1 and graft.fuse(model) == 1
    assert graft.unfuse(model, "2") == 1 and graft.unfuse(model) == 1
    with pytest.raises(graft.TargetError, match="names no adapted weight"):
        graft.fuse(model, "4")
    with graft.disabled(model), pytest.raises(graft.StateError, match="disabled"):
        graft.fuse(model)


@pytest.mark.parametrize("what", ["lora_A", "lora_B", "scale"])
def test_factors_changed_while_fused_are_refused_and_named(what: str) -> None:
    model = adapted()
    graft.fuse(model)
    site = model[2].graft_slots["weight"].site
    held = [model[0].weight.clone(), model[2].weight.clone()]
    if what == "scale":
        site.scale *= 2
    else:
        getattr(model[2], what).data[0, 0] += 1
    for verb in (graft.fuse, graft.unfuse, graft.unadapt):
        with pytest.raises(graft.StateError, match=r"2\.weight: A, B or the scale"):
            verb(model)
    assert torch.equal(model[0].weight, held[0]) and torch.equal(model[2].weight, held[1])
    if what == "scale":
        site.scale /= 2
        graft.unfuse(model)


def test_a_base_edited_while_fused_is_refused_and_nothing_is_half_done() -> None:
    model = adapted()
    graft.fuse(model)
    model[2].weight.data[3, 3] += 1.0
    held = [model[0].weight.clone(), model[2].weight.clone()]
    with pytest.raises(graft.StateError, match=r"2\.weight: .*edited"):
        graft.unfuse(model)
    assert torch.equal(model[0].weight, held[0]) and torch.equal(model[2].weight, held[1])
    assert all(m.graft_slots[p].site.fusion for m, p in sites(model).values())


def test_one_overflow_leaves_every_weight_unfused() -> None:
    model = adapted().half()
    before = copy.deepcopy(model.state_dict())
    model[2].lora_B.data.fill_(6e4)
    model[2].lora_A.data.fill_(2.0)
    with pytest.raises(graft.StateError, match=r"2\.weight: .*float16"):
        graft.fuse(model)
    assert torch.equal(model[0].weight, before["0.weight"]) and torch.equal(
        model[2].weight, before["2.weight"]
    )
    assert model[0].graft_slots["weight"].site.fusion is None


def test_training_while_fused_is_refused() -> None:
    model = adapted().train()
    graft.fuse(model)
    with pytest.raises(graft.StateError, match=r"graft\.unfuse\(model\) before training"):
        model(X)
    with torch.no_grad():
        model(X)
    model.eval()(X)
    attention = nn.MultiheadAttention(8, 2)
    graft.adapt(attention, "out_proj", quiet=True)
    graft.fuse(attention)
    with pytest.raises(graft.StateError, match="before training"):
        attention(X, X, X)


def test_a_backward_across_fuse_raises_instead_of_using_the_fused_weight() -> None:
    model = adapted()
    loss = model(X).sum()
    graft.fuse(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_state_dicts_of_a_fused_model_say_so() -> None:
    model = adapted()
    graft.fuse(model)
    saved = model.state_dict()
    assert "0.lora_fused_weight" in saved
    with pytest.raises(graft.StateError, match="was fused when this state dict was saved"):
        adapted().load_state_dict(saved)
    plain = adapted().state_dict()
    with pytest.raises(graft.StateError, match=r"fused; loading over it"):
        model.load_state_dict(plain)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        net().load_state_dict(saved)


def test_torch_save_of_the_whole_model() -> None:
    model = adapted().eval()
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    assert torch.equal(again(X), model(X)) and type(again[0]) is graft.Linear


@pytest.mark.parametrize("position", ["pre", "mid", "post"])
def test_dropout_only_touches_the_branch_in_training(position: Any) -> None:
    model = adapted(dropout=0.5, dropout_position=position)
    base = net()
    with graft.disabled(model):
        assert torch.equal(model(X), base(X))
    assert torch.equal(model.eval()(X), adapted()(X))
    layer = model.train()[0]
    samples = torch.stack([layer(X) - base[0](X) for _ in range(4000)]).mean(0)
    exact = adapted()[0](X) - base[0](X)
    assert not torch.allclose(layer(X), layer(X))
    assert (samples - exact).norm() / exact.norm() < 0.1  # dropout keeps the mean


def test_dropout_positions_drop_what_they_say() -> None:
    torch.manual_seed(0)
    x = torch.ones(2000, 8)
    layer = graft.Linear(8, 6, rank=1, dropout=0.5, dropout_position="post")
    randomise(layer)
    full = layer.eval()(x)[0] - nn.functional.linear(x, layer.weight, layer.bias)[0]
    out = layer.train()(x) - nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.allclose(out[out.abs() > 1e-5], (2 * full).expand_as(out)[out.abs() > 1e-5], atol=1e-5)
    mid = graft.Linear(8, 6, rank=1, dropout=0.5, dropout_position="mid")
    mid.load_state_dict(layer.state_dict())
    rows = (mid(x) - nn.functional.linear(x, mid.weight, mid.bias)).abs().amax(1) > 1e-5
    assert 0.4 < rows.float().mean() < 0.6  # rank 1: a whole row lives or dies


def test_embedding_dropout_works_on_the_looked_up_vector() -> None:
    layer = graft.Embedding(10, 6, rank=1, dropout=0.5)
    randomise(layer)
    ids = torch.zeros(2000, dtype=torch.long)
    alive = (layer(ids) - layer.weight[0]).abs().amax(1) > 1e-6
    assert 0.4 < alive.float().mean() < 0.6


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda: graft.Linear(6, 4, bias=False, rank=2, dtype=torch.bfloat16), torch.randn(3, 6)),
        (lambda: graft.Embedding(10, 4, padding_idx=1, rank=2, dtype=torch.bfloat16), torch.arange(10)),
        (lambda: graft.Conv1d(4, 6, 3, groups=2, rank=2, dtype=torch.bfloat16), torch.randn(1, 4, 9)),
        (lambda: graft.Conv2d(4, 6, 3, stride=2, rank=2, dtype=torch.bfloat16), torch.randn(1, 4, 9, 9)),
        (lambda: graft.Conv3d(4, 6, 3, padding=1, rank=2, dtype=torch.bfloat16), torch.randn(1, 4, 5, 5, 5)),
    ],
)
def test_public_layers(layer: Any, x: torch.Tensor) -> None:
    module = layer()
    assert module.lora_A.dtype == torch.float32 and trains(module) == {"lora_A", "lora_B"}
    randomise(module)
    x = x.bfloat16() if x.is_floating_point() else x
    y = module(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert module.lora_A.grad is not None and module.weight.grad is None
    with graft.fused(module):
        torch.testing.assert_close(module.eval()(x), y, rtol=0.05, atol=0.05)
    graft.unadapt(module)
    assert type(module).__module__.startswith("torch.nn")


def test_rslora_and_alpha() -> None:
    assert graft.Linear(4, 4, rank=4, alpha=6).graft_slots["weight"].site.scale == 1.5
    assert graft.Linear(4, 4, rank=4, alpha=6, rslora=True).graft_slots["weight"].site.scale == 3.0
    assert graft.Linear(4, 4, rank=4).graft_slots["weight"].site.scale == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    model = adapted().to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(X.to(dtype))
        with graft.fused(model.eval()):
            torch.testing.assert_close(model(X.to(dtype)), y, rtol=0.05, atol=0.08)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 6), Experts())
    graft.adapt(model, ["0", "up", "down"], rank=2, quiet=True)
    randomise(model)
    x = torch.randn(3, 6, requires_grad=True)
    params = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(model(x).sum(), params)
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    for p, g in zip(params, wanted, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_an_exception_in_forward_leaves_no_shadow() -> None:
    lstm = nn.LSTM(4, 4)
    graft.adapt(lstm, "weight_*", quiet=True)
    flat = lstm._flat_weights
    with pytest.raises(RuntimeError):
        lstm(torch.randn(3, 2, 5))
    assert lstm._flat_weights is flat and "weight_ih_l0" not in lstm.__dict__
    lstm(torch.randn(3, 2, 4))


def test_a_module_that_calls_itself() -> None:
    class Twice(nn.Linear):
        def forward(self, x: torch.Tensor, again: bool = True) -> torch.Tensor:
            y = x @ self.weight.T
            return self(y, False) @ self.weight.T if again else y

    module = Twice(4, 4)
    graft.adapt(module, "weight", quiet=True)
    randomise(module)
    w = module.weight + module.lora_B @ module.lora_A
    x = torch.randn(2, 4)
    torch.testing.assert_close(module(x), x @ w.T @ w.T @ w.T)


def test_two_threads_in_one_shadowed_forward_are_refused() -> None:
    started, release = threading.Event(), threading.Event()

    class Slow(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            started.set()
            assert release.wait(20)
            return x @ self.weight.T

    module = Slow(4, 4)
    graft.adapt(module, "weight", quiet=True)
    thread = threading.Thread(target=module, args=(torch.randn(2, 4),))
    thread.start()
    assert started.wait(20)
    try:
        with pytest.raises(graft.StateError, match="two threads"):
            module(torch.randn(2, 4))
    finally:
        release.set()
        thread.join()


def test_torch_compile_traces_one_class_without_a_break() -> None:
    torch._dynamo.reset()
    model = adapted().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X))
    y = model(X)
    graft.fuse(model)
    torch.testing.assert_close(compiled(X), y)


def test_verify_names_the_layer_that_bypasses_its_adapter() -> None:
    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(nn.functional.linear(self.a(x), self.b.weight))

    for dtype in (torch.float32, torch.bfloat16):
        model = Past().to(dtype)
        graft.adapt(model, "all-linear", quiet=True)
        with pytest.raises(graft.VerifyError, match=r"the weight of b\.weight past its adapter"):
            graft.verify(model, X.to(dtype))
        graft.adapt(model, ["a", "c"], replace=True, quiet=True)
        graft.unadapt(model, "b")
        assert len(graft.verify(model, X.to(dtype)).sites) == 2
    with pytest.raises(graft.StateError, match="no adapter"):
        graft.verify(net(), X)


def test_unadapt_can_keep_the_fused_weight() -> None:
    model = adapted().eval()
    y = model(X)
    graft.unadapt(model, keep_fused=True)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(X), y)
    assert list(model.state_dict()) == list(net().state_dict())


def test_tied_weights_are_one_site() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(12, 8)
            self.head = nn.Linear(8, 12, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(x))

    x = torch.tensor([[1, 5, 3]])
    for target in ("embed", "head", ["embed", "head"]):
        torch.manual_seed(0)
        model = Tied().double()
        report = graft.adapt(model, target, rank=2, quiet=True)
        randomise(model)
        assert report.sites == ("embed.weight",) and "one tied weight: embed.weight = head.weight" in str(
            report
        )
        assert model.embed.lora_A is model.head.lora_A and model.embed.lora_B is model.head.lora_B
        y = model(x)
        w = model.embed.weight + (model.embed.lora_B @ model.embed.lora_A).T
        torch.testing.assert_close(y, w[x] @ w.T)
        base = model.embed.weight.detach().clone()
        model.eval()
        for m in (model, copy.deepcopy(model)):
            assert graft.fuse(m) == 1
            torch.testing.assert_close(m(x), y)
            assert graft.unfuse(m) == 1 and torch.equal(m.embed.weight, base)
        graft.verify(model, x)
        graft.unadapt(model)
        assert type(model.head) is nn.Linear and model.head.weight is model.embed.weight
    with pytest.raises(graft.TargetError, match="one tied weight"):
        graft.adapt(Tied(), "embed", exclude="head", quiet=True)


def test_a_module_used_twice_is_one_site() -> None:
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    report = graft.adapt(model, "all-linear", quiet=True)
    randomise(model)
    assert report.sites == ("0.weight",)
    graft.verify(model, X)


class Own(graft.Linear):
    """A user's subclass of a public layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1.0


def test_a_subclass_of_a_public_layer_keeps_its_class() -> None:
    layer = Own(4, 4, rank=2)
    randomise(layer)
    x = torch.randn(2, 4)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301
        assert type(twin) is Own and torch.equal(twin(x), layer(x))
