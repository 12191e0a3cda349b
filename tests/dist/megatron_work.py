"""Checks of Megatron-core tensor parallelism, run by every process of a group of two.

``work`` runs every function of ``CHECKS`` and writes what failed; ``test_megatron.py`` reads it.
"""

from __future__ import annotations

import json
import os
import re
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
    only = os.environ.get("MEGATRON_CHECKS", "").split(",")
    for name, function in CHECKS.items():
        if not any(part in name for part in only):
            continue
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


# --- fuse -----------------------------------------------------------------------------------------------


def fill(model: nn.Module, seed: int = 17) -> None:
    """The same random factors, whatever part of them is here."""
    from graft.engines import engine_of, shape_of
    from graft.engines.masters import assign
    from graft.model import factor_parameters

    g = torch.Generator().manual_seed(seed)
    for p in factor_parameters(model).values():
        assign(p, (torch.randn(shape_of(p), generator=g) * 0.05).to(p.dtype))
        assert engine_of(p).name in ("megatron", "plain")


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("weight")}


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


class Wire:
    """Bytes that this process hands to collectives."""

    NAMES = (
        "all_gather_into_tensor",
        "all_gather",
        "all_reduce",
        "gather",
        "broadcast",
        "reduce_scatter_tensor",
    )

    def __enter__(self) -> Wire:
        self.sent, self.kept = 0, {n: getattr(dist, n) for n in self.NAMES}
        for name, function in self.kept.items():
            setattr(dist, name, self._spy(function, 1 if name.endswith("into_tensor") else 0))
        return self

    def _spy(self, function: Any, position: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.sent += args[position].numel() * args[position].element_size()
            return function(*args, **kwargs)

        return call

    def __exit__(self, *_: object) -> None:
        for name, function in self.kept.items():
            setattr(dist, name, function)


def _fused_pair(dtype: torch.dtype, gated: bool, **options: Any) -> tuple[Any, nn.Module]:
    """The split model and the dense one in one process, with one set of numbers; both unfused."""
    act = nn.functional.silu if gated else nn.functional.gelu
    settings = {"gated_linear_unit": gated, "activation_func": act, "params_dtype": dtype}
    base = {k: v for k, v in mlp(1, **settings).state_dict().items() if v is not None}
    dense = Dense(gated, dtype)
    dense.load_state_dict(base)
    split = mlp(2, **settings)
    for model in (dense, split):
        adapt(model, **options)
        fill(model)
    return split, dense


@check
def fuse_is_the_slice_of_the_dense_fuse(_: Path) -> None:
    import graft
    from graft.engines.split import split_of

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for gated in (False, True):
            split, dense = _fused_pair(dtype, gated)
            before = weights(split)
            graft.fuse(dense)
            with Wire() as wire:
                assert graft.fuse(split) == 2
            assert wire.sent < 200, f"fuse sent {wire.sent} bytes"
            for name, w in weights(split).items():
                layer = split.get_parameter(name)
                want = split_of(layer).cut(dense.get_parameter(name).detach())
                assert torch.equal(bits(w), bits(want)), (name, dtype, gated)
                assert not torch.equal(w, before[name])
            graft.unfuse(split)
            for name, w in weights(split).items():
                assert torch.equal(bits(w), bits(before[name])), (name, dtype, gated)


@check
def grouped_layout_of_a_gated_layer(_: Path) -> None:
    """A and B for the gate and for the other half, as merged q/k/v have them."""
    import graft
    from graft.engines.split import split_of

    layout = graft.Layout("(g o) i", 2)
    only = graft.Layout("(g o) i", 2, only=(1,))
    for chosen in (layout, only):
        split, dense = _fused_pair(torch.float32, True, targets={"linear_fc1": {"layout": chosen}})
        x = torch.randn(4, 2, 32, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(split(x)[0] + split(x)[1], dense(x)[0], rtol=1e-4, atol=1e-4)
        graft.fuse(dense)
        graft.fuse(split)
        for name, w in weights(split).items():
            want = split_of(split.get_parameter(name)).cut(dense.get_parameter(name).detach())
            assert torch.equal(bits(w), bits(want))
    try:
        adapt(mlp(2), {"linear_fc1": {"layout": layout}})
    except graft.GraftError as error:
        assert "is cut" in str(error)
    else:
        raise AssertionError("a layout that the shards do not follow was taken")


@check
def unequal_factors_are_refused(_: Path) -> None:
    import graft

    split, _dense = _fused_pair(torch.float32, False)
    before = weights(split)
    if dist.get_rank() == 1:
        with torch.no_grad():
            split.linear_fc1.lora_A[0, 0] += 1
    try:
        graft.fuse(split)
    except graft.GraftError as error:
        assert "another process" in str(error)
    else:
        raise AssertionError("fused with unequal factors")
    assert all(torch.equal(w, before[n]) for n, w in weights(split).items())


@check
def factors_laid_out_by_rank_are_gathered(_: Path) -> None:
    """Megatron-Bridge cuts A of a column layer along the rank; only the thin factors travel."""
    import graft
    from graft.engines.split import Split, mark, split_of

    split, dense = _fused_pair(torch.bfloat16, True, rank=4)
    fc1, fc2 = split.linear_fc1, split.linear_fc2
    for module, name, axis in ((fc1, "lora_A", 0), (fc2, "lora_B", 0)):
        p = getattr(module, name)
        cut = Split(module.tp_group, axis)
        p.data = cut.cut(p.data)
        mark(p, cut)
    graft.fuse(dense)
    with Wire() as wire:
        graft.fuse(split)
    thin = sum(p.numel() * p.element_size() for n, p in split.named_parameters() if "lora_" in n)
    assert wire.sent < thin + 200
    for name, w in weights(split).items():
        want = split_of(split.get_parameter(name)).cut(dense.get_parameter(name).detach())
        assert torch.equal(bits(w), bits(want))
    graft.unfuse(split)


@check
def whole_weights_reach_the_writer(_: Path) -> None:
    from graft.effective import effective_weight
    from graft.fusing import held_sites

    split, dense = _fused_pair(torch.bfloat16, True)
    import graft

    graft.fuse(dense)
    for h in held_sites(split):
        found = effective_weight(h)
        if dist.get_rank() == 0:
            assert found is not None
            assert torch.equal(bits(found), bits(dense.get_parameter(h.name).detach()))
        else:
            assert found is None


# --- a whole model --------------------------------------------------------------------------------------


def gpt(tp: int, *, experts: int | None = None, tied: bool = True, **settings: Any) -> Any:
    """A GPTModel of Megatron's local spec: GQA, SwiGLU, RMSNorm, rotary positions."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    shim.parallel(tp)
    torch.manual_seed(3)
    if experts:
        settings = {"num_moe_experts": experts, "moe_router_topk": 2, "moe_ffn_hidden_size": 24,
                    "moe_router_load_balancing_type": "none", "add_bias_linear": False,
                    **settings}  # fmt: skip
    config = shim.config(
        tensor_model_parallel_size=tp,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        normalization="RMSNorm",
        num_query_groups=2,
        **settings,
    )
    spec = get_gpt_layer_local_spec(num_experts=experts, normalization="RMSNorm")
    return GPTModel(config, spec, vocab_size=64, max_sequence_length=16, position_embedding_type="rope",
                    share_embeddings_and_output_weights=tied)  # fmt: skip


def tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(9)
    ids = torch.randint(0, 64, (2, 9), generator=g)
    mask = torch.ones(8, 8).triu(1).bool()[None, None]
    return ids[:, :-1], torch.arange(8)[None].expand(2, 8), mask, ids[:, 1:]


def loss_of(model: Any) -> torch.Tensor:
    ids, positions, mask, labels = tokens()
    return model(ids, positions, mask, labels=labels).mean()


def curve(model: Any, steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def _same_curves(targets: Any, **settings: Any) -> tuple[Any, Any]:
    """TP 1 and TP 2 train alike; returns both models."""
    sequence = settings.pop("sequence_parallel", False)
    single = gpt(1, **settings)
    adapt(single, targets)
    one, factors_one = curve(single), whole(single)
    split = gpt(2, sequence_parallel=sequence, **settings)
    adapt(split, targets)
    two, factors_two = curve(split), whole(split)
    assert one[-1] < one[0] - 0.1, one
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=1e-5, atol=1e-5)
    assert factors_one.keys() == factors_two.keys()
    for name, f in factors_one.items():
        torch.testing.assert_close(
            factors_two[name], f, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    return single, split


def _fuse_keeps_the_loss(model: Any) -> None:
    import graft

    model.eval()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        plain = float(loss_of(model))
        graft.fuse(model)
        assert abs(float(loss_of(model)) - plain) < 1e-5
        graft.unfuse(model)
    for n, p in model.named_parameters():
        assert torch.equal(bits(p.detach()), bits(before[n])), n


LINEARS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


@check
def gpt_trains_as_one_process(_: Path) -> None:
    _, split = _same_curves([*LINEARS, "output_layer", "word_embeddings"], tied=False)
    _fuse_keeps_the_loss(split)


@check
def gpt_trains_with_sequence_parallelism(_: Path) -> None:
    _, split = _same_curves([*LINEARS, "word_embeddings"], tied=False, sequence_parallel=True)
    _fuse_keeps_the_loss(split)


@check
def gpt_with_tied_embedding(_: Path) -> None:
    _, split = _same_curves("word_embeddings", tied=True)
    _fuse_keeps_the_loss(split)
    _, split = _same_curves("word_embeddings", tied=True, sequence_parallel=True)
    _fuse_keeps_the_loss(split)


@check
def experts_train(_: Path) -> None:
    _, split = _same_curves(
        ["linear_fc1", "linear_fc2", "linear_qkv"], tied=False, experts=2, sequence_parallel=True
    )
    _fuse_keeps_the_loss(split)


# --- checkpoints and files ------------------------------------------------------------------------------


def _sharded(model: Any) -> Any:
    from megatron.core import parallel_state

    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return {"model": model.sharded_state_dict(metadata=groups)}


@check
def checkpoint_of_two_loads_in_one(folder: Path) -> None:
    from megatron.core import dist_checkpointing

    targets = [*LINEARS, "word_embeddings"]
    split = gpt(2, tied=False, sequence_parallel=True)
    adapt(split, targets)
    fill(split)
    want, loss = whole(split), float(loss_of(split).detach())
    there = folder / "checkpoint"
    if dist.get_rank() == 0:
        there.mkdir()
    dist.barrier()
    dist_checkpointing.save(_sharded(split), str(there))
    single = gpt(1, tied=False)
    adapt(single, targets)
    found = dist_checkpointing.load(_sharded(single), str(there))
    single.load_state_dict(found["model"])
    for name, f in whole(single).items():
        assert torch.equal(f, want[name]), name
    assert abs(float(loss_of(single).detach()) - loss) < 1e-5
    again = gpt(2, tied=False)
    adapt(again, targets)
    again.load_state_dict(dist_checkpointing.load(_sharded(again), str(there))["model"])
    for name, f in whole(again).items():
        assert torch.equal(f, want[name]), name


@check
def adapter_saved_at_two_loads_at_one_and_two(folder: Path) -> None:
    import graft

    targets = [*LINEARS, "word_embeddings", "output_layer"]
    split = gpt(2, tied=False)
    adapt(split, targets)
    fill(split)
    want = whole(split)
    out = folder / "adapter.pt"
    graft.save(split, out, format="loralib")
    dist.barrier()
    for tp in (1, 2):
        for fresh in (True, False):
            model = gpt(tp, tied=False)
            if not fresh:
                adapt(model, targets)
            graft.load(model, out, alpha=6, quiet=True)
            for name, f in whole(model).items():
                assert torch.equal(f, want[name]), (name, tp, fresh)


# --- single layers and odd settings ---------------------------------------------------------------------


def _layer(kind: str, **options: Any) -> Any:
    from megatron.core import tensor_parallel

    torch.manual_seed(3)
    init = {"init_method": nn.init.xavier_uniform_, "config": shim.config(tensor_model_parallel_size=2)}
    settings = {"bias": False, "skip_bias_add": False, **init, **options}
    return getattr(tensor_parallel, kind)(32, 48, **settings)


@check
def layers_that_gather_or_scatter_themselves(_: Path) -> None:
    """Output gathered by the layer, input split by the layer: forward and every gradient against dense."""
    from graft.engines.split import split_of

    shim.parallel(2)
    for kind, options in (
        ("ColumnParallelLinear", {"gather_output": True}),
        ("RowParallelLinear", {"input_is_parallel": False}),
    ):
        layer, dense = _layer(kind, **options), nn.Linear(32, 48, bias=False)
        parts = [torch.empty_like(layer.weight) for _ in range(2)]
        dist.all_gather(parts, layer.weight.detach())
        dense.weight.data = torch.cat(parts, dim=0 if kind[0] == "C" else 1)
        for model in (layer, dense):
            adapt(model, re.compile(""), init="normal")
            fill(model)
        g = torch.Generator().manual_seed(1)
        x, up = torch.randn(4, 2, 32, generator=g), torch.randn(4, 2, 48, generator=g)
        x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
        y1, y2 = layer(x1)[0], dense(x2)
        torch.testing.assert_close(y1, y2, rtol=1e-4, atol=1e-4)
        y1.backward(up)
        y2.backward(up)
        torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-4, atol=1e-4)
        for name in ("lora_A", "lora_B"):
            mine = getattr(layer, name)
            want = split_of(mine).cut(getattr(dense, name).grad)
            torch.testing.assert_close(mine.grad, want, rtol=1e-4, atol=1e-4)


@check
def dropout_leaves_replicated_outputs_equal(_: Path) -> None:
    for position in ("pre", "mid", "post"):
        model = mlp(2)
        adapt(model, dropout=0.5, dropout_position=position)
        fill(model)
        x = torch.randn(4, 2, 32, generator=torch.Generator().manual_seed(1))
        first, second = model(x)[0], model(x)[0]
        assert not torch.equal(first, second), position
        parts = [torch.empty_like(first) for _ in range(2)]
        dist.all_gather(parts, first.detach())
        assert torch.equal(parts[0], parts[1]), position
        model.eval()
        assert torch.equal(model(x)[0], model(x)[0])


@check
def weights_without_megatrons_attributes(_: Path) -> None:
    """``perform_initialization=False`` leaves the weight without a word on how it is cut."""
    import graft
    from graft.engines import shape_of

    model = gpt(2, tied=False, perform_initialization=False)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    adapt(model, [*LINEARS, "word_embeddings"])
    layer = model.decoder.layers[0]
    assert not hasattr(layer.mlp.linear_fc1.weight, "partition_dim")
    assert shape_of(layer.mlp.linear_fc1.weight) == (96, 32)
    assert shape_of(layer.mlp.linear_fc2.weight) == (32, 48)
    assert shape_of(layer.mlp.linear_fc1.lora_B) == (96, 3)
    assert layer.mlp.linear_fc1.lora_B.partition_stride == 2
    assert shape_of(model.embedding.word_embeddings.lora_A) == (3, 64)
    fill(model)
    _fuse_keeps_the_loss(model)
    graft.unadapt(model)


@check
def all_linear_leaves_the_head(_: Path) -> None:
    from graft.model import factor_parameters

    model = gpt(2, tied=False)
    adapt(model, "all-linear")
    names = {n.split(".")[-2] for n in factor_parameters(model)}
    assert names == set(LINEARS), names


@check
def dropout_on_a_tied_embedding_is_refused(_: Path) -> None:
    import graft

    model = gpt(2, tied=True)
    try:
        adapt(model, "word_embeddings", dropout=0.1)
    except graft.GraftError as error:
        assert "dropout" in str(error)
    else:
        raise AssertionError("dropout was taken although the output layer reads the embedding's weight")


@check
def embedding_copied_to_another_stage_is_refused(_: Path) -> None:
    import graft

    model = gpt(2, tied=True)
    model.post_process = False  # as the first of two pipeline stages has it
    try:
        adapt(model, "word_embeddings")
    except graft.GraftError as error:
        assert "pipeline stage" in str(error)
    else:
        raise AssertionError("only one of the two copies would have been adapted")
    assert type(model.embedding.word_embeddings).__name__ == "VocabParallelEmbedding"
