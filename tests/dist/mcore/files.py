"""Checkpoints and files: saved at one size, loaded at another; whole models for one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.dist import apart
from tests.dist.mcore import shim
from tests.dist.mcore.models import LINEARS, adapt, bits, curve, factors, fill, gpt, loss_of, refused, weights
from tests.dist.mcore.run import check

TARGETS = [*LINEARS, "word_embeddings", "output_layer"]


def sharded(model: Any) -> Any:
    from megatron.core import parallel_state

    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return {"model": model.sharded_state_dict(metadata=groups)}


@check(2, 4)
def checkpoint_loads_at_every_size(folder: Path) -> None:
    from megatron.core import dist_checkpointing

    world = dist.get_world_size()
    split = gpt(world, tied=False, sequence_parallel=True)
    adapt(split, TARGETS)
    fill(split)
    want, loss = factors(split), float(loss_of(split).detach())
    dist_checkpointing.save(sharded(split), str(folder))
    for tp in {1, 2, world}:
        model = gpt(tp, tied=False)
        adapt(model, TARGETS)
        model.load_state_dict(dist_checkpointing.load(sharded(model), str(folder))["model"])
        for name, f in factors(model).items():
            assert torch.equal(f, want[name]), (name, tp)
        assert abs(float(loss_of(model).detach()) - loss) < 1e-5


@check(2)
def stages_of_a_pipeline(folder: Path) -> None:
    """Each fuses its own layers, all or none; together they are a checkpoint, and alone no whole model."""
    from megatron.core import dist_checkpointing

    import graft

    model = gpt(1, tied=False, pp=2)
    adapt(model, LINEARS)
    fill(model, seed=17 + dist.get_rank())
    before = weights(model)
    for verb in ("export", "save"):
        with refused(f"graft.{verb}", "2 pipeline stages", "dist_checkpointing"):
            getattr(graft, verb)(model, folder / "out")
    assert not any(folder.iterdir())
    assert graft.fuse(model) == graft.unfuse(model) == 4
    assert all(torch.equal(bits(w), bits(before[n])) for n, w in weights(model).items())
    proj = model.decoder.layers[0].self_attention.linear_proj
    kept = proj.lora_B.detach().clone()
    if dist.get_rank():
        proj.lora_B.data.fill_(torch.inf)
    with refused("beyond" if dist.get_rank() else "another process"):
        graft.fuse(model)
    assert all(torch.equal(bits(w), bits(before[n])) for n, w in weights(model).items())
    proj.lora_B.data.copy_(kept)
    dist_checkpointing.save(sharded(model), str(folder))
    single = gpt(1, tied=False)
    adapt(single, LINEARS)
    single.load_state_dict(dist_checkpointing.load(sharded(single), str(folder))["model"])
    mine = {n: t for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    found = single.state_dict()
    for name, tensor in mine.items():  # each stage counts its layers from 0
        there = name.replace("decoder.layers.0.", f"decoder.layers.{dist.get_rank()}.")
        assert torch.equal(bits(tensor), bits(found[there])), name


@check(2)
def adapter_saved_at_two_loads_at_one_and_two(folder: Path) -> None:
    import graft

    split = gpt(2, tied=False)
    adapt(split, TARGETS, bias="all")
    fill(split)
    bias = split.decoder.layers[0].mlp.linear_fc1.bias
    bias.data += 1 + dist.get_rank()
    want = factors(split)
    out = folder / "adapter.pt"
    graft.save(split, out, format="loralib")
    dist.barrier()
    for tp in (1, 2):
        for fresh in (True, False):
            model = gpt(tp, tied=False)
            if not fresh:
                adapt(model, TARGETS)
            graft.load(model, out, alpha=6, quiet=True)
            for name, f in factors(model).items():
                assert torch.equal(f, want[name]), (name, tp, fresh)
            found = model.decoder.layers[0].mlp.linear_fc1.bias.detach()
            gate, up = (part for part in found.chunk(2))  # [gate; up], each cut over the processes
            mine = torch.cat([gate.chunk(2 // tp)[0], up.chunk(2 // tp)[0]]) if tp == 1 else found
            first = torch.full((48,), 1.0 if tp == 1 else 1.0 + dist.get_rank())
            assert torch.equal(mine, first), (tp, fresh, mine)


# --- export ---------------------------------------------------------------------------------------------


def _read(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def _exports(
    folder: Path, dtype: torch.dtype | None = None, tp: int | None = None, **settings: Any
) -> dict[str, torch.Tensor]:
    """Export a split model, which a plain TP 1 model takes and runs; fused shards are cut from it."""
    import graft

    tp = tp or dist.get_world_size()
    targets = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "word_embeddings"]
    model = gpt(tp, sequence_parallel=bool(settings.get("experts")), **settings)
    adapt(model, targets)
    fill(model)
    for name, p in model.named_parameters():
        if name.endswith("bias"):  # not one number throughout, so that an order of parts can be seen
            part = dist.get_rank() % tp if getattr(p, "tensor_model_parallel", False) else 0
            p.data = (torch.arange(p.numel()) / 64 + 2.0 * part).to(p.dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    out = graft.export(model, folder / "model", dtype=dtype)
    # the same where no file is shared by the processes, and every weight travels
    graft.export(model, folder / "gathered", dtype=dtype, gather=True)
    dist.barrier()
    assert sorted(p.name for p in out.iterdir()) == ["model.safetensors"]
    ways = [(folder / way / "model.safetensors").read_bytes() for way in ("model", "gathered")]
    assert ways[0] == ways[1]
    assert all(torch.equal(bits(p), bits(before[n])) for n, p in model.named_parameters())
    state = _read(out)
    assert not any("lora_" in n or n.endswith("_extra_state") for n in state)
    if dtype is None:
        plain = gpt(1, **settings)
        missing, unexpected = plain.load_state_dict(state, strict=False)
        assert not unexpected and all(n.endswith("_extra_state") for n in missing), (missing, unexpected)
        loss = float(loss_of(plain).detach())
        shim.parallel(tp)
        graft.fuse(model.eval())
        _shards_are_cut_from(model, state, tp)
        limit = 1e-5 if state["embedding.word_embeddings.weight"].dtype == torch.float32 else 2e-2
        assert abs(float(loss_of(model).detach()) - loss) < limit * abs(loss), loss
    return state


def _shards_are_cut_from(model: Any, state: dict[str, torch.Tensor], size: int) -> None:
    """By Megatron's own rule: ``[gate; up]`` in bands, all else one after another."""
    rank = dist.get_rank() % size
    for name, p in model.named_parameters():
        if "lora_" in name:
            continue
        whole = state[name]
        if getattr(p, "tensor_model_parallel", False):
            pieces = whole.chunk(size * p.partition_stride, dim=p.partition_dim)
            whole = torch.cat(pieces[rank::size], dim=p.partition_dim)
        assert torch.equal(bits(whole), bits(p)), name


@check(2, 4)
def export_of_a_model_for_one_process(folder: Path) -> None:
    """At 4 also with replicas of each part, of which one writes."""
    if dist.get_world_size() == 4:
        _exports(folder / "replicas", tp=2, tied=False)
    state = _exports(folder, tied=False, params_dtype=torch.bfloat16)
    assert state["output_layer.weight"].shape == (64, 32)
    assert state["decoder.layers.0.mlp.linear_fc1.weight"].shape == (96, 32)
    assert state["decoder.layers.0.mlp.linear_fc1.bias"].shape == (96,)


@check(2)
def export_writes_a_tied_output_layer_once(folder: Path) -> None:
    state = _exports(folder, tied=True)
    assert "output_layer.weight" not in state and "embedding.word_embeddings.weight" in state


@check(2)
def export_of_experts_and_buffers(folder: Path) -> None:
    state = _exports(
        folder, tied=False, experts=2, moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid"
    )
    assert state["decoder.layers.1.mlp.router.expert_bias"].shape == (2,)
    assert state["decoder.layers.1.mlp.experts.local_experts.1.linear_fc2.weight"].shape == (32, 24)


@check(2)
def export_rounds_once_to_another_dtype(folder: Path) -> None:
    whole = _exports(folder / "own", tied=False)
    half = _exports(folder / "half", dtype=torch.bfloat16, tied=False)
    assert all(t.dtype == torch.bfloat16 for t in half.values())
    same = [torch.equal(t, whole[n].bfloat16()) for n, t in half.items()]
    assert sum(same) > len(same) // 2  # rounding W + ΔW to fp32 first may differ in a bit here and there


@check(2)
def export_of_an_adapter_on_one_tensor_parallel_process(folder: Path) -> None:
    """From a trained model under Megatron's DDP; training goes on as if nothing had been written."""
    import graft
    from tests.dist.mcore.training import replicas_curve, replicated

    runs: list[list[float]] = []
    for writes in (False, True):
        model = gpt(1, tied=False)
        adapt(model, LINEARS)
        wrapped = replicated(model)
        losses = replicas_curve(wrapped)
        if writes:
            graft.export(wrapped, folder / "model")
            dist.barrier()
        runs.append([*losses, *replicas_curve(wrapped)])
    assert runs[0] == runs[1]
    plain = gpt(1, tied=False)
    plain.load_state_dict(_read(folder / "model"), strict=False)
    assert float(loss_of(plain).detach()) < runs[1][0]


@check(2)
def export_that_fails_on_one_process_leaves_nothing(folder: Path) -> None:
    import graft

    model = gpt(2, tied=False, params_dtype=torch.float16)
    adapt(model, LINEARS)
    fill(model)
    if dist.get_rank() == 1:
        model.decoder.layers[1].mlp.linear_fc2.lora_A.data[0, 0] = 1e6
        model.decoder.layers[1].mlp.linear_fc2.lora_B.data[0, 0] = 1e6
    words = "beyond the range" if dist.get_rank() == 1 else "another process"
    with refused(words):
        graft.export(model, folder / "model")
    dist.barrier()
    assert not any(folder.iterdir())
    assert len(weights(model)) and curve(model, 1)


# --- a process that dies --------------------------------------------------------------------------------


def death(rank: int, world: int, folder: str, gather: bool) -> None:
    """The second process dies while it sends or writes; the first says what it met and what is left."""
    from graft.engines.megatron import ENGINE

    shim.start(rank, world, f"{folder}/store")
    model = gpt(2, tied=False)
    adapt(model, LINEARS)
    apart.dies_in_export(model, ENGINE, Path(folder), gather)
