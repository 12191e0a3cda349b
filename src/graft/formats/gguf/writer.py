"""The neutral carrier → a GGUF adapter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...adapter import Adapter, LowRank
from ...algebra import padded
from ...fingerprint import dumps
from ..blocks import joined
from ..holding import Holds
from ..ledger import listed
from ..protocol import Loss, Target, Written
from ..state_file import save_new
from ..uniform import with_scales
from .container import ALPHA, import_gguf
from .names import names_of, reordered

_HOLDS = Holds("GGUF", embeddings=True)
_EMBEDDING = "token_embd.weight"


def losses(adapter: Adapter, target: Target) -> list[Loss]:
    """What llama.cpp's adapters cannot hold: all but weights that its model has.

    Raises:
        FormatError: no base, or one that llama.cpp's conversion is not known for here.
    """
    names = names_of(target.model)
    found = _HOLDS.losses(adapter)
    lost = {loss.name for loss in found if loss.part == "site"}
    kept = {name: joined(site) for name, site in adapter.sites.items() if name not in lost}
    there = {names.place(name) for name in kept}
    for name, site in kept.items():
        place = names.place(name)
        if place is None:
            found.append(Loss("site", name, f"llama.cpp's {names.architecture} has no such weight"))
            continue
        layout, missing = (
            site.layout,
            [p for p in names.parameters[place.tensor] if names.places[p] not in there],
        )
        assert layout is not None
        if layout.pattern != ("i o" if place.tensor == _EMBEDDING else "o i"):
            found.append(Loss("site", name, f"llama.cpp stores {place.tensor} the other way round"))
        elif missing:
            why = f"all experts are one tensor, and {listed(missing, 2)} has no update"
            found.append(Loss("site", name, why))
    return found


def write(adapter: Adapter, path: Path, target: Target) -> Written:
    """Write the new file ``path``.

    GGUF has one alpha, and scale = alpha / rank: a scale that this does not give is met by padding with
    zeros or folded into B.

    Raises:
        OutputError: the file exists or cannot be written.
    """
    names = names_of(target.model)
    places = {names.place(name): joined(site) for name, site in adapter.sites.items()}
    sites = {p: places[place] for p, place in names.places.items() if place in places}
    tensors = {names.places[p].tensor: names.parameters[names.places[p].tensor] for p in sites}
    alpha = _alpha(list(sites.values()))
    for members in tensors.values():
        rank = _rank([sites[p] for p in members], alpha)
        sites |= {p: padded(sites[p], rank) for p in members}
    sites, notes = with_scales(sites, {p: alpha / site.rank for p, site in sites.items()})
    data: dict[str, torch.Tensor] = {}
    for tensor, members in tensors.items():
        stacked = names.places[members[0]].expert is not None
        a, b = [sites[p].A for p in members], [sites[p].B for p in members]
        if tensor in names.heads:
            b = [reordered(b[0], names.heads[tensor])]
        data[f"{tensor}.lora_a"] = a[0].mT if tensor == _EMBEDDING else _stacked(a, stacked)
        data[f"{tensor}.lora_b"] = _stacked(b, stacked)
    data, rounded = _storable(data)
    strings = {"adapter.type": "lora", **dumps(adapter.base)}
    if target.base_name:
        strings["general.base_model.0.name"] = target.base_name
    save_new(path, lambda staging: _save(staging, data, alpha, names.architecture, strings))
    return Written([*notes, *rounded])


def _alpha(sites: Sequence[LowRank]) -> float:
    """The alpha that most sites have, as the float32 that the file holds; zero would mean no alpha."""
    alphas = Counter(_float32(site.scale * site.rank) for site in sites)
    most = max(alphas.values())
    alpha = max(value for value, count in alphas.items() if count == most)
    return alpha if alpha and math.isfinite(alpha) else 1.0


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def _rank(sites: Sequence[LowRank], alpha: float) -> int:
    """The rank of one tensor's factors: where alpha / rank is their scale, if some padding reaches that."""
    largest, scale = max(site.rank for site in sites), sites[0].scale
    if any(site.scale != scale for site in sites) or not scale:
        return largest
    wanted, ratio = round(alpha / scale), scale / (alpha / largest)
    folds_exactly = math.frexp(ratio)[0] in (0.5, -0.5)
    reached = largest < wanted <= 4 * largest and alpha / wanted == scale
    return wanted if reached and not folds_exactly else largest


def _stacked(factors: Sequence[torch.Tensor], stacked: bool) -> torch.Tensor:
    if not stacked:
        return factors[0]
    dtype = factors[0].dtype
    for one in factors[1:]:
        dtype = torch.promote_types(dtype, one.dtype)
    return torch.stack([one.to(dtype) for one in factors])


def _storable(data: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """float64 as float32, which is ggml's widest; a note where that had to round."""
    found = {key: t.float() if t.dtype == torch.float64 else t for key, t in data.items()}
    inexact = [key for key, t in data.items() if not torch.equal(found[key].to(t.dtype), t)]
    if not inexact:
        return found, []
    return found, [f"float64 elements were rounded once to float32: {listed(inexact)}"]


def _save(
    path: Path,
    data: Mapping[str, torch.Tensor],
    alpha: float,
    architecture: str,
    strings: Mapping[str, str],
) -> None:
    gguf: Any = import_gguf("GGUF")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_float32(ALPHA, alpha)
    for key, value in strings.items():
        writer.add_string(key, value)
    if "general.base_model.0.name" in strings:
        writer.add_base_model_count(1)
    for key, tensor in data.items():
        whole = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)  # also for axes of size 1
        if whole.dtype == torch.bfloat16:  # numpy has none
            bytes_, kind = whole.view(torch.uint8), gguf.GGMLQuantizationType.BF16
            writer.add_tensor(key, bytes_.numpy(), raw_dtype=kind)
        else:
            writer.add_tensor(key, whole.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
