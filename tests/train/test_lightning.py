"""The callback in real Lightning, one process."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

lightning = pytest.importorskip("lightning.pytorch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from transformers import LlamaForCausalLM  # noqa: E402

import graft  # noqa: E402
from graft.train.exporter import Exporter  # noqa: E402
from graft.train.lightning import ExportCallback  # noqa: E402
from tests.checkpoints import models  # noqa: E402
from tests.train import small  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no .val_dataloader."),
]


def fit(folder: Path, *callbacks: Any, how: str = "graft", module: Any = None, **options: Any) -> Any:
    resume = options.pop("ckpt_path", None)
    torch.manual_seed(5)
    module = module or small.Module(how)
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 2, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder,
    }  # fmt: skip
    trainer = lightning.Trainer(**{**settings, **options}, callbacks=list(callbacks))
    trainer.fit(module, small.loader(12), ckpt_path=resume)
    return module


def made(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("how", ["graft", "peft"])
def test_each_epoch_is_exported_and_training_does_not_notice(how: str, tmp_path: Path) -> None:
    plain = fit(tmp_path, how=how)
    module = fit(tmp_path, ExportCallback(tmp_path / "e" / "{epoch}"), how=how)
    assert plain.curve == module.curve and len(set(module.curve)) == 6
    for (name, p), (_, q) in zip(plain.named_parameters(), module.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    assert made(tmp_path / "e") == ["0", "1"]
    for epoch, want in enumerate(module.seen):
        folder = tmp_path / "e" / str(epoch)
        assert made(folder) == ["adapter", "fused", "graft.json"]
        fused = LlamaForCausalLM.from_pretrained(folder / "fused")
        torch.testing.assert_close(small.logits(fused), want, rtol=0, atol=2e-6)
        again = models.llama(dtype=torch.float32)
        graft.load(again, folder / "adapter", quiet=True)
        torch.testing.assert_close(small.logits(again), want, rtol=0, atol=2e-6)
        record = json.loads((folder / "graft.json").read_text())
        assert record["training"] == {"epoch": epoch, "step": 3 * (epoch + 1)}
        assert record["notes"] == [
            "trained outside the exported model, so in neither output: beside.weight, beside.bias"
        ]


def test_what_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, ExportCallback(tmp_path / "e{epoch}", adapter=False))
    said = capsys.readouterr().out
    assert f"exported {tmp_path}/e0: fused at step 3\n" in said and said.count("  note  trained outside") == 1
    fit(tmp_path, ExportCallback(tmp_path / "f{epoch}", quiet=True))
    assert "exported" not in capsys.readouterr().out


def test_other_moments(tmp_path: Path) -> None:
    """Steps, also of several batches; the end; checkpoints; and a moment that is two of them, once."""
    of_steps = ExportCallback(tmp_path / "a" / "{epoch}-{step}", steps=2, end=True, fused=False)
    at_end = ExportCallback(tmp_path / "b" / "{epoch}", end=True, adapter=False)
    listed = ExportCallback(tmp_path / "c" / "{epoch:02d}", epochs=[1], steps=[1], force=True, fused=False)
    with_them = ExportCallback(tmp_path / "d" / "{step}", checkpoints=True, fused=False)
    checkpoint = lightning.callbacks.ModelCheckpoint(tmp_path / "ckpt", every_n_epochs=2)
    callbacks = [of_steps, at_end, listed, with_them, checkpoint]
    fit(tmp_path, *callbacks, accumulate_grad_batches=2, max_epochs=3, enable_checkpointing=True)
    assert made(tmp_path / "a") == ["0-2", "1-4", "2-6"]
    assert made(tmp_path / "b") == ["2"] and made(tmp_path / "b" / "2") == ["fused", "graft.json"]
    assert made(tmp_path / "c") == ["00", "01"]
    assert made(tmp_path / "d") == ["4"] and made(tmp_path / "ckpt") == ["epoch=1-step=4.ckpt"]


def test_options_reach_the_verbs(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: str) -> None:
            Path(folder, "tokenizer.json").write_text("{}")

    options: dict[str, Any] = {"dtype": torch.bfloat16, "tokenizer": Tokenizer(), "max_shard_size": 4000}
    fit(tmp_path, ExportCallback(tmp_path / "{epoch}", **options, base_name="org/base"), max_epochs=1)
    fused = tmp_path / "0" / "fused"
    assert json.loads((fused / "config.json").read_text())["dtype"] == "bfloat16"
    assert (fused / "tokenizer.json").exists() and len(list(fused.glob("*.safetensors"))) > 1
    config = json.loads((tmp_path / "0" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_only_the_last_exports_are_kept_also_when_a_run_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "e"
    checkpoint = lightning.callbacks.ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    out.mkdir()
    (out / "9").mkdir()  # not an export: never counted, never removed
    first = ExportCallback(out / "{epoch}", keep=2, force=True)
    fit(tmp_path, first, checkpoint, max_epochs=3, enable_checkpointing=True)
    assert made(out) == ["1", "2", "9"]
    resumed = ExportCallback(out / "{epoch}", keep=2)
    fit(
        tmp_path,
        resumed,
        checkpoint,
        max_epochs=4,
        enable_checkpointing=True,
        ckpt_path=tmp_path / "ckpt" / "last.ckpt",
    )
    assert made(out) == ["2", "3", "9"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_run_that_goes_on_replaces_what_it_exported_after_its_checkpoint(tmp_path: Path) -> None:
    def checkpoint() -> Any:
        return lightning.callbacks.ModelCheckpoint(tmp_path / "ckpt", save_top_k=-1)

    out = tmp_path / "e"
    fit(tmp_path, ExportCallback(out / "{epoch}"), checkpoint(), max_epochs=3, enable_checkpointing=True)
    before = {name: (out / name).stat().st_ino for name in made(out)}
    first = tmp_path / "ckpt" / "epoch=0-step=3.ckpt"
    again = ExportCallback(out / "{epoch}")
    fit(tmp_path, again, checkpoint(), enable_checkpointing=True, ckpt_path=first)
    now = {name: (out / name).stat().st_ino for name in made(out)}
    assert {name for name in before if now[name] != before[name]} == {"1"}


def test_an_export_that_someone_removed_is_not_missed(tmp_path: Path) -> None:
    class Someone(lightning.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                shutil.rmtree(tmp_path / "0")

    fit(tmp_path, ExportCallback(tmp_path / "{epoch}", keep=1), Someone())
    assert made(tmp_path) == ["1"]


def test_a_folder_that_exists_stops_a_new_run_before_its_first_step(tmp_path: Path) -> None:
    fit(tmp_path, ExportCallback(tmp_path / "{epoch}"), max_epochs=1)
    before = small.digest(tmp_path)
    module = small.Module("graft")
    with pytest.raises(graft.OutputError, match=r"0 exist already.*pass force=True"):
        fit(tmp_path, ExportCallback(tmp_path / "{epoch}"), module=module)
    assert not module.curve and small.digest(tmp_path) == before
    fit(tmp_path, ExportCallback(tmp_path / "{epoch}", force=True), max_epochs=1)
    assert made(tmp_path) == ["0"]


class Two(small.Module):
    def __init__(self) -> None:
        super().__init__("graft")
        self.critic = nn.Sequential(nn.Linear(3, 3))
        graft.adapt(self.critic, "0", quiet=True)


def none() -> Any:
    module = small.Module("graft")
    graft.unadapt(module.net)
    return module


@pytest.mark.parametrize(
    ("make", "options", "kind", "text"),
    [
        (Two, {}, graft.TargetError, "Two has 2 adapted parts, critic, net; name the one"),
        (none, {}, graft.StateError, "no adapter; call graft.adapt"),
        (lambda: small.Module("graft"), {"model": "nett"}, graft.TargetError, "no part 'nett'"),
        (lambda: small.Module("graft"), {"masters": True}, graft.StateError, "needs DeepSpeed's engine"),
    ],
)
def test_what_would_fail_at_the_first_export_fails_before_the_first_step(
    make: Any, options: dict[str, Any], kind: Any, text: str, tmp_path: Path
) -> None:
    module = make()
    with pytest.raises(kind, match=text):
        fit(tmp_path, ExportCallback(tmp_path / "{epoch}", **options), module=module)
    assert not module.curve and not made(tmp_path)


def test_a_part_is_chosen_by_name(tmp_path: Path) -> None:
    fit(tmp_path, ExportCallback(tmp_path / "{epoch}", model="critic"), module=Two(), max_epochs=1)
    assert made(tmp_path / "0" / "fused") == ["model.safetensors"]


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: str) -> None:
            raise RuntimeError("no tokenizer today")

    with pytest.raises(RuntimeError, match="no tokenizer today"):
        fit(tmp_path, ExportCallback(tmp_path / "out" / "{epoch}", tokenizer=Tokenizer()))
    assert not made(tmp_path)


def test_a_trial_run_writes_nothing(tmp_path: Path) -> None:
    fit(tmp_path, ExportCallback(tmp_path / "{epoch}", end=True, epochs=1), fast_dev_run=True)
    assert not made(tmp_path)


def test_fsdp1_is_refused(tmp_path: Path) -> None:
    class FullyShardedDataParallel(nn.Module):
        pass

    class Trainer:
        class strategy:
            model = FullyShardedDataParallel()

    with pytest.raises(graft.StateError, match="fully_shard"):
        ExportCallback(tmp_path / "{epoch}").on_train_start(Trainer(), small.Module("graft"))


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"fused": False, "adapter": False}, graft.TargetError, "nothing to write"),
        ({"adapter": False, "masters": True}, graft.TargetError, "no effect with adapter=False"),
        ({"keep": 0}, graft.TargetError, "keep=0"),
        ({"keep": True}, graft.TargetError, "keep=True"),
        ({"tokenizer": 3}, graft.TargetError, "save_pretrained"),
        ({"epochs": 0}, graft.TargetError, "epochs=0"),
        ({"steps": 2}, graft.OutputError, "put {step} into it"),
    ],
)
def test_options_that_cannot_be_met(options: dict[str, Any], kind: Any, text: str) -> None:
    with pytest.raises(kind, match=text):
        ExportCallback("e/{epoch}", **options)


def test_the_class_is_lightnings_and_can_be_copied() -> None:
    callback = ExportCallback("e/{epoch}", keep=2)
    assert isinstance(callback, lightning.Callback) and isinstance(callback, ExportCallback)
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):  # noqa: S301
        assert type(copied) is type(callback)
        assert vars(copied).keys() == vars(callback).keys() and vars(copied)["_keep"] == 2
    assert inspect.signature(ExportCallback) == inspect.signature(Exporter)
    assert "folder" in inspect.signature(ExportCallback).parameters


def test_the_other_package_of_lightning(tmp_path: Path) -> None:
    """pytorch_lightning has classes of its own; the program that imported both gets an object of both."""
    other = pytest.importorskip("pytorch_lightning")
    callback = ExportCallback(tmp_path / "{epoch}")
    assert isinstance(callback, other.Callback) and isinstance(callback, lightning.Callback)

    class Module(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = small.adapt(models.llama(dtype=torch.float32), "graft")

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return self.net(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    trainer = other.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(Module(), small.loader(12))
    assert made(tmp_path) == ["0"]
