"""What the processes of test_deepspeed_chat.py do: graft.compat.deepspeed_chat in real DeepSpeed engines."""

from __future__ import annotations

import argparse
import json
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.compat.dschat_reference import Plain, model, refer
from tests.dist.zero_work import base_slices, patched, refused, same, start

RANK, SCALING = 3, 2
NAME = "pytorch_model.bin"


@dataclass
class Case:
    """One configuration of DeepSpeed."""

    name: str
    stage: int
    dtype: torch.dtype
    init: bool = False

    def config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": self.dtype == torch.bfloat16},
            "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 20},
        }


CASES = [
    Case("z3-init-bf16", 3, torch.bfloat16, init=True),
    Case("z3-fp32", 3, torch.float32),
    Case("z2-bf16", 2, torch.bfloat16),
]


def base(case: Case, ds: Any) -> Plain:
    """The seeded model, spread as the case says."""
    whole = model(case.dtype)
    if not case.init:
        return whole
    with ds.zero.Init(config_dict_or_path=case.config(), dtype=case.dtype):
        spread = Plain()
    # the same numbers as in one process
    with ds.zero.GatheredParameters(list(spread.parameters()), modifier_rank=0), torch.no_grad():
        if dist.get_rank() == 0:
            for name, p in spread.named_parameters():
                p.copy_(whole.get_parameter(name))
    return spread


def engine_of(case: Case, ds: Any) -> Any:
    from graft.compat import deepspeed_chat as dschat

    m = base(case, ds)
    torch.manual_seed(1)
    m = dschat.convert_linear_layer_to_lora(m, "layers.", RANK, SCALING)
    m = dschat.only_optimize_lora_parameters(m, ["layers.1.norm.weight"])
    trained = [p for p in m.parameters() if p.requires_grad]
    assert len(trained) == 13
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    return ds.initialize(model=m, optimizer=optimizer, config=case.config())[0]


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, 17, (4, 6), generator=torch.Generator().manual_seed(step))


def loss_of(m: Any, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(m(ids).flatten(0, 1).float(), ids.flatten())


def train(engine: Any, steps: range) -> list[float]:
    curve: list[float] = []
    rank = dist.get_rank()
    for step in steps:
        loss = loss_of(engine, batch(step)[2 * rank : 2 * rank + 2])
        engine.backward(loss)
        engine.step()
        total = loss.detach().float().clone()
        dist.all_reduce(total)
        curve.append(float(total) / 2)
    return curve


def twin(case: Case, engine: Any) -> Plain:
    """One process's model with the engine's factors and trained parameters, through no way of ours."""
    import deepspeed

    from graft.compat import deepspeed_chat as dschat

    whole = dschat.convert_linear_layer_to_lora(model(case.dtype), "layers.", RANK, SCALING)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())), torch.no_grad():
        for name, p in engine.module.named_parameters():
            if "lora_" in name.split(".")[-1] or p.requires_grad:
                whole.get_parameter(name).copy_(p)
    return whole


def save(engine: Any, case: Case, folder: Path, name: str) -> None:
    """VisualChat's lines at the end of an epoch."""
    from graft.compat import deepspeed_chat as dschat

    given = argparse.Namespace(output_dir=str(folder))
    assert dschat.fuse_lora(engine) is engine
    if dist.get_rank() == 0:
        dschat.save_hf_format(engine, Words(), given, name)
        assert (folder / name / NAME).exists() == (case.stage < 3)
        assert (folder / name / "train_args.pt").exists()
    if case.stage == 3:
        dschat.save_zero_three_model(engine, dist.get_rank(), str(folder), zero_stage=3, sub_folder=name)
    assert dschat.unfuse_lora(engine) is engine
    dist.barrier()


class Words:
    def save_pretrained(self, folder: str) -> None:
        Path(folder, "tokenizer.json").write_text("{}")


# --- checks -----------------------------------------------------------------------------------------


def curves(case: Case, ds: Any, engine: Any, folder: Path) -> None:
    """As one process trains the originals' formula; saving every epoch leaves no trace, not in one bit."""
    want = train(engine_of(case, ds), range(6))
    got: list[float] = []
    for epoch in range(3):
        got += train(engine, range(2 * epoch, 2 * epoch + 2))
        engine.eval()
        with torch.no_grad():
            loss_of(engine, batch(50))
        engine.train()
        save(engine, case, folder, f"epoch-{epoch}")
    assert got == want, (got, want)
    if case.dtype != torch.float32:
        return
    alone = model()
    torch.manual_seed(1)
    refer(alone, "layers.", RANK, SCALING)
    alone.requires_grad_(False)
    for name, p in alone.named_parameters():
        p.requires_grad_(name.endswith((".left", ".right")) or name == "layers.1.norm.weight")
    optimizer = torch.optim.AdamW([p for p in alone.parameters() if p.requires_grad], lr=1e-2)
    for step in range(6):
        loss = loss_of(alone, batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert abs(loss.item() - want[step]) < 1e-5, (step, loss.item(), want)
    assert want[0] - want[-1] > 0.02, want


def files(case: Case, ds: Any, engine: Any, folder: Path) -> None:
    """The fused slices are those of one process, the file is its state dict: buffers, tied weights."""
    from graft.compat import deepspeed_chat as dschat

    whole, before = twin(case, engine), twin(case, engine)
    base_slices(engine, before)
    engine.eval()
    with torch.no_grad():
        loss_of(engine, batch(50))  # leaves full copies of weights alive
    dschat.fuse_lora(engine), dschat.fuse_lora(whole)
    base_slices(engine, whole)
    with torch.no_grad():
        far = (engine(batch(50)).float() - whole.eval()(batch(50)).float()).abs().max()
    assert far < (1e-5 if case.dtype == torch.float32 else 0.05), far
    if case.stage == 3 or dist.get_rank() == 0:
        dschat.save_zero_three_model(engine, dist.get_rank(), folder, case.stage)
    dschat.unfuse_lora(engine)
    engine.train()
    base_slices(engine, before)
    dist.barrier()
    got = torch.load(folder / NAME, weights_only=True)
    plain = model(case.dtype)
    plain.load_state_dict(got, strict=True)
    assert list(got) == list(plain.state_dict()) and "layers.0.flora_gate.weight" in got
    assert all(same(got[n], whole.state_dict()[n]) for n in got)
    assert not same(got["layers.0.q_proj.weight"], before.layers[0].q_proj.weight)
    assert got["head.weight"].data_ptr() == got["embed.weight"].data_ptr()
    assert (folder / NAME).stat().st_size < sum(t.nbytes for t in got.values()) + 12_000


def unfused(case: Case, ds: Any, engine: Any, folder: Path) -> None:
    """Nothing is lost of a model that is not fused: it goes on from the file in a model that has LoRA."""
    from graft.compat import deepspeed_chat as dschat

    whole = twin(case, engine)
    dschat.save_zero_three_model(engine, dist.get_rank(), folder, case.stage)
    dist.barrier()
    got = torch.load(folder / NAME, weights_only=True)
    assert list(got) == list(whole.state_dict())
    assert all(same(got[n], t) for n, t in whole.state_dict().items())


def one_layer(case: Case, ds: Any, engine: Any, folder: Path) -> None:
    import deepspeed

    from graft.compat import deepspeed_chat as dschat

    before = twin(case, engine)
    layer = engine.module.layers[0].q_proj
    assert isinstance(layer, dschat.LinearLayer_LoRA)
    layer.fuse_lora_weight()
    assert layer.fuse_lora and not engine.module.layers[1].q_proj.fuse_lora
    layer.unfuse_lora_weight()
    base_slices(engine, before)
    gathered = dschat._z3_params_to_fetch([layer.weight, None, layer.lora_right_weight])
    assert len(gathered) == (2 if case.stage == 3 else 0)
    if case.stage == 3:  # as the originals' users do it for one layer
        whole = twin(case, engine)
        for verb in ("fuse_lora_weight", "unfuse_lora_weight"):
            with deepspeed.zero.GatheredParameters(gathered, modifier_rank=0):
                getattr(layer, verb)()
            getattr(whole.layers[0].q_proj, verb)()
            base_slices(engine, whole)
    elif dist.get_rank() == 0:  # as in the originals, whole copies are each process's own affair
        dschat.unfuse_lora(dschat.fuse_lora(engine))


def refusals(case: Case, ds: Any, engine: Any, folder: Path) -> None:
    import graft
    from graft.compat import deepspeed_chat as dschat

    rank, before = dist.get_rank(), twin(case, engine)
    refused(graft.StateError, "before", dschat.convert_linear_layer_to_lora, engine, "layers.", 2)
    dschat.fuse_lora(engine)
    factor = engine.module.layers[0].q_proj.lora_left_weight
    mine = factor.ds_tensor if case.stage == 3 else factor.data
    old = mine.clone()
    mine.add_(1)
    refused(graft.StateError, "changed while it was fused", dschat.unfuse_lora, engine)
    mine.copy_(old)
    dschat.unfuse_lora(engine)
    base_slices(engine, before)
    if case.stage < 3:
        return
    call = dschat.save_zero_three_model
    refused(graft.StateError, "zero_stage=2", call, engine, rank, folder, 2)
    text = "another process" if rank == 0 else "global_rank=0"
    refused(graft.StateError, text, call, engine, 0, folder, 3)
    text = "nothing was kept" if rank == 0 else "another process"
    with patched(torch, "save", full_disk if rank == 0 else torch.save):
        refused(graft.GraftError, text, call, engine, rank, folder / "new", 3)
    dist.barrier()
    assert not list(folder.iterdir())
    failing_read(engine, rank, folder)
    call(engine, rank, folder, 3)
    assert (folder / NAME).exists()


def failing_read(engine: Any, rank: int, folder: Path) -> None:
    """The second process cannot read its fifth part: both raise, and nothing is left."""
    import graft
    from graft.compat import deepspeed_chat as dschat
    from graft.engines.zero3 import ENGINE

    real, calls = type(ENGINE).parts, iter(range(1000))

    def parts(self: Any, p: torch.Tensor) -> Any:
        if rank == 1 and next(calls) == 4:
            raise graft.StateError("moved by a test")
        return real(self, p)

    with patched(type(ENGINE), "parts", parts):
        text = "moved by a test" if rank == 1 else "another process"
        refused(graft.StateError, text, dschat.save_zero_three_model, engine, rank, folder, 3)
    dist.barrier()
    assert not list(folder.iterdir())


def full_disk(values: Any, path: Path) -> None:
    path.write_bytes(b"half")
    raise RuntimeError("no space left on device")


CHECKS: list[Callable[[Case, Any, Any, Path], None]] = [curves, files, unfused, one_layer, refusals]


def work(rank: int, world: int, port: int, folder: str) -> None:
    ds = start(rank, world, port)
    for case in CASES:
        results: dict[str, str] = {}
        engine = engine_of(case, ds)
        try:
            for check in CHECKS:
                name = check.__name__
                place = Path(folder, case.name, name)
                place.mkdir(parents=True, exist_ok=True)
                results[name] = "did not end"
                try:
                    check(case, ds, engine, place)
                    results[name] = ""
                except BaseException:
                    # the other process may be inside a collective: this case cannot go on
                    results[name] = traceback.format_exc()
                    raise
        finally:
            Path(folder, f"{case.name}.{rank}.json").write_text(json.dumps(results))
    death(engine_of(CASES[1], ds), rank, Path(folder))


def death(engine: Any, rank: int, folder: Path) -> None:
    """The second process dies while parameters travel; the first says what it met and what is left."""
    from graft.compat import deepspeed_chat as dschat
    from graft.engines.zero3 import ENGINE

    real, calls = type(ENGINE).collect, iter(range(1000))

    def collect(self: Any, *args: Any) -> Any:
        if rank == 1 and next(calls) == 4:
            os._exit(7)
        return real(self, *args)

    type(ENGINE).collect = collect  # type: ignore[method-assign]
    try:
        dschat.save_zero_three_model(engine, rank, folder / "dead", 3)
        met = "nothing"
    except Exception as error:
        met = repr(error)
    left = [str(p) for p in (folder / "dead").rglob("*")]
    (folder / "death.json").write_text(json.dumps({"met": met, "left": left}))
    os._exit(0)
