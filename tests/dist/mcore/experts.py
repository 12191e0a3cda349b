"""Mixtures of experts: tensor and expert parallelism, shared factors, ranks divided by the router's top-k."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.dist.mcore import shim
from tests.dist.mcore.models import (
    LINEARS,
    adapt,
    bits,
    close,
    curve,
    equal_everywhere,
    factors,
    fill,
    gpt,
    gradients,
    loss_of,
    refused,
    weights,
)
from tests.dist.mcore.run import check
from tests.dist.mcore.training import replicas_curve, replicated, same_curves

FC = ["linear_fc1", "linear_fc2"]
FC1 = "decoder.layers.0.mlp.experts.local_experts.{}.linear_fc1."


def _expert_rank() -> int:
    from megatron.core import parallel_state

    return int(parallel_state.get_expert_model_parallel_rank())


def as_one_process(name: str, each: int) -> str:
    """The name that this process's expert has where one process has all; ``each`` experts are here."""
    parts = name.split(".")
    if "local_experts" in parts:
        at = parts.index("local_experts") + 1
        parts[at] = str(int(parts[at]) + _expert_rank() * each)
    return ".".join(parts)


def take_base(model: Any, single: Any, each: int) -> None:
    """The single process's weights, cut as this model's are."""
    from graft.engines import notice_all
    from graft.engines.split import split_of

    notice_all(model)
    for name, p in model.named_parameters():
        split, whole = split_of(p), single.get_parameter(as_one_process(name, each)).detach()
        p.data.copy_(whole if split is None else split.cut(whole))


@check(2)
def experts_train(_: Path) -> None:
    same_curves([*FC, "linear_qkv"], tied=False, experts=2, sequence_parallel=True)


def _spread_experts(tp: int, ep: int, etp: int | None, targets: Any, **options: Any) -> None:
    """Four experts over ``ep`` processes, the sequences over replicas, as one process with all of them."""
    import graft

    shared, each = options.get("share_experts", False), 4 // ep
    single = gpt(1, tied=False, experts=4)
    adapt(single, targets, **options)
    fill(single)
    one, want = curve(single), factors(single)
    assert one[-1] < one[0] - 0.01, one
    model = gpt(tp, tied=False, experts=4, ep=ep, etp=etp, sequence_parallel=tp > 1)
    take_base(model, single, each)
    adapt(model, targets, **options)
    fill(model, names=str if shared else lambda n: as_one_process(n, each))
    losses = replicas_curve(replicated(model))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(one), rtol=1e-5, atol=1e-5)
    mine = factors(model)
    own = {as_one_process(n, each): f for n, f in mine.items()}
    if shared:
        own = mine  # one pair, under the first expert's name everywhere
        assert mine.keys() == want.keys()
    close(own, {n: want[n] for n in own}, rtol=2e-3, atol=2e-4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    graft.fuse(model)
    assert not torch.equal(weights(model)[FC1.format(0) + "weight"], before[FC1.format(0) + "weight"])
    graft.unfuse(model)
    assert all(torch.equal(bits(p), bits(before[n])) for n, p in model.named_parameters())


@check(2)
def experts_over_two_processes(_: Path) -> None:
    _spread_experts(1, 2, None, [*FC, "linear_qkv"])
    _spread_experts(1, 2, None, [*FC, "linear_qkv"], share_experts=True)


@check(2)
def experts_whole_under_tensor_parallelism(_: Path) -> None:
    _spread_experts(2, 2, 1, [*FC, "linear_proj"])
    _spread_experts(2, 2, 1, FC, share_experts=True)


@check(4)
def experts_over_tensor_and_expert_parallelism(_: Path) -> None:
    _spread_experts(2, 2, None, [*FC, "linear_proj"])
    _spread_experts(2, 2, None, FC, share_experts=True)


# --- shared factors ---------------------------------------------------------------------------------------


def of_first(name: str) -> str:
    """The name that the first expert of the layer has."""
    parts = name.split(".")
    if "local_experts" in parts:
        parts[parts.index("local_experts") + 1] = "0"
    return ".".join(parts)


@check(2)
def shared_factors_are_one_pair(_: Path) -> None:
    """Gradients of experts add up; ΔW is the same in every one; as TP 1, so TP 2."""
    import graft

    found: list[dict[str, torch.Tensor]] = []
    for share in (False, True):
        for tp in (1, 2):
            model = gpt(tp, tied=False, experts=4, sequence_parallel=tp > 1)
            adapt(model, [*FC, "linear_proj"], share_experts=share)
            fill(model, names=of_first)
            found.append(gradients(model))
    apart, apart2, shared, shared2 = found
    close(apart2, apart, rtol=1e-3, atol=1e-5)
    close(shared2, shared, rtol=1e-3, atol=1e-5)
    for name, grad in shared.items():
        same = [g for n, g in apart.items() if of_first(n) == name]
        assert len(same) == (4 if "local_experts" in name.split(".") else 1)
        torch.testing.assert_close(grad, sum(same), rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    before = weights(model)
    graft.fuse(model)
    after = weights(model)
    assert len({id(model.get_parameter(FC1.format(i) + "lora_A")) for i in range(4)}) == 1
    for i in range(4):
        name = FC1.format(i) + "weight"
        delta = after[name] - before[name]
        torch.testing.assert_close(delta, after[FC1.format(0) + "weight"] - before[FC1.format(0) + "weight"],
                                   rtol=0, atol=1e-6)  # fmt: skip
        assert delta.abs().max() > 1e-3
    graft.unfuse(model)
    assert all(torch.equal(bits(w), bits(before[n])) for n, w in weights(model).items())


@check(2)
def shared_factors_count_once(_: Path) -> None:
    """In the optimizer, in the report, in ``graft.state_dict``, and in Megatron's norm of all gradients."""
    import graft

    model = gpt(1, tied=False, experts=4, ep=2)
    torch.manual_seed(100 + dist.get_rank())
    report = graft.adapt(model, FC, rank=3, share_experts=True, quiet=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(graft.state_dict(model)) == 2 * 2 * 2
    assert len(report.sites) == 2 * 2 * 2 and report.trained == sum(p.numel() for p in trained)
    for p in trained:
        assert p.shared == (dist.get_rank() > 0) and not p.allreduce
        assert equal_everywhere(p)


@check(2)
def shared_factors_in_state_dicts(folder: Path) -> None:
    import graft

    model = gpt(2, tied=False, experts=4, sequence_parallel=True)
    adapt(model, FC, share_experts=True)
    fill(model)
    want, loss = factors(model), float(loss_of(model).detach())
    state = {n: t.clone() for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    only = {n: t.clone() for n, t in graft.state_dict(model).items()}
    notes = graft.save(model, folder / "shared.pt", format="loralib")
    assert sum("share factors" in note for note in notes) == 1, notes
    dist.barrier()

    def fresh(**options: Any) -> Any:
        made = gpt(2, tied=False, experts=4, sequence_parallel=True)
        if options:
            adapt(made, FC, **options)
        return made

    for share in (True, False):
        made = fresh(share_experts=share)
        made.load_state_dict(state, strict=False)
        assert abs(float(loss_of(made).detach()) - loss) < 1e-6
    made = fresh(share_experts=True)
    made.load_state_dict(only, strict=False)
    close(factors(made), want, rtol=0, atol=0)
    for options in ({"share_experts": True}, {"share_experts": False}, {}):
        made = fresh(**options)
        graft.load(made, folder / "shared.pt", alpha=6, quiet=True)
        assert abs(float(loss_of(made).detach()) - loss) < 1e-6
    # made has a pair for each expert now: others than these cannot go into one pair
    with torch.no_grad():
        made.get_parameter(FC1.format(2) + "lora_B").add_(1)
    apart = {n: t for n, t in made.state_dict().items() if isinstance(t, torch.Tensor)}
    graft.save(made, folder / "apart.pt", format="loralib")
    dist.barrier()
    made = fresh(share_experts=True)
    with refused("local_experts.2.linear_fc1", "local_experts.0.linear_fc1", "share_experts=False"):
        made.load_state_dict(apart, strict=False)
    with refused("local_experts.2.linear_fc1", "has the factors of"):
        graft.load(made, folder / "apart.pt", alpha=6, quiet=True)
    graft.unadapt(made, FC1.format(3) + "weight")
    assert float(loss_of(made).detach()) > 0


@check(2)
def shared_factors_in_checkpoints(folder: Path) -> None:
    """Saved by two expert-parallel processes, loaded by one with all experts."""
    from megatron.core import dist_checkpointing

    from tests.dist.mcore.files import sharded

    model = gpt(1, tied=False, experts=4, ep=2)
    adapt(model, [*FC, "linear_proj"], share_experts=True)
    fill(model)
    want = factors(model)
    dist_checkpointing.save(sharded(model), str(folder))
    for share in (True, False):
        single = gpt(1, tied=False, experts=4)
        adapt(single, [*FC, "linear_proj"], share_experts=share)
        single.load_state_dict(dist_checkpointing.load(sharded(single), str(folder))["model"])
        found = factors(single)
        close({n: found[n] for n in want}, want, rtol=0, atol=0)
        if not share:
            for i in range(4):
                assert torch.equal(found[FC1.format(i) + "lora_A"], want[FC1.format(0) + "lora_A"])


# --- ranks divided by top-k ---------------------------------------------------------------------------------


@check(2)
def ranks_of_experts_are_divided(_: Path) -> None:
    """By ``moe_router_topk``, which is 2 here; alpha stays, as in Megatron-Bridge."""
    model = gpt(2, tied=False, experts=4, sequence_parallel=True)
    adapt(model, [*FC, "linear_proj"], rank=6, alpha=12, normalize_experts=True)
    proj = model.decoder.layers[0].self_attention.linear_proj
    expert = model.decoder.layers[0].mlp.experts.local_experts[1].linear_fc2
    for module, rank, scale in ((proj, 6, 2.0), (expert, 3, 4.0)):
        site = module.graft_slots["weight"].site
        assert (module.lora_B.shape[1], site.options.rank, site.scale) == (rank, rank, scale)
    before = set(model.state_dict())
    with refused("rank=5", "moe_router_topk=2", "local_experts.0.linear_fc1"):
        adapt(gpt(2, tied=False, experts=4, sequence_parallel=True), [*FC, "linear_proj"], rank=5,
              normalize_experts=True)  # fmt: skip
    assert set(model.state_dict()) == before


# --- what expert parallelism cannot do -------------------------------------------------------------------


@check(2)
def experts_spread_over_processes_are_not_a_whole_adapter(folder: Path) -> None:
    import graft

    model = gpt(1, tied=False, experts=4, ep=2)
    adapt(model, [*FC, "linear_proj"])
    for verb in ("export", "save"):
        with refused(f"graft.{verb}", "2 expert-parallel processes", "dist_checkpointing"):
            getattr(graft, verb)(model, folder / "out")
    assert not any(folder.iterdir())
    single = gpt(1, tied=False, experts=2)
    adapt(single, FC)
    graft.save(single, folder / "two.pt", format="loralib")
    dist.barrier()
    with refused("graft.load", "2 expert-parallel processes"):
        graft.load(gpt(1, tied=False, experts=4, ep=2), folder / "two.pt", alpha=6, quiet=True)
    attention = gpt(1, tied=False, experts=4, ep=2)
    adapt(attention, LINEARS[:2])
    fill(attention)
    graft.save(attention, folder / "attention.pt", format="loralib")
    dist.barrier()
    again = gpt(1, tied=False, experts=4, ep=2)
    graft.load(again, folder / "attention.pt", alpha=6, quiet=True)
    close(factors(again), factors(attention), rtol=0, atol=0)
    shim.parallel(1)
