"""Which files a checkpoint has: the tag's folder, and each rank's file; what is not ZeRO alone is refused."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ...errors import FormatError, Problems

_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_WHOLE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_REFUSED = (
    (re.compile(r"(layer_\d+_)?expert_\d+_.*_states\.pt|expp_rank_\d+_.*_states\.pt"), "experts in files of "
     "their own (DeepSpeed-MoE)"),
    (re.compile(r"layer_\d+-model_.*_states\.pt"), "layers in files of their own (pipeline parallelism)"),
)  # fmt: skip


@dataclass(frozen=True)
class Files:
    """The files of one tag.

    Args:
        folder: the tag's.
        optimizer: rank → its optimizer states; empty for stage 0.
        model: rank → its model states: every rank's in stage 3, one file otherwise.
        sharded: whether the model states are stage 3's.
    """

    folder: Path
    optimizer: dict[int, Path]
    model: dict[int, Path]
    sharded: bool


def is_checkpoint(path: Path) -> bool:
    """Whether this is an engine's checkpoint: a tag's folder, or a folder with such folders."""
    left = (path / "latest").is_file() and (path / "zero_to_fp32.py").is_file()
    return path.is_dir() and (_has_states(path) or left or bool(_tags(path)))


def find_files(path: Path, tag: str | None = None) -> Files:
    """The files of one tag, each rank's once.

    Args:
        path: the folder given to ``save_checkpoint``, a tag's folder in it, or Lightning's ``.ckpt`` folder.
        tag: which tag; else what the file ``latest`` says, or the only one.
    Raises:
        FormatError: no such tag, several without ``latest``, files of model parallelism or experts, two
            files for one rank, no file of model states.
    """
    folder = _tag_folder(path, tag)
    names = sorted(p.name for p in folder.iterdir())
    problems = Problems(FormatError, f"{folder} cannot be read:")
    optimizer = _by_rank(folder, names, _OPTIMIZER, problems)
    shards = _by_rank(folder, names, _SHARD, problems)
    plain = [name for name in names if (m := _WHOLE.fullmatch(name)) and int(m[1]) == 0]
    whole = dict(enumerate(folder / name for name in plain[:1]))
    parallel = [n for n in names if (m := _WHOLE.fullmatch(n) or _MODEL_RANK.fullmatch(n)) and int(m[1])]
    if parallel:
        problems.add(
            f"it is split by model parallelism too ({parallel[0]}), and only data parallelism can be read"
        )
    for pattern, what in _REFUSED:
        found = next((name for name in names if pattern.fullmatch(name)), None)
        if found:
            problems.add(f"it has {what}: {found}")
    problems.raise_if_any()
    if shards and whole:
        raise FormatError(
            f"{folder} holds model states of stage 3 ({shards[min(shards)].name}) and of stages 0 to 2 "
            f"({whole[0].name}), so files of two runs are mixed; save the checkpoint again into a new folder"
        )
    if not shards and not whole:
        raise FormatError(
            f"{folder} has no model states: mp_rank_00_model_states.pt or "
            "zero_pp_rank_0_mp_rank_00_model_states.pt is missing; copy the whole folder"
        )
    return Files(folder, optimizer, shards or whole, bool(shards))


_MODEL_RANK = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_(\d+)_(?:optim|model)_states\.pt")


def _by_rank(folder: Path, names: list[str], pattern: re.Pattern[str], problems: Problems) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for name in names:
        match = pattern.fullmatch(name)
        if match is None or int(match[2]):
            continue
        rank = int(match[1])
        if rank in found:
            problems.add(f"rank {rank} has two files, {found[rank].name} and {name}; remove the older run's")
        found[rank] = folder / name
    return dict(sorted(found.items()))


def _tag_folder(path: Path, tag: str | None) -> Path:
    if tag is None and _has_states(path):
        return path
    latest = path / "latest"
    source = "the tag"
    if tag is None and latest.is_file():
        tag, source = latest.read_text(encoding="utf-8", errors="replace").strip(), str(latest)
    tags = _tags(path)
    if tag is not None:
        # what a file says must stay in its folder
        if tag in ("", ".", "..") or {"/", "\\", "\0"} & set(tag) or not (path / tag).is_dir():
            raise FormatError(f"{source} names {tag!r}, which is not a folder in {path}; {_has(tags)}")
        return path / tag
    if len(tags) == 1:
        return path / tags[0]
    raise FormatError(f"{path} has no file 'latest' that says which checkpoint to read; {_has(tags)}")


def _has(tags: list[str]) -> str:
    return f"name one of its folders instead: {', '.join(tags)}" if tags else "it has no checkpoint's folder"


def _tags(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and _has_states(p))


def _has_states(folder: Path) -> bool:
    """Whether files of an engine lie in the folder itself."""
    patterns = (_OPTIMIZER, _SHARD, _WHOLE)
    return any(pattern.fullmatch(p.name) for p in folder.iterdir() for pattern in patterns)
