"""Small models of Megatron-core with the same global weights for every layout, and what is asked of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.dist.mcore import shim

LINEARS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


def mlp(tp: int, **settings: Any) -> Any:
    """Megatron's own MLP."""
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


def mlp_settings(gated: bool, **more: Any) -> dict[str, Any]:
    act = nn.functional.silu if gated else nn.functional.gelu
    return {"gated_linear_unit": gated, "activation_func": act, **more}


def layer(kind: str, tp: int, **options: Any) -> Any:
    """One of ``tensor_parallel``'s layers, 32 → 48, as :func:`shim.parallel` has set the groups."""
    from megatron.core import tensor_parallel

    torch.manual_seed(3)
    init = {"init_method": nn.init.xavier_uniform_, "config": shim.config(tensor_model_parallel_size=tp)}
    flags = {} if kind == "VocabParallelEmbedding" else {"bias": False, "skip_bias_add": False}
    return getattr(tensor_parallel, kind)(32, 48, **{**flags, **init, **options})


def gpt(
    tp: int,
    *,
    experts: int | None = None,
    tied: bool = True,
    ep: int = 1,
    etp: int | None = None,
    pp: int = 1,
    **settings: Any,
) -> Any:
    """A GPTModel of Megatron's local spec: GQA, SwiGLU, RMSNorm, rotary positions; or this stage of it."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    shim.parallel(tp, ep, etp, pp)
    stage = dist.get_rank() * pp // dist.get_world_size()
    torch.manual_seed(3)
    if experts:
        settings = {"num_moe_experts": experts, "moe_router_topk": 2, "moe_ffn_hidden_size": 24,
                    "moe_router_load_balancing_type": "none", "add_bias_linear": False,
                    "expert_model_parallel_size": ep, "expert_tensor_parallel_size": etp or tp,
                    **settings}  # fmt: skip
    config = shim.config(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        normalization="RMSNorm",
        num_query_groups=2,
        **settings,
    )
    spec = get_gpt_layer_local_spec(num_experts=experts, normalization="RMSNorm")
    return GPTModel(config, spec, vocab_size=64, max_sequence_length=16, position_embedding_type="rope",
                    share_embeddings_and_output_weights=tied, pre_process=stage == 0,
                    post_process=stage == pp - 1)  # fmt: skip


def adapt(model: nn.Module, targets: Any = "all-linear", **options: Any) -> None:
    import graft

    torch.manual_seed(11)
    graft.adapt(model, targets, quiet=True, **{"rank": 3, "alpha": 6, **options})


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every factor in full."""
    from graft.engines import engine_of
    from graft.model import factor_parameters

    found = factor_parameters(model)
    return {n: engine_of(p).gather([p])[0].clone() for n, p in found.items()}


def fill(model: nn.Module, seed: int = 17, names: Any = str) -> None:
    """Random factors that depend on their names (as ``names`` gives them) alone, not on the layout."""
    from graft.engines import shape_of
    from graft.engines.masters import assign
    from graft.model import factor_parameters

    for name, p in factor_parameters(model).items():
        g = torch.Generator().manual_seed(seed + sum(names(name).encode()))
        assign(p, (torch.randn(shape_of(p), generator=g) * 0.05).to(p.dtype))


def tokens(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(9)
    ids = torch.randint(0, 64, (batch, 9), generator=g)
    mask = torch.ones(8, 8).triu(1).bool()[None, None]
    return ids[:, :-1], torch.arange(8)[None].expand(batch, 8), mask, ids[:, 1:]


def loss_of(model: Any, rows: slice = slice(None)) -> torch.Tensor:
    """The loss of some of the four sequences; all have the same number of tokens."""
    ids, positions, mask, labels = tokens(4)
    return model(ids[rows], positions[rows], mask, labels=labels[rows]).mean()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """With an eps beside which gradients are not small: steps then depend on their size, not on noise."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, eps=1e-4)


def curve(model: Any, steps: int = 4) -> list[float]:
    optimizer = optimizer_of(model)
    losses: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Every factor's gradient of the loss, in full."""
    from graft.engines import engine_of
    from graft.engines.split import mark, split_of
    from graft.model import factor_parameters

    model.zero_grad(set_to_none=True)
    loss_of(model).backward()
    found: dict[str, torch.Tensor] = {}
    for name, p in factor_parameters(model).items():
        assert p.grad is not None, name
        if (split := split_of(p)) is not None:
            mark(p.grad, split)
        found[name] = engine_of(p.grad).gather([p.grad])[0].clone()
    return found


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("weight")}


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().view(torch.uint8)


def close(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor], rtol: float, atol: float) -> None:
    assert found.keys() == want.keys(), found.keys() ^ want.keys()
    for name, value in want.items():
        torch.testing.assert_close(
            found[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def equal_everywhere(x: torch.Tensor, group: Any = None) -> bool:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    return all(torch.equal(bits(part), bits(parts[0])) for part in parts)


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """The block must raise an error of Graft that says all of this."""
    import graft

    try:
        yield
    except graft.GraftError as error:
        missing = [w for w in words if w not in str(error)]
        assert not missing, f"{missing} not said in: {error}"
    else:
        raise AssertionError(f"nothing was refused: {words}")


class Wire:
    """Bytes that this process hands to collectives, and the calls of each."""

    NAMES = (
        "all_gather_into_tensor",
        "all_gather",
        "all_reduce",
        "all_to_all_single",
        "gather",
        "broadcast",
        "reduce_scatter_tensor",
    )

    def __enter__(self) -> Wire:
        self.sent, self.kept = 0, {n: getattr(dist, n) for n in self.NAMES}
        self.calls = dict.fromkeys(self.NAMES, 0)
        for name, function in self.kept.items():
            at = 1 if name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single") else 0
            setattr(dist, name, self._spy(name, function, at))
        return self

    def _spy(self, name: str, function: Any, position: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            self.sent += args[position].numel() * args[position].element_size()
            return function(*args, **kwargs)

        return call

    def __exit__(self, *_: object) -> None:
        for name, function in self.kept.items():
            setattr(dist, name, function)
