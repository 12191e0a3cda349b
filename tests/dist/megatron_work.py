"""Checks of Megatron-core tensor parallelism, run by every process of a group of two.

``work`` runs every function of ``CHECKS`` and writes what failed; ``test_megatron.py`` reads it.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.dist import megatron_shim as shim

CHECKS: dict[str, Callable[[Path], None]] = {}


def check(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CHECKS[function.__name__] = function
    return function


def work(rank: int, world: int, folder: str) -> None:
    shim.start(rank, world, f"{folder}/store")
    failed: dict[str, str] = {}
    for name, function in CHECKS.items():
        try:
            function(Path(folder))
            failed[name] = ""
        except BaseException:
            failed[name] = traceback.format_exc()
        ok = torch.tensor([int(not failed[name])])
        dist.all_reduce(ok, op=dist.ReduceOp.MIN)
        if not ok:
            break
    Path(folder, f"{rank}.json").write_text(json.dumps(failed))
    dist.destroy_process_group()


# --- a Column → Row MLP ---------------------------------------------------------------------------------


def mlp(tp: int, **settings: Any) -> Any:
    """Megatron's own MLP, with the same global weights for every ``tp``."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLP, MLPSubmodules

    shim.parallel(tp)
    torch.manual_seed(3)
    config = shim.config(tensor_model_parallel_size=tp, **settings)
    made = MLP(config, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
               ffn_hidden_size=config.ffn_hidden_size)  # fmt: skip
    for p in (p for n, p in made.named_parameters() if n.endswith("bias")):
        nn.init.constant_(p, 0.1)
    return made


class Dense(nn.Module):
    """The same function in one process, of plain linears."""

    def __init__(self, gated: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.gated = gated
        self.linear_fc1 = nn.Linear(32, 96 if gated else 48, dtype=dtype)
        self.linear_fc2 = nn.Linear(48, 32, dtype=dtype)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        h = self.linear_fc1(x)
        if self.gated:
            gate, up = h.chunk(2, dim=-1)
            h = nn.functional.silu(gate) * up
        else:
            h = nn.functional.gelu(h)
        return self.linear_fc2(h), None


def adapt(model: nn.Module, targets: Any = "all-linear", **options: Any) -> None:
    import graft

    torch.manual_seed(11)
    graft.adapt(model, targets, quiet=True, **{"rank": 3, "alpha": 6, **options})


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every factor in full."""
    from graft.engines import engine_of
    from graft.model import factor_parameters

    found = factor_parameters(model)
    return {n: engine_of(p).gather([p])[0].clone() for n, p in found.items()}


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
    act = nn.functional.silu if gated else nn.functional.gelu
    settings = {"gated_linear_unit": gated, "activation_func": act, "sequence_parallel": sequence}
    runs: list[tuple[list[float], torch.Tensor, dict[str, torch.Tensor]]] = []
    single = mlp(1, **{**settings, "sequence_parallel": False})
    base = {k: v.clone() for k, v in single.state_dict().items() if v is not None}
    adapt(single, **options)
    runs.append((*train(single, 1, False), whole(single)))
    split = mlp(2, **settings)
    adapt(split, **options)
    runs.append((*train(split, 2, sequence), whole(split)))
    dense = Dense(gated)
    dense.load_state_dict(base)
    adapt(dense, **options)
    runs.append((*train(dense, 1, False), whole(dense)))
    (losses, grad, factors), *others = runs
    assert losses[-1] < losses[0]
    assert any(f.abs().max() > 0.01 for n, f in factors.items() if n.endswith("lora_B"))
    for other_losses, other_grad, other_factors in others:
        torch.testing.assert_close(torch.tensor(other_losses), torch.tensor(losses), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other_grad, grad, rtol=1e-4, atol=1e-4)
        assert other_factors.keys() == factors.keys()
        for name, f in factors.items():
            torch.testing.assert_close(other_factors[name], f, rtol=1e-3, atol=1e-4)


@check
def mlp_trains_as_one_process(_: Path) -> None:
    _same_training(sequence=False, gated=False)


@check
def mlp_trains_with_sequence_parallelism(_: Path) -> None:
    _same_training(sequence=True, gated=False)


@check
def gated_mlp_trains(_: Path) -> None:
    _same_training(sequence=False, gated=True)


@check
def gated_mlp_trains_with_sequence_parallelism(_: Path) -> None:
    _same_training(sequence=True, gated=True, init="xavier", rslora=True)
