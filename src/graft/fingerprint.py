"""Which base an adapter was trained on: a fingerprint of each adapted weight, saved with the adapter.

Names and shapes do not tell two models of one family apart; a checksum of the first 16 KiB of each adapted
weight does, and costs next to nothing to check. An adapter without fingerprints (every adapter that Graft
did not write) is taken as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import cast

import torch

from .checksum import checksum
from .errors import BaseMismatchError, Problems

#: key of the fingerprints in the metadata of a safetensors file
METADATA_KEY = "graft.base"
_BYTES = 16384


def fingerprint(weight: torch.Tensor) -> str:
    """``dtype:checksum`` of the first 16 KiB of a weight, in row-major order."""
    count = min(weight.numel(), _BYTES // weight.element_size())
    width = max(1, weight[0].numel()) if weight.dim() > 1 else 1
    rows = weight.detach()[: -(-count // width)]
    head = rows.contiguous().view(-1)[:count]
    return f"{str(weight.dtype).removeprefix('torch.')}:{checksum(head):016x}"


def rounded(head: torch.Tensor) -> str:
    """The fingerprint of a tensor's beginning, and for float32 those of its roundings to 16 bits, by spaces.

    A frozen weight that was widened for training still is its base's to the last bit.

    Args:
        head: the first 16384 elements, or all.
    """
    halves = (torch.bfloat16, torch.float16) if head.dtype == torch.float32 else ()
    return " ".join(fingerprint(one) for one in (head, *(head.to(half) for half in halves)))


def dumps(base: Mapping[str, str]) -> dict[str, str]:
    """Metadata for a safetensors file; empty without fingerprints."""
    return {METADATA_KEY: json.dumps(dict(base), sort_keys=True)} if base else {}


def loads(metadata: Mapping[str, str]) -> dict[str, str]:
    """The fingerprints in a file's metadata; empty if there are none that can be read."""
    try:
        found: object = json.loads(metadata.get(METADATA_KEY, "{}"))
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    return {str(k): str(v) for k, v in cast("dict[object, object]", found).items()}


def check(recorded: Mapping[str, str], weight: Callable[[str], torch.Tensor | None]) -> None:
    """Compare the recorded fingerprints with a base.

    Args:
        recorded: parameter name → fingerprint (:func:`fingerprint`, :func:`rounded`), under the base's names.
        weight: the base's tensor of a name; None if it cannot be had cheaply (then it is not compared).
    Raises:
        BaseMismatchError: weights of the recorded dtype that hold other numbers.
    """
    compared, other = 0, Problems(BaseMismatchError, "the adapter was trained on another base:", shown=4)
    for name, expected in recorded.items():
        tensor = weight(name)
        told = {one.partition(":")[0]: one for one in expected.split()}
        dtype = "" if tensor is None else str(tensor.dtype).removeprefix("torch.")
        if tensor is None or dtype not in told:
            continue
        compared += 1
        if fingerprint(tensor) != told[dtype]:
            other.add(f"{name} holds other numbers than the base that the adapter was saved with")
    other.raise_if_any(
        "Use the base that the adapter was trained on; if this base is meant (a later version of it, say), "
        "pass --other-base (other_base=True)"
    )
