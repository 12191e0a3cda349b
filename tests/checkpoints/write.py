"""Write real checkpoints: ``python -m tests.checkpoints.write FOLDER WORLD``, WORLD processes in one group.

Each variant is a folder ``NAME-WORLD`` beside ``NAME-WORLD.oracle.pt``, what DeepSpeed's own converter makes
of it (absent where that fails), and ``NAME-WORLD.engine.pt``, the engine's own weights in low precision.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from tests.checkpoints import models

#: saved after the first step too
_CPU = {"device": "cpu"}
TWICE = ("odd-2-bf16-2", "odd-3-bf16-2")


def main(folder: Path, world: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.spawn(_work, (world, folder, _free_port()), nprocs=world)  # type: ignore[attr-defined]


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _work(rank: int, world: int, folder: Path, port: int) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank), LOCAL_SIZE=str(world), DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for half a minute
    # DeepSpeed asks the processor for fast fp16, of which these files have no need
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed("gloo")
    for name, make in _variants(world).items():
        _one(folder / f"{name}-{world}", make)
    if world == 2:
        from tests.checkpoints import lightning

        for stage in (2, 3):
            lightning.write(folder, stage, world)


Made = tuple[nn.Module, list[dict[str, object]] | None, dict[str, object], bool]


def _variants(world: int) -> dict[str, Callable[[], Made]]:
    bf16, fp16 = ({name: {"enabled": True}} for name in ("bf16", "fp16"))
    found: dict[str, Callable[[], Made]] = {
        "odd-2-bf16": lambda: _odd(2, bf16),
        "odd-3-bf16": lambda: _odd(3, bf16),
        "groups-3": lambda: _odd(3, bf16, {"sub_group_size": 20}),
    }
    if world != 2:
        return found
    return {
        **found,
        "odd-1-bf16": lambda: _odd(1, bf16),
        "odd-1-fp32": lambda: _odd(1, {}),
        "odd-3-fp32": lambda: _odd(3, {}),
        "odd-2-lean": lambda: _odd(2, bf16, lean=True),
        "odd-3-lean": lambda: _odd(3, bf16, lean=True),
        "odd-1-wide": lambda: _odd(1, {**bf16, "data_types": {"grad_accum_dtype": "fp32"}}),
        "odd-0": lambda: _odd(0, bf16),
        "fp16-2": lambda: _odd(2, fp16),
        "fp16-3": lambda: _odd(3, fp16),
        "robin-2": lambda: _odd(2, bf16, {"round_robin_gradients": True}),
        "offload-3": lambda: _odd(3, bf16, dict.fromkeys(("offload_optimizer", "offload_param"), _CPU)),
        "peft-1": lambda: _peft(1, models.PEFT),
        "peft-3": lambda: _peft(3, models.PEFT),
        "peft-3-lean": lambda: _peft(3, models.PEFT, lean=True),
        "peft-3-more": lambda: _peft(3, models.PEFT_MORE),
        "graft-2": lambda: _graft(2),
        "graft-3": lambda: _graft(3),
    }


def config(stage: int, more: dict[str, object], zero: dict[str, object] | None = None) -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **(zero or {})},
        **more,
    }


def _odd(
    stage: int, more: dict[str, object], zero: dict[str, object] | None = None, lean: bool = False
) -> Made:
    model = models.Odd()
    return model, model.groups(), config(stage, more, zero), lean


def _peft(
    stage: int, lora: dict[str, object], dtype: torch.dtype = torch.bfloat16, lean: bool = False
) -> Made:
    model = models.with_peft(models.llama(dtype=dtype), **lora)
    more = {"bf16": {"enabled": True}} if dtype == torch.bfloat16 else {}
    return model, None, config(stage, more), lean


def _graft(stage: int) -> Made:
    import graft

    model = models.llama()
    graft.adapt(model, ["q_proj", "down_proj"], rank=3, alpha=8, train=["norm"], quiet=True)
    return model, None, config(stage, {"bf16": {"enabled": True}}), False


def _one(path: Path, make: Callable[[], Made]) -> None:
    import deepspeed

    model, groups, settings, lean = make()
    trained = groups or [{"params": [p for p in model.parameters() if p.requires_grad]}]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    for step in range(2):
        engine.backward(loss_of(engine, step + engine.global_rank))
        engine.step()
        if step or path.name in TWICE:
            tag = f"global_step{engine.global_steps}"
            engine.save_checkpoint(str(path), tag=tag, exclude_frozen_parameters=lean)
    weights = _gathered(model)
    if engine.global_rank == 0:
        torch.save(weights, path.with_name(f"{path.name}.engine.pt"))
        oracle(path, path.with_name(f"{path.name}.oracle.pt"))
    engine.destroy()
    torch.distributed.barrier()


def loss_of(engine: nn.Module, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(engine.module, models.Odd):
        return engine(torch.randint(0, 11, (6,), generator=generator))
    ids = torch.randint(0, 37, (2, 9), generator=generator)
    return engine(input_ids=ids, labels=ids).loss


def _gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    import deepspeed

    named = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        found = {name: p.detach().clone() for name, p in named.items()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return {name: t for name, t in {**found, **buffers}.items() if name in model.state_dict()}


def oracle(path: Path, out: Path) -> None:
    """What DeepSpeed's own converter makes of the checkpoint; a .txt with its error where it fails."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        state = get_fp32_state_dict_from_zero_checkpoint(str(path))
    except Exception as error:
        out.with_suffix(".txt").write_text(json.dumps(repr(error)))
        return
    torch.save({name: t.clone() for name, t in state.items()}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
