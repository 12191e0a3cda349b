"""Runs over 1, 2 and 4 processes are one run: losses, gradients and factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.dist.mcore import shim
from tests.dist.mcore.models import (
    LINEARS,
    Dense,
    adapt,
    bits,
    close,
    curve,
    equal_everywhere,
    factors,
    fill,
    gpt,
    gradients,
    layer,
    loss_of,
    mlp,
    mlp_settings,
    optimizer_of,
)
from tests.dist.mcore.run import check

# --- a Column → Row MLP ---------------------------------------------------------------------------------


def train(model: nn.Module, tp: int, sequence: bool, steps: int = 4) -> tuple[list[float], torch.Tensor]:
    """Losses of all tokens, and the last gradient of x in full."""
    rank = dist.get_rank() % tp if tp > 1 else 0
    g = torch.Generator().manual_seed(5)
    x, t = torch.randn(8, 2, 32, generator=g), torch.randn(8, 2, 32, generator=g)
    if sequence and tp > 1:
        x, t = x.chunk(tp)[rank].clone(), t.chunk(tp)[rank].clone()
    x.requires_grad_()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses: list[float] = []
    for _ in range(steps):
        x.grad = None
        out, bias = model(x)
        loss = ((out if bias is None else out + bias) - t).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if sequence and tp > 1:
            dist.all_reduce(total)
        losses.append(float(total))
    assert x.grad is not None
    grad = x.grad
    if sequence and tp > 1:
        parts = [torch.empty_like(grad) for _ in range(tp)]
        dist.all_gather(parts, grad)
        grad = torch.cat(parts)
    return losses, grad


def _same_training(sequence: bool, gated: bool, **options: Any) -> None:
    settings = mlp_settings(gated, sequence_parallel=sequence)
    runs: list[tuple[list[float], torch.Tensor, dict[str, torch.Tensor]]] = []
    single = mlp(1, **{**settings, "sequence_parallel": False})
    base = {k: v.clone() for k, v in single.state_dict().items() if v is not None}
    adapt(single, **options)
    runs.append((*train(single, 1, False), factors(single)))
    split = mlp(2, **settings)
    adapt(split, **options)
    runs.append((*train(split, 2, sequence), factors(split)))
    dense = Dense(gated)
    dense.load_state_dict(base)
    adapt(dense, **options)
    runs.append((*train(dense, 1, False), factors(dense)))
    (losses, grad, trained), *others = runs
    assert losses[-1] < losses[0]
    assert any(f.abs().max() > 0.01 for n, f in trained.items() if n.endswith("lora_B"))
    for other_losses, other_grad, other_factors in others:
        torch.testing.assert_close(torch.tensor(other_losses), torch.tensor(losses), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other_grad, grad, rtol=1e-4, atol=1e-4)
        close(other_factors, trained, rtol=1e-3, atol=1e-4)


@check(2)
def mlp_trains_as_one_process(_: Path) -> None:
    _same_training(sequence=False, gated=False)


@check(2)
def mlp_trains_with_sequence_parallelism(_: Path) -> None:
    _same_training(sequence=True, gated=False)


@check(2)
def gated_mlp_trains(_: Path) -> None:
    _same_training(sequence=False, gated=True)


@check(2)
def gated_mlp_trains_with_sequence_parallelism(_: Path) -> None:
    _same_training(sequence=True, gated=True, init="xavier", rslora=True)


@check(2)
def layers_that_gather_or_scatter_themselves(_: Path) -> None:
    """Output gathered by the layer, input split by the layer: forward and every gradient against dense."""
    from graft.engines.split import split_of

    shim.parallel(2)
    for kind, options in (
        ("ColumnParallelLinear", {"gather_output": True}),
        ("RowParallelLinear", {"input_is_parallel": False}),
    ):
        split, dense = layer(kind, 2, **options), nn.Linear(32, 48, bias=False)
        parts = [torch.empty_like(split.weight) for _ in range(2)]
        dist.all_gather(parts, split.weight.detach())
        dense.weight.data = torch.cat(parts, dim=0 if kind[0] == "C" else 1)
        for model in (split, dense):
            adapt(model, "re:", init="normal")
            fill(model)
        g = torch.Generator().manual_seed(1)
        x, up = torch.randn(4, 2, 32, generator=g), torch.randn(4, 2, 48, generator=g)
        x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
        y1, y2 = split(x1)[0], dense(x2)
        torch.testing.assert_close(y1, y2, rtol=1e-4, atol=1e-4)
        y1.backward(up)
        y2.backward(up)
        torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-4, atol=1e-4)
        for name in ("lora_A", "lora_B"):
            mine = getattr(split, name)
            want = split_of(mine).cut(getattr(dense, name).grad)
            torch.testing.assert_close(mine.grad, want, rtol=1e-4, atol=1e-4)


# --- a whole model --------------------------------------------------------------------------------------


def same_curves(targets: Any, sizes: tuple[int, ...] = (2,), **settings: Any) -> Any:
    """TP 1 and the other sizes train alike; returns the last model."""
    import graft

    sequence = settings.pop("sequence_parallel", False)
    model = gpt(1, **settings)
    adapt(model, targets)
    one, trained = curve(model), factors(model)
    assert one[-1] < one[0] - 0.03, one
    for tp in sizes:
        model = gpt(tp, sequence_parallel=sequence, **settings)
        adapt(model, targets)
        torch.testing.assert_close(torch.tensor(curve(model)), torch.tensor(one), rtol=1e-5, atol=1e-5)
        close(factors(model), trained, rtol=2e-3, atol=2e-4)
    model.eval()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        plain = float(loss_of(model))
        graft.fuse(model)
        assert abs(float(loss_of(model)) - plain) < 1e-5
        graft.unfuse(model)
    for n, p in model.named_parameters():
        assert torch.equal(bits(p), bits(before[n])), n
    return model


@check(2)
def gpt_trains_as_one_process(_: Path) -> None:
    same_curves([*LINEARS, "output_layer", "word_embeddings"], tied=False)


@check(2)
def gpt_trains_with_sequence_parallelism(_: Path) -> None:
    same_curves([*LINEARS, "word_embeddings"], tied=False, sequence_parallel=True)


@check(2)
def gpt_with_tied_embedding(_: Path) -> None:
    same_curves("word_embeddings", tied=True)
    same_curves("word_embeddings", tied=True, sequence_parallel=True)


@check(4)
def gpt_trains_on_four_processes(_: Path) -> None:
    """At 4 there are fewer query groups than processes."""
    same_curves([*LINEARS, "output_layer", "word_embeddings"], sizes=(2, 4), tied=False)


@check(4)
def gpt_trains_on_four_processes_with_sequence_parallelism(_: Path) -> None:
    same_curves([*LINEARS, "word_embeddings"], sizes=(4,), tied=False, sequence_parallel=True)


# --- Megatron's data parallelism ------------------------------------------------------------------------


def replicated(model: Any) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    return DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)


def replicas_curve(model: Any, steps: int = 4) -> list[float]:
    """Each replica has its share of the sequences; gradients are Megatron's ``main_grad``."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group()
    share = 4 // group.size()
    rows = slice(group.rank() * share, (group.rank() + 1) * share)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_of(model)
    losses: list[float] = []
    for _ in range(steps):
        model.zero_grad_buffer()
        loss = loss_of(model, rows)
        loss.backward()
        model.finish_grad_sync()
        for p in trained:
            p.grad = p.main_grad
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total, group=group)
        losses.append(float(total) / group.size())
    return losses


@check(2, 4)
def replicas_train_as_one_process(_: Path) -> None:
    """Replicas that draw other factors are given the first one's; each sees a share of the tokens."""
    import graft

    single = gpt(1, tied=False)
    adapt(single, LINEARS)
    one, want = curve(single), factors(single)
    tp = dist.get_world_size() // 2
    model = gpt(tp, tied=False, sequence_parallel=tp > 1)
    torch.manual_seed(11 if dist.get_rank() == 0 else 100 + dist.get_rank())
    graft.adapt(model, LINEARS, rank=3, alpha=6, quiet=True)
    wrapped = replicated(model)
    losses = replicas_curve(wrapped)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(one), rtol=1e-5, atol=1e-5)
    close(factors(model), want, rtol=2e-3, atol=2e-4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert graft.fuse(wrapped) == graft.unfuse(wrapped) == 8
    for n, p in model.named_parameters():
        assert torch.equal(bits(p), bits(before[n])), n


@check(2, 4)
def factors_begin_the_same_at_every_size(_: Path) -> None:
    """Of the global shape; also where B is drawn, and with every init."""
    for init, init_b in (
        ("kaiming", "zero"),
        ("xavier", "normal"),
        ("normal", "xavier"),
        ("zero", "kaiming"),
    ):
        drawn: list[dict[str, torch.Tensor]] = []
        for tp in (1, dist.get_world_size()):
            model = gpt(tp, tied=False)
            adapt(model, [*LINEARS, "word_embeddings", "output_layer"], init=init, init_b=init_b)
            drawn.append(factors(model))
            for f in drawn[-1].values():
                assert equal_everywhere(f)
        close(drawn[0], drawn[1], rtol=0, atol=0)
        assert any(f.any() for n, f in drawn[0].items() if n.endswith("lora_B")) == (init_b != "zero")


@check(2)
def gradients_of_a_replicated_parameter(_: Path) -> None:
    """Under sequence parallelism each process gates some of the tokens; the factors get all gradients."""
    found: list[dict[str, torch.Tensor]] = []
    for tp in (1, 2):
        model = gpt(tp, tied=False, experts=2, sequence_parallel=tp > 1,
                    moe_shared_expert_intermediate_size=24, moe_shared_expert_gate=True)  # fmt: skip
        adapt(model, ["gate_weight", "shared_experts.linear_fc1", "shared_experts.linear_fc2"])
        fill(model)
        found.append(gradients(model))
    close(found[1], found[0], rtol=1e-3, atol=1e-6)
    assert found[0]["decoder.layers.0.mlp.shared_experts.lora_A_gate_weight"].abs().max() > 1e-5
