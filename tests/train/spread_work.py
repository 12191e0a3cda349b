"""What the processes of test_spread.py do: a training with and without the callback, and one that fails.

Answers are files: the curves, and what the adapted model computed at the end of each epoch.
"""

from __future__ import annotations

import errno
import json
import os
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Report = dict[str, Any]


def work(rank: int, world: int, port: int, folder: str, names: list[str]) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank), LOCAL_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), DS_ACCELERATOR="cpu",
        HF_HUB_OFFLINE="1", GROUP_RANK="0", TORCHELASTIC_RUN_ID="none",
    )  # fmt: skip
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for half a minute
    deepspeed.init_distributed("gloo")
    for name in names:
        report: Report = {"error": "did not end"}
        root = Path(folder, name)
        root.mkdir(exist_ok=True)
        try:
            began = time.process_time()
            CASES[name](root, report)
            if os.environ.get("SPREAD_TIMES") and not rank:
                print(name, round(time.process_time() - began, 1), flush=True)
            report["error"] = ""
        except BaseException:
            report["error"] = traceback.format_exc()
            raise
        finally:
            seen = report.pop("seen", None)
            Path(folder, f"{name}.{rank}.json").write_text(json.dumps(report))
            if seen is not None:
                torch.save(seen, Path(folder, f"{name}.{rank}.pt"))
        dist.barrier()
    dist.destroy_process_group()


# --- Lightning ----------------------------------------------------------------------------------------


def _strategy(kind: str) -> Any:
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    from tests.checkpoints.lightning import OnCpu
    from tests.checkpoints.write import config

    if kind == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if kind == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return OnCpu(
        accelerator=None, config=config(int(kind), {}), cluster_environment=TorchElasticEnvironment()
    )


def _fit(folder: Path, kind: str, how: str, callbacks: list[Any]) -> Any:
    from lightning.pytorch import Trainer
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    from tests.train import small

    torch.manual_seed(5)
    module = small.Module(how, late=kind in ("3", "fsdp2"), shard=kind == "fsdp2")
    extra = {} if kind.isdigit() else {"plugins": [TorchElasticEnvironment()]}
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=_strategy(kind), max_epochs=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, default_root_dir=folder, callbacks=callbacks, **extra,
    )  # fmt: skip
    trainer.fit(module, small.loader(), small.loader(8))
    return module


def _lightning(kind: str, how: str) -> Callable[[Path, Report], None]:
    def case(folder: Path, report: Report) -> None:
        from graft.train.lightning import ExportCallback

        options: Any = {"quiet": dist.get_rank() == 1, "masters": kind.isdigit()}
        callback = ExportCallback(folder / "{epoch}-{step}", epochs=1, steps=[2], **options)
        without = _fit(folder, kind, how, [])
        with_it = _fit(folder, kind, how, [callback])
        report.update(without=without.curve, with_it=with_it.curve, seen=with_it.seen)

    return case


def _failing(folder: Path, report: Report) -> None:
    """The first process's disk is full at its first export, the second's at its second."""
    from graft import shared_files
    from graft.train.lightning import ExportCallback

    real, rank = shared_files.raw_bytes, dist.get_rank()
    write, calls = shared_files.Filler.write, {"seen": 0}

    def late(self: Any, *args: Any) -> None:
        """The other one begins to write when the first has failed, and must still be told why."""
        time.sleep(0.2)
        write(self, *args)

    def full(flat: torch.Tensor) -> memoryview:
        calls["seen"] += 1
        raise OSError(errno.ENOSPC, "no space left on device")

    for failing in (0, 1):
        shared_files.raw_bytes = full if rank == failing else real  # type: ignore[assignment]
        shared_files.Filler.write = write if rank == failing else late  # type: ignore[method-assign]
        try:
            _fit(folder, "3", "graft", [ExportCallback(folder / "out" / "{epoch}", quiet=True)])
            report[f"met-{failing}"] = "nothing"
        except Exception as error:
            report[f"met-{failing}"] = f"{type(error).__name__}: {error}"
        finally:
            shared_files.raw_bytes = real
            shared_files.Filler.write = write  # type: ignore[method-assign]
        dist.barrier()
        report[f"left-{failing}"] = [str(p) for p in folder.rglob("*")]
        dist.barrier()


# --- the Trainer --------------------------------------------------------------------------------------


def _state(kind: str) -> dict[str, Any]:
    """TrainingArguments of DDP or DeepSpeed on the CPU, which accelerate knows only if it is told first."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from transformers import training_args

    from tests.checkpoints.write import config

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    if not kind.isdigit():
        return {"use_cpu": True, "ddp_backend": "gloo", "ddp_find_unused_parameters": False}
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    more = {"bf16": {"enabled": True}} if kind == "0" else {}
    settings = config(int(kind), more) | {"train_micro_batch_size_per_gpu": 4}
    training_args.is_torch_bf16_gpu_available = lambda: True  # type: ignore[attr-defined]
    options = {"deepspeed": settings, "accelerator_config": {"use_configured_state": True}}
    return options | {"bf16": kind == "0"}


def _train(folder: Path, kind: str, how: str, callbacks: list[Any]) -> tuple[list[float], list[torch.Tensor]]:
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from tests.train import small

    curve: list[float] = []
    seen: list[torch.Tensor] = []

    class Watch(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            seen.append(small.logits(model))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            curve.extend(logs[name] for name in ("loss", "grad_norm") if name in logs)

    args = TrainingArguments(
        str(folder / "trainer"), num_train_epochs=2, per_device_train_batch_size=4, report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True, learning_rate=1e-2, max_grad_norm=0,
        **_state(kind),
    )  # fmt: skip
    torch.manual_seed(5)
    # under stage 3 transformers spreads what it loads
    model = small.adapt(LlamaForCausalLM.from_pretrained(folder.parent / "base"), how)
    trainer = Trainer(model, args, train_dataset=small.rows(), callbacks=[*callbacks, Watch()])
    trainer.train()
    name = type(trainer.model_wrapped).__name__
    assert name == ("DeepSpeedEngine" if kind.isdigit() else "DistributedDataParallel"), name
    return curve, seen


def _trainer(kind: str, how: str) -> Callable[[Path, Report], None]:
    def case(folder: Path, report: Report) -> None:
        from graft.train.transformers import ExportCallback

        options: Any = {"quiet": dist.get_rank() == 1, "masters": kind.isdigit()}
        callback = ExportCallback(folder / "{epoch}-{step}", epochs=1, steps=[2], **options)
        report["without"], _ = _train(folder, kind, how, [])
        report["with_it"], report["seen"] = _train(folder, kind, how, [callback])

    return case


CASES: dict[str, Callable[[Path, Report], None]] = {
    "lightning-ddp-graft": _lightning("ddp", "graft"),
    "lightning-1-peft": _lightning("1", "peft"),
    "lightning-2-graft": _lightning("2", "graft"),
    "lightning-3-graft": _lightning("3", "graft"),
    "lightning-3-peft": _lightning("3", "peft"),
    "lightning-fsdp2-peft": _lightning("fsdp2", "peft"),
    "trainer-ddp-graft": _trainer("ddp", "graft"),
    "trainer-0-graft": _trainer("0", "graft"),
    "trainer-2-graft": _trainer("2", "graft"),
    "trainer-3-graft": _trainer("3", "graft"),
    "failing": _failing,
}
