"""What is in an adapter or a model, told from its files without ever building a weight-sized tensor."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from . import formats
from .adapter import Adapter, LowRank
from .bind import bind
from .bind_components import only
from .checkpoint import PIPELINE
from .errors import FormatError
from .files import inputs
from .tensors import Checkpoint, open_checkpoint
from .weight_names import STEMS

#: what ``graft fuse`` leaves beside the weights
PROVENANCE = "graft.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class SiteReport:
    """One low-rank update.

    Args:
        name: the site's name: the file's own, or the base's if one is given.
        scale: the multiplier of B·A.
        parameters: numbers in A and B (and DoRA's magnitude).
        norm_A, norm_B: Frobenius norms.
        norm_delta: ``‖scale · B·A‖_F``.
        dead: B or A is zero throughout, so ΔW is zero.
        finite: neither factor holds a NaN or an infinity; the norms are None otherwise.
    """

    name: str
    kind: str
    rank: int
    scale: float
    shape_A: tuple[int, ...]
    shape_B: tuple[int, ...]
    dtype: str
    parameters: int
    norm_A: float | None
    norm_B: float | None
    norm_delta: float | None
    dead: bool
    finite: bool
    dora: bool


@dataclass(frozen=True)
class AdapterReport:
    """An adapter: its sites, and what it carries beside them."""

    path: str
    format: str
    base: str | None
    sites: tuple[SiteReport, ...]
    replaced: tuple[str, ...]
    shifted: tuple[str, ...]
    rows: dict[str, int]
    parameters: int
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    dtypes: dict[str, int]
    dead: tuple[str, ...]
    notes: tuple[str, ...]
    what: str = "adapter"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ModelReport:
    """A model directory: its tensors by dtype, and where it comes from if Graft fused it."""

    path: str
    model_type: str | None
    architectures: tuple[str, ...]
    files: tuple[str, ...]
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    components: dict[str, int]
    quantised: str | None
    fused: dict[str, Any] | None
    notes: tuple[str, ...]
    format: str = "huggingface"
    what: str = "model"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


InspectReport = AdapterReport | ModelReport


def inspect(
    path: Path | str,
    *,
    format: str | None = None,
    alpha: float | None = None,
    adapter_config: Path | None = None,
    base: Path | str | None = None,
    component: str | None = None,
) -> InspectReport:
    """Describe an adapter (directory or file), or a model directory.

    Args:
        path: an adapter in any format that :func:`graft.formats.read` knows, or a Hugging Face
            directory of a model, fused or not.
        format: the adapter's format, when its content does not tell.
        alpha: for formats that do not carry it; without it those report ``scale = 1/rank`` and say so.
        adapter_config: the adapter's configuration, when it lies elsewhere.
        base: the base: names are then its own, proved to fit.
        component: only the adapter's part for this model of a pipeline.
    Raises:
        FormatError: nothing that Graft knows, or damaged files.
        BaseMismatchError: an adapter that does not fit ``base``.
    """
    path = Path(path)
    if not path.exists():
        raise FormatError(f"{path} does not exist; give an adapter's folder or file, or a model's folder")
    if adapter_config is None and path.is_dir() and _is_model(path):
        return _model(path, open_checkpoint(path))
    found = None if base is None else inputs.open_base(base)
    model = None if found is None else found.config or None
    notes: tuple[str, ...] = ()
    if alpha is None:
        adapter, notes = _read_without_alpha(path, format, adapter_config, model)
    else:
        adapter = formats.read(path, format=format, alpha=alpha, config=adapter_config, model=model)
    if component is not None:
        adapter = only(adapter, component)
    if found is not None:
        adapter = bind(adapter, found.shapes, config=found.config)
    return _adapter(path, adapter, notes)


def norm_of_product(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖B·A‖_F over all groups, from the Gram matrices: ``‖BA‖²_F = tr((BᵀB)(AAᵀ))``.

    Args:
        a: ``[(n r), i]``.
        b: ``[(n o), r]``; the n groups' products do not overlap.
    """
    rank = b.shape[1]
    n = max(1, a.shape[0] // max(rank, 1))
    total = 0.0
    for x, y in zip(a.double().chunk(n), b.double().chunk(n), strict=True):
        # torch.sum of an elementwise product is the trace, as both Gram matrices are symmetric
        total += float(((y.T @ y) * (x @ x.T)).sum())
    return math.sqrt(max(total, 0.0))


def _is_model(folder: Path) -> bool:
    names = {p.name for p in folder.iterdir()}
    if "adapter_config.json" in names:
        return False
    if PIPELINE in names or any(n.endswith(".index.json") for n in names):
        return True
    return "config.json" in names and any(
        n.startswith((*STEMS, *STEMS.values())) and n.endswith(_WEIGHT_SUFFIXES) for n in names
    )


def _read_without_alpha(
    path: Path, format: str | None, config: Path | None, model: Mapping[str, object] | None
) -> tuple[Adapter, tuple[str, ...]]:
    """Inspecting must not need what only fusing needs: an alpha to be given is noted, not asked for."""
    try:
        return formats.read(path, format=format, config=config, model=model), ()
    except FormatError as refused:
        if "--alpha" not in str(refused):
            raise
        try:
            adapter = formats.read(path, format=format, alpha=1.0, config=config, model=model)
        except FormatError:
            raise refused from None
    return adapter, ("the files carry no alpha: scales and ‖ΔW‖ are shown for alpha = 1; give --alpha",)


def _adapter(path: Path, adapter: Adapter, notes: tuple[str, ...]) -> AdapterReport:
    sites = tuple(_site(name, site) for name, site in sorted(adapter.sites.items()))
    extra = [*adapter.replace.values(), *(t for t, _ in adapter.shift.values())]
    extra += [t for _, t in adapter.rows.values()]
    dtypes = Counter(site.dtype for site in sites)
    dtypes.update(_dtype(t) for t in extra)
    return AdapterReport(
        path=str(path),
        format=adapter.format,
        base=_text(adapter.config.get("base_model_name_or_path")),
        sites=sites,
        replaced=tuple(sorted(adapter.replace)),
        shifted=tuple(sorted(adapter.shift)),
        rows={name: len(indices) for name, (indices, _) in sorted(adapter.rows.items())},
        parameters=sum(s.parameters for s in sites) + sum(t.numel() for t in extra),
        ranks=tuple(sorted({s.rank for s in sites})),
        scales=tuple(sorted({s.scale for s in sites})),
        dtypes=dict(dtypes),
        dead=tuple(s.name for s in sites if s.dead),
        notes=(*notes, *adapter.notes),
    )


def _site(name: str, site: LowRank) -> SiteReport:
    a, b = site.A.double(), site.B.double()
    norm_a, norm_b = float(a.norm()), float(b.norm())
    finite = math.isfinite(norm_a) and math.isfinite(norm_b)
    magnitude = 0 if site.magnitude is None else site.magnitude.numel()
    return SiteReport(
        name=name,
        kind=site.kind,
        rank=site.rank,
        scale=site.scale,
        shape_A=tuple(site.A.shape),
        shape_B=tuple(site.B.shape),
        dtype=_dtype(site.A),
        parameters=site.A.numel() + site.B.numel() + magnitude,
        norm_A=norm_a if finite else None,
        norm_B=norm_b if finite else None,
        norm_delta=abs(site.scale) * norm_of_product(a, b) if finite else None,
        dead=norm_a == 0 or norm_b == 0,
        finite=finite,
        dora=site.magnitude is not None,
    )


def _model(path: Path, checkpoint: Checkpoint) -> ModelReport:
    entries, config = checkpoint.entries.values(), checkpoint.config
    dtypes: Counter[str] = Counter()
    for entry in entries:
        dtypes[str(entry.dtype).removeprefix("torch.")] += math.prod(entry.shape)
    quantised = next(filter(None, (_quantised(part.config) for part in checkpoint.models.values())), None)
    notes = [] if quantised is None else [f"quantised ({quantised}): dequantise it before fusing into it"]
    if not config:
        notes.append("there is no config.json: transformers cannot load this directory")
    return ModelReport(
        path=str(path),
        model_type=_text(config.get("model_type")),
        architectures=_texts(config.get("architectures")) or _texts([config.get("_class_name")]),
        files=tuple(sorted({checkpoint.place(entry.file) for entry in entries})),
        components={name: len(part.entries) for name, part in checkpoint.parts.items()},
        tensors=len(checkpoint.entries),
        parameters=sum(dtypes.values()),
        bytes=sum(entry.nbytes for entry in entries),
        dtypes=dict(dtypes.most_common()),
        quantised=quantised,
        fused=_provenance(path),
        notes=tuple(notes),
    )


def _quantised(config: Mapping[str, Any]) -> str | None:
    found = config.get("quantization_config")
    return str(found.get("quant_method", "unknown method")) if isinstance(found, dict) else None


def _provenance(folder: Path) -> dict[str, Any] | None:
    file = folder / PROVENANCE
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise FormatError(f"{file} is not valid JSON: {e}. Fuse again to write it anew") from e
    if not isinstance(found, dict):
        raise FormatError(f"{file} must hold a JSON object, got {type(found).__name__}. Fuse again")
    return found


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _texts(value: object) -> tuple[str, ...]:
    return tuple(str(one) for one in cast("list[object]", value) if one) if isinstance(value, list) else ()
