"""Everything beside the weights: configuration, tokenizer, model card."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import torch

from ..checkpoint import PIPELINE, Checkpoint, read_json
from ..weight_names import SUFFIXES

_OWN = {"README.md", "graft.json", "config.json", PIPELINE}
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def small_files(base: Checkpoint, adapter: Path, vocabulary_grew: bool) -> dict[str, Path]:
    """Files to copy: relative name → source. Weights, the card and hidden files stay behind.

    A pipeline's models are treated alike, each in its folder. A tokenizer beside the adapter is taken only
    when the vocabulary grew: then it is the one that fits.
    """
    found = {
        path.name: path
        for path in sorted(base.folder.iterdir())
        if path.is_file() and not _left_out(path) and path.name not in _OWN
    }
    for component, model in base.parts.items():
        mine = small_files(model, adapter, vocabulary_grew=False)
        found.update({f"{component}/{name}": path for name, path in mine.items()})
    for folder in sorted(p for p in base.folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if folder.name in base.parts:
            continue
        files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")]
        if folder.name in _modules(base.folder) or not any(p.suffix in SUFFIXES for p in files):
            found.update({str(p.relative_to(base.folder)): p for p in files})
    if vocabulary_grew and adapter.is_dir():
        found.update({name: adapter / name for name in _TOKENIZER if (adapter / name).is_file()})
    return found


def _left_out(path: Path) -> bool:
    index = re.search(r"\.index\.(\w+\.)?json$", path.name)
    return path.name.startswith(".") or path.suffix in SUFFIXES or index is not None


def _modules(folder: Path) -> set[str]:
    """Directories that sentence-transformers' modules.json calls parts of the model."""
    path = folder / "modules.json"
    if not path.is_file():
        return set()
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        return {str(one["path"]).split("/")[0] for one in modules if one.get("path")}
    except (ValueError, TypeError, KeyError, AttributeError):
        return set()


def configurations(
    base: Checkpoint,
    *,
    dtype: torch.dtype | None,
    rows: Mapping[str, tuple[int, int]],
    changes: Mapping[str, object],
    added: Iterable[str],
) -> tuple[dict[str, bytes], list[str]]:
    """Path → content of the output's configurations, and sentences on what changed.

    The last is the one without which nothing loads: ``config.json``, a pipeline's ``model_index.json``.

    Args:
        dtype: the new dtype of the weights, if one was asked for.
        rows: vocabulary tensors that grew: name → (old rows, new rows).
        changes: further entries, of the model that gets the tensors ``added``.
    """
    found: dict[str, bytes] = {}
    notes: list[str] = []
    for folder, model in base.models.items():
        start = f"{folder}." if folder else ""
        grown = {name: counts for name, counts in rows.items() if name.startswith(start)}
        mine = changes if not folder or any(name.startswith(start) for name in added) else {}
        text, said = _changed_config(model, dtype=dtype, rows=grown, changes=mine)
        notes += [f"{folder}: {note}" if folder else note for note in said]
        if text is not None:
            found[f"{folder}/config.json" if folder else "config.json"] = text
    if base.parts:
        found[PIPELINE] = (base.folder / PIPELINE).read_bytes()
    return found, notes


def _changed_config(
    base: Checkpoint,
    *,
    dtype: torch.dtype | None,
    rows: Mapping[str, tuple[int, int]],
    changes: Mapping[str, object],
) -> tuple[bytes | None, list[str]]:
    """One model's ``config.json``; None if the base has none."""
    path = base.folder / "config.json"
    if not path.exists():
        return None, ["the base has no config.json, so the output has none either"]
    config, notes = read_json(path), list[str]()
    before = json.dumps(config)
    told = config.get("text_config")
    nested = cast("dict[str, object]", told) if isinstance(told, dict) else {}
    for part in (config, nested):
        for old, new in set(rows.values()):
            if part.get("vocab_size") == old:
                part["vocab_size"] = new
        for key in ("dtype", "torch_dtype"):
            if dtype is not None and key in part:
                part[key] = _name(dtype)
        for key, value in changes.items():
            if part is config or key in part:
                part[key] = value
    if dtype is not None and not {"dtype", "torch_dtype", "_diffusers_version"} & set(config):
        config[_dtype_key(config)] = _name(dtype)
    for name, (old, new) in rows.items():
        notes.append(f"{name}: the vocabulary grew from {old} to {new}")
    if json.dumps(config) == before:
        return path.read_bytes(), notes
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(), notes


def _dtype_key(config: Mapping[str, object]) -> str:
    """``dtype`` for transformers 5 and later, ``torch_dtype`` before."""
    version = re.match(r"(\d+)", str(config.get("transformers_version", "")))
    return "dtype" if version and int(version[1]) >= 5 else "torch_dtype"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def model_card(base: Checkpoint, name: str, adapter: str, scale: float, lines: list[str]) -> str:
    """A README.md with the front matter that the hub reads."""
    front = {"base_model": [name], "base_model_relation": "merge", "tags": ["graft", "lora", "merge"]}
    if "_diffusers_version" in base.config:
        front["library_name"] = "diffusers"
    elif (base.folder / "config.json").exists():
        front["library_name"] = "transformers"
    told = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items())
    kept = "".join(f"{line}\n" for line in _kept_front_matter(base.folder / "README.md"))
    by = "" if scale == 1.0 else f", multiplied by {scale:g}"
    facts = "".join(f"- {line}\n" for line in lines)
    return (
        f"---\n{told}\n{kept}---\n\n# {name} + {adapter}\n\n"
        f"The weights of `{name}` with the LoRA adapter `{adapter}`{by} fused into them by Graft.\n"
        "Every fused weight is W + ΔW rounded once to nearest even; all others are the base's, bit for bit.\n"
        f"`graft.json` records inputs, hashes and changed tensors.\n\n{facts}"
    )


def _kept_front_matter(path: Path) -> list[str]:
    """The base card's one-line statements that hold for the fused model too."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in [line.strip() for line in lines[1:]]:
        return []
    end = [line.strip() for line in lines[1:]].index("---") + 1
    keys = re.compile(r"(license|license_name|license_link|language|pipeline_tag):\s*\S")
    return [line.rstrip() for line in lines[1:end] if keys.match(line)]
