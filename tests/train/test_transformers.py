"""The callback in Hugging Face's real Trainer, one process."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

import graft  # noqa: E402
from graft.train.transformers import ExportCallback  # noqa: E402
from tests.checkpoints import models  # noqa: E402
from tests.train import small  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # a loader made for an accelerator, on a machine without one
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


class Watch(TrainerCallback):
    """The losses, and what the model computes at each epoch's end."""

    def __init__(self) -> None:
        self.curve: list[float] = []
        self.seen: list[torch.Tensor] = []

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.seen.append(small.logits(model))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.curve += [logs[name] for name in ("loss", "grad_norm") if name in logs]


def train(folder: Path, *callbacks: Any, how: str = "graft", model: Any = None, **options: Any) -> Watch:
    resume = options.pop("resume", None)
    extra = {name: options.pop(name) for name in ("processing_class", "eval_dataset") if name in options}
    watch = Watch()
    settings: dict[str, Any] = {
        "num_train_epochs": 2, "per_device_train_batch_size": 4, "report_to": [], "save_strategy": "no",
        "logging_steps": 1, "disable_tqdm": True, "learning_rate": 1e-2, "use_cpu": True,
    }  # fmt: skip
    args = TrainingArguments(str(folder / "trainer"), **{**settings, **options})
    torch.manual_seed(5)
    model = model or small.adapt(models.llama(dtype=torch.float32), how)
    trainer = Trainer(
        model, args, train_dataset=small.rows(12), callbacks=[*callbacks, watch], **extra
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return watch


def made(folder: Path) -> list[str]:
    found = folder.iterdir() if folder.exists() else ()
    return sorted(p.name for p in found if p.name != "trainer")


@pytest.mark.parametrize("how", ["graft", "peft"])
def test_each_epoch_is_exported_and_training_does_not_notice(how: str, tmp_path: Path) -> None:
    plain = train(tmp_path, how=how)
    watch = train(tmp_path, ExportCallback(tmp_path / "{epoch}"), how=how)
    assert plain.curve == watch.curve and len(watch.curve) == 12 and len(set(watch.curve)) > 6
    assert made(tmp_path) == ["1", "2"]
    for epoch, want in enumerate(watch.seen, start=1):
        folder = tmp_path / str(epoch)
        assert made(folder) == ["adapter", "fused", "graft.json"]
        fused = LlamaForCausalLM.from_pretrained(folder / "fused")
        torch.testing.assert_close(small.logits(fused), want, rtol=0, atol=2e-6)
        again = models.llama(dtype=torch.float32)
        graft.load(again, folder / "adapter", quiet=True)
        torch.testing.assert_close(small.logits(again), want, rtol=0, atol=2e-6)
        record = json.loads((folder / "graft.json").read_text())
        assert record["training"] == {"epoch": epoch, "step": 3 * epoch} and not record["notes"]


def test_other_moments(tmp_path: Path) -> None:
    """Steps, also of several batches; the end; checkpoints; an epoch that max_steps cuts off."""
    of_steps = ExportCallback(tmp_path / "a" / "{epoch}-{step}", steps=2, end=True, fused=False)
    at_end = ExportCallback(tmp_path / "b", end=True, adapter=False)
    with_them = ExportCallback(tmp_path / "c" / "{step}", checkpoints=True, fused=False)
    each = ExportCallback(tmp_path / "d" / "{epoch}", fused=False)
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 4}
    train(tmp_path, of_steps, at_end, with_them, each, max_steps=5, **options)
    assert made(tmp_path / "a") == ["1-2", "2-4", "3-5"]
    assert made(tmp_path / "b") == ["fused", "graft.json"]
    assert made(tmp_path / "c") == ["4", "5"]
    assert made(tmp_path / "d") == ["1", "2", "3"]


class Tokens:
    """Whatever a Trainer takes as its processing class."""

    model_input_names = ("input_ids",)

    def __init__(self, name: str) -> None:
        self.name = name

    def save_pretrained(self, folder: str, **_: Any) -> None:
        Path(folder, f"{self.name}.json").write_text("{}")


def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def test_the_trainers_tokenizer_is_written_beside_the_model(tmp_path: Path) -> None:
    own = ExportCallback(tmp_path / "a{epoch}")
    given = ExportCallback(tmp_path / "b{epoch}", tokenizer=Tokens("given"))
    train(tmp_path, own, given, processing_class=Tokens("trainers"), num_train_epochs=1)
    assert "trainers.json" in made(tmp_path / "a1" / "fused")
    assert "given.json" in made(tmp_path / "b1" / "fused")
    assert "trainers.json" not in made(tmp_path / "b1" / "fused")


def test_only_the_last_exports_are_kept_also_when_a_run_goes_on(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "epoch", "num_train_epochs": 3}
    train(tmp_path, ExportCallback(tmp_path / "e" / "{epoch}", keep=2), **options)
    assert made(tmp_path / "e") == ["2", "3"]
    options["num_train_epochs"] = 4
    train(tmp_path, ExportCallback(tmp_path / "e" / "{epoch}", keep=2), resume=True, **options)
    assert made(tmp_path / "e") == ["3", "4"]


def test_at_the_end_the_best_model_is_exported_as_what_it_is(tmp_path: Path) -> None:
    """The first epoch is made the best; its weights must not be written under the last step's name."""

    class Score(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            metrics["eval_loss"] = float(state.global_step)

    options: dict[str, Any] = {
        "save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss", "greater_is_better": False, "eval_dataset": small.rows(4),
    }  # fmt: skip
    at_end = ExportCallback(tmp_path / "{epoch}-{step}", end=True)
    watch = train(tmp_path, Score(), at_end, num_train_epochs=3, **options)
    assert made(tmp_path) == ["1-3"]
    fused = LlamaForCausalLM.from_pretrained(tmp_path / "1-3" / "fused")
    torch.testing.assert_close(small.logits(fused), watch.seen[0], rtol=0, atol=2e-6)


def test_a_part_of_the_trainers_model(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language = small.adapt(models.llama(dtype=torch.float32), "graft")
            self.gain = nn.Parameter(torch.tensor(1.0))

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
            out = self.language(input_ids=input_ids, labels=labels)
            if out.loss is not None:
                out.loss = out.loss * self.gain
            return out

    whole = ExportCallback(tmp_path / "a{epoch}", adapter=False)
    part = ExportCallback(tmp_path / "b{epoch}", model="language", adapter=False)
    train(tmp_path, whole, part, model=Wrapper(), num_train_epochs=1)
    assert made(tmp_path / "a1" / "fused") == ["model.safetensors"]
    assert "config.json" in made(tmp_path / "b1" / "fused")
    notes = json.loads((tmp_path / "b1" / "graft.json").read_text())["notes"]
    assert notes == ["trained outside the exported model, so in neither output: gain"]
    assert json.loads((tmp_path / "a1" / "graft.json").read_text())["notes"] == []


@pytest.mark.parametrize(
    ("how", "options", "kind", "text"),
    [
        ("none", {}, graft.StateError, "no adapter; call graft.adapt"),
        ("graft", {"masters": True}, graft.StateError, "needs DeepSpeed's engine"),
        ("dora", {}, graft.StateError, "q_proj: a variant of LoRA"),
    ],
)
def test_what_would_fail_at_the_first_export_fails_before_the_first_step(
    how: str, options: dict[str, Any], kind: Any, text: str, tmp_path: Path
) -> None:
    model: Any = models.llama(dtype=torch.float32)
    if how == "dora":
        model = models.with_peft(model, r=2, target_modules=["q_proj"], use_dora=True)
    elif how == "graft":
        small.adapt(model, how)
    watch = Watch()
    with pytest.raises(kind, match=text):
        train(tmp_path, ExportCallback(tmp_path / "{epoch}", **options), watch, model=model)
    assert not watch.curve and not made(tmp_path)


def test_fsdp1_is_refused(tmp_path: Path) -> None:
    class FullyShardedDataParallel(nn.Module):
        pass

    class State:
        epoch, global_step = 0.0, 0

    with pytest.raises(graft.StateError, match="fully_shard"):
        callback = ExportCallback(tmp_path / "{epoch}")
        callback.on_train_begin(None, State(), None, model=FullyShardedDataParallel())


def test_a_folder_that_exists_stops_a_new_run_before_its_first_step(tmp_path: Path) -> None:
    train(tmp_path, ExportCallback(tmp_path / "{epoch}"), num_train_epochs=1)
    before = small.digest(tmp_path)
    with pytest.raises(graft.OutputError, match=r"1 exist already.*pass force=True"):
        train(tmp_path, ExportCallback(tmp_path / "{epoch}"))
    assert small.digest(tmp_path) == before


def test_the_class_is_the_trainers_and_can_be_copied() -> None:
    callback = ExportCallback("e/{epoch}", keep=2)
    assert isinstance(callback, TrainerCallback) and isinstance(callback, ExportCallback)
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):  # noqa: S301
        assert type(copied) is type(callback) and vars(copied)["_keep"] == 2
