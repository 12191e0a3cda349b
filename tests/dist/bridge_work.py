"""Checkpoints of LoRA as Megatron-Bridge lays it out, made with megatron-core alone.

An adapter module beside each of Megatron's own linears, split over tensor-parallel ranks as Bridge
splits it, saved with ``dist_checkpointing``; and what the adapted model computes, in full, for tests that
read the files without Megatron. ``work`` is run by two processes, once as two replicas (TP 1) and once
split (TP 2).
"""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.dist.mcore import shim
from tests.dist.mcore.models import gpt, tokens

ALPHA, RANK = 12.0, 4
#: adapters that Graft wrote before, to be loaded: directory → rank
WRITTEN = {"graft-lora": 6, "graft-canonical": 4}
HEADS, GROUPS, HEAD = 4, 2, 8
TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer")


class Factors(nn.Module):
    """A and B: ``linear_in`` is split as Bridge splits it (on the rank beside a column layer)."""

    def __init__(self, base: Any, rank: int, out: int | None = None, gated: bool = False) -> None:
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

        super().__init__()
        row, wide, tall = isinstance(base, RowParallelLinear), base.input_size, out or base.output_size
        settings: dict[str, Any] = {
            "config": base.config, "bias": False, "init_method": nn.init.normal_,
            "is_expert": getattr(base, "is_expert", False),
        }  # fmt: skip
        if row:
            self.linear_in = RowParallelLinear(
                wide, rank, input_is_parallel=True, skip_bias_add=True, **settings
            )
        else:
            self.linear_in = ColumnParallelLinear(wide, rank, gather_output=True, **settings)
        self.linear_out = ColumnParallelLinear(rank, tall, gather_output=row, **settings)
        self.gated, self.scale = gated, ALPHA / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner, _ = self.linear_in(x)
        return self.linear_out(inner * self.scale)[0]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

        found = self.linear_in.sharded_state_dict(f"{prefix}linear_in.", sharded_offsets, metadata)
        found |= self.linear_out.sharded_state_dict(f"{prefix}linear_out.", sharded_offsets, metadata)
        if self.gated:
            key = f"{prefix}linear_out.weight"
            singles = bool((metadata or {}).get("singleton_local_shards", False))
            found[key] = apply_swiglu_sharded_factory(found[key], sharded_offsets, singles)
        return found


class Parts(nn.ModuleDict):
    """Canonical LoRA: an adapter for each of q, k, v or of gate, up."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, part in self.items():
            found |= part.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata)
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = {name.removeprefix("adapter_"): part(x) for name, part in self.items()}
        if "gate" in made:
            return torch.cat([made["gate"], made["up"]], dim=-1)
        lead, groups = x.shape[:-1], made["k"].shape[-1] // HEAD
        blocks = [made[name].reshape(*lead, groups, -1) for name in ("q", "k", "v")]
        return torch.cat(blocks, dim=-1).flatten(-2)


class Adapted(nn.Module):
    """One of Megatron's modules with its adapter."""

    def __init__(self, base: Any, adapter: nn.Module) -> None:
        super().__init__()
        self.base, self.adapter, self.on = base, adapter, True

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self.base(x, *args, **kwargs)
        if not self.on:
            return out
        return out[0] + self.adapter(x).reshape(out[0].shape), out[1]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        found = self.base.sharded_state_dict(prefix, sharded_offsets, metadata)
        return {**found, **self.adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata)}


def adapt(model: nn.Module, canonical: bool, rank: int = RANK) -> None:
    """An adapter beside every linear layer."""
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if leaf not in TARGETS:
            continue
        gated = leaf == "linear_fc1"
        adapter: nn.Module = Factors(module, rank, gated=gated)
        if canonical and leaf == "linear_qkv":
            outs = {"q": HEADS * HEAD, "k": GROUPS * HEAD, "v": GROUPS * HEAD}
            adapter = Parts({f"adapter_{n}": Factors(module, rank, out=o) for n, o in outs.items()})
        elif canonical and gated:
            half = module.output_size // 2
            adapter = Parts({f"adapter_{n}": Factors(module, rank, out=half) for n in ("gate", "up")})
        setattr(model.get_submodule(parent), leaf, Adapted(module, adapter))


def fill(model: nn.Module) -> None:
    """Random numbers for every adapter, the same global ones at every TP size."""
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in model.named_parameters():
        if ".adapter." not in name:
            continue
        split = getattr(parameter, "tensor_model_parallel", False)
        axis, shape = getattr(parameter, "partition_dim", -1), list(parameter.shape)
        if split:
            shape[axis] *= size
        seed = sum((n + 1) * ord(c) for n, c in enumerate(name))
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3
        parts = whole.chunk(size, axis) if split else [whole]
        part = parts[rank] if split else parts[0]
        if split and ".linear_fc1.adapter.linear_out" in name:  # each rank holds [gate; up] of its own
            halves = [half.chunk(size, axis)[rank] for half in whole.chunk(2, axis)]
            part = torch.cat(halves, axis)
        parameter.data.copy_(part)


def adapter_keys(model: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    """What Bridge saves of a model: the adapters, and its optimizer's states beside them."""
    found = model.sharded_state_dict(metadata=metadata)
    return {key: value for key, value in found.items() if "adapter" in key.split(".")}


def save(model: Any, folder: Path, **metadata: Any) -> None:
    from megatron.core import dist_checkpointing, parallel_state

    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    state = {"model": adapter_keys(model, {**groups, **metadata}), "iteration": 7}
    dist_checkpointing.save(state, str(folder))


def logits(model: Any) -> torch.Tensor:
    """Of all tokens, the vocabulary gathered."""
    from megatron.core import parallel_state

    ids, positions, mask, _ = tokens()
    with torch.no_grad():
        part = model(ids, positions, mask).contiguous()
    size = parallel_state.get_tensor_model_parallel_world_size()
    if size == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(size)]
    dist.all_gather(parts, part, group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=-1)


def work(rank: int, world: int, folder: str) -> None:
    shim.start(rank, world, f"{folder}/store")
    try:
        _work(Path(folder))
        failed = ""
    except BaseException:
        failed = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(failed))
    dist.destroy_process_group()


def _work(folder: Path) -> None:
    for singles in (False, True):
        model = gpt(1, tied=False, experts=3)
        adapt(model, canonical=False)
        fill(model)
        keep(dict(model.named_parameters()), folder / "experts.pt")
        save(model, folder / f"experts-{singles}", singleton_local_shards=singles)
    for tp in (1, 2):
        for canonical in (False, True):
            model = dense(tp)
            name = f"{'canonical' if canonical else 'lora'}-tp{tp}"
            if tp == 1 and not canonical:
                keep(model.state_dict(), folder / "base.pt")
            adapt(model, canonical)
            fill(model)
            keep(logits(model), folder / f"{name}.pt")
            save(model, folder / name)
            load(dense(tp), folder, canonical)


def dense(tp: int) -> Any:
    """A decoder that Hugging Face's Llama computes too."""
    return gpt(tp, tied=False, add_bias_linear=False, layernorm_epsilon=1e-5).eval()


def keep(value: Any, path: Path) -> None:
    if dist.get_rank() == 0:
        torch.save(value, path)


def load(model: Any, folder: Path, canonical: bool) -> None:
    """An adapter that Graft wrote, loaded by Megatron into its own layers, and run."""
    from megatron.core import dist_checkpointing, parallel_state

    name = f"graft-{'canonical' if canonical else 'lora'}"
    adapt(model, canonical, rank=WRITTEN[name])
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    keys = {k: v for k, v in adapter_keys(model, groups).items() if "_extra_state" not in k.split(".")}
    found = dist_checkpointing.load({"model": keys}, str(folder / name))
    missing, unexpected = model.load_state_dict(found["model"], strict=False)
    assert not unexpected and not [n for n in missing if ".adapter." in n and not n.endswith("_extra_state")]
    size = parallel_state.get_tensor_model_parallel_world_size()
    keep(logits(model), folder / f"{name}-tp{size}.pt")
