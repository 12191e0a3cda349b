"""What the callbacks of all frameworks do: one export of a model that trains, on every process at once."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from .. import __version__
from ..atomic import atomic_directory, remove_directory
from ..engines.masters import has_master
from ..engines.wrappers import PartOfWrapped, Together, team_of, together, unwrap
from ..errors import FormatError, OutputError, StateError, TargetError
from ..export_model import export
from ..saving import save
from ..tensors import read_json
from .find import find, trained_outside
from .late import Late
from .peft_model import holds_peft, plain_view
from .schedule import FolderPattern, Schedule, When

_RECORD = "graft.json"


class Exporter(Late):
    """Export W + ΔW and save the adapter at chosen moments of a training.

    One export is one folder with ``fused``, a model of :func:`graft.export`, ``adapter``, in PEFT's form by
    :func:`graft.save`, and ``graft.json``, which records epoch and step. It appears whole or not at all. The
    model is not touched, so training goes on from the same bits. Every process takes part; an error of one is
    an error of all.

    The model may be adapted by Graft, or by PEFT as plain LoRA on linear layers and embeddings.
    """

    #: whether the trainer's module is code around a model
    _harness = False

    def __init__(
        self,
        folder: str | Path,
        *,
        epochs: When | None = None,
        steps: When | None = None,
        end: bool = False,
        checkpoints: bool = False,
        model: str | None = None,
        fused: bool = True,
        adapter: bool = True,
        dtype: torch.dtype | None = None,
        tokenizer: Any = None,
        masters: bool = False,
        base_name: str | None = None,
        max_shard_size: int | None = 5 * 10**9,
        force: bool = False,
        keep: int | None = None,
        quiet: bool = False,
    ) -> None:
        """Choose what to export, when and where to.

        Args:
            folder: where to write, with ``{epoch}`` or ``{step}`` (``runs/epoch-{epoch:02d}``).
            epochs: after every n-th epoch, or after those of a list. Every epoch if no other moment is
                chosen.
            steps: after every n-th optimizer step, or after those of a list.
            end: when training ends, unless that is written already.
            checkpoints: whenever the trainer writes a checkpoint.
            model: dotted path of the model; "" is the whole module. None finds it.
            fused, adapter: what to write.
            dtype, tokenizer, max_shard_size: those of :func:`graft.export`.
            masters: the adapter from DeepSpeed's fp32 masters, as in :func:`graft.save`.
            base_name: the base's name in the adapter's configuration; the model's own if it has one.
            force: replace folders that exist.
            keep: remove the oldest exports of this run beyond so many.
            quiet: print nothing.
        Raises:
            TargetError, OutputError: options that cannot be met.
        """
        if not (fused or adapter):
            raise TargetError("fused=False and adapter=False leave nothing to write")
        if masters and not adapter:
            raise TargetError("masters=True is of the saved adapter; it has no effect with adapter=False")
        if keep is not None and (type(keep) is not int or keep < 1):
            raise TargetError(f"keep must be the number of exports to keep, at least 1, got keep={keep!r}")
        if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
            raise TargetError(f"tokenizer= needs save_pretrained, and a {type(tokenizer).__name__} has none")
        self._when = Schedule(epochs, steps, end, checkpoints)
        self._folders = FolderPattern(folder, self._when, again=force)
        self._model, self._fused, self._adapter = model, fused, adapter
        self._export_how: dict[str, Any] = {
            "dtype": dtype,
            "tokenizer": tokenizer,
            "max_shard_size": max_shard_size,
        }
        self._save_how: dict[str, Any] = {"masters": masters, "base_name": base_name}
        self._force, self._keep, self._quiet = force, keep, quiet
        self._armed = False
        self._last = (0, 0)
        self._written: dict[Path, int] = {}
        self._kept: list[Path] = []
        self._ahead: set[Path] = set()
        self._told: set[str] = set()

    def _begin(self, root: nn.Module, epoch: int, step: int) -> None:
        """Check before the first step what would fail at the first export."""
        self._armed, self._last = True, (epoch, step)
        self._written, self._kept, self._ahead, self._told = {}, [], set(), set()
        with together(team_of(PartOfWrapped(root))) as work:
            view = self._view(root)
            if self._save_how["masters"] and not any(has_master(p) for p in view.parameters()):
                raise StateError("masters=True needs DeepSpeed's engine; no parameter has an fp32 master")
            if work.team.is_writer():
                self._look_around(step)

    def _look_around(self, step: int) -> None:
        """Earlier exports: of this run, if it goes on, or in its way."""
        there = {path: at for path in self._folders.existing() if (at := _recorded(path)) is not None}
        if step:
            self._kept = sorted((p for p, at in there.items() if at <= step), key=lambda p: there[p])
            # exported after the checkpoint that the run goes on from
            self._ahead = there.keys() - self._kept
        elif there and not self._force:
            names = ", ".join(str(path) for path in [*there][:3]) + (" …" if len(there) > 3 else "")
            raise OutputError(
                f"{names} exist already, exports of another run; name another folder, or pass force=True to "
                "replace them as this run comes to them"
            )

    def _after_epoch(self, root: nn.Module, number: int, done: int, step: int) -> None:
        self._last = (number, step)
        if self._armed and self._when.after_epoch(number, done):
            self._export(root, number, step)

    def _after_step(self, root: nn.Module, epoch: int, step: int) -> None:
        if step == self._last[1]:
            return  # a batch of several that make one step
        self._last = (epoch, step)
        if self._armed and self._when.after_step(step):
            self._export(root, epoch, step)

    def _after_checkpoint(self, root: nn.Module, epoch: int, step: int) -> None:
        if self._armed and self._when.checkpoints:
            self._export(root, epoch, step)

    def _finish(self, root: nn.Module) -> None:
        if self._armed and self._when.end:
            self._export(root, *self._last)
        self._armed = False

    def _view(self, root: nn.Module) -> nn.Module:
        model = find(unwrap(root), self._model, harness=self._harness)
        return plain_view(model) if holds_peft(model) else model

    def _export(self, root: nn.Module, epoch: int, step: int) -> None:
        path = self._folders.of(epoch, step)
        if self._written.get(path) == step:
            return
        with together(team_of(PartOfWrapped(root))) as work:
            view = self._view(root)
            part = PartOfWrapped(view)
            notes = trained_outside(root, view)
            with _folder(work, path, self._force or path in self._ahead) as folder:
                if self._fused:
                    export(part, folder / "fused", **self._export_how)
                if self._adapter:
                    notes += save(part, folder / "adapter", **self._save_how)
                if work.team.is_writer():
                    _record(folder, epoch, step, notes)
            if work.team.is_writer():
                self._tell(path, step, notes)
                self._prune(path)
        self._written[path] = step

    def _tell(self, path: Path, step: int, notes: list[str]) -> None:
        if self._quiet:
            return
        what = " and ".join(n for n, on in (("fused", self._fused), ("adapter", self._adapter)) if on)
        print(f"exported {path}: {what} at step {step}", flush=True)
        for note in notes:
            if note not in self._told:
                self._told.add(note)
                print(f"  note  {note}", flush=True)

    def _prune(self, path: Path) -> None:
        self._kept = [*(p for p in self._kept if p != path), path]
        while self._keep is not None and len(self._kept) > self._keep:
            oldest = self._kept.pop(0)
            if _recorded(oldest) is not None:
                remove_directory(oldest)


@contextmanager
def _folder(work: Together, path: Path, force: bool) -> Generator[Path]:
    """The folder to write into, the same on every process; it gets its name when all are through."""
    target: AbstractContextManager[Path | None] = (
        atomic_directory(path, force=force) if work.team.is_writer() else nullcontext()
    )
    with target as made:
        work.step()
        yield Path(work.team.told(str(made)))


def _record(folder: Path, epoch: int, step: int, notes: list[str]) -> None:
    about = {"graft": __version__, "training": {"epoch": epoch, "step": step}, "notes": notes}
    text = json.dumps(about, indent=2, ensure_ascii=False)
    (folder / _RECORD).write_text(text + "\n", encoding="utf-8")


def _recorded(folder: Path) -> int | None:
    """The step of an export in this folder; None if it is something else."""
    try:
        training = read_json(folder / _RECORD).get("training")
    except FormatError:
        return None
    step = cast("dict[str, object]", training).get("step") if isinstance(training, dict) else None
    return step if isinstance(step, int) else None
