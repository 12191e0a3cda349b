"""Names that are spelled with ``_`` in the place of ``.`` (kohya's), against the names of a base.

``down_blocks_0_attentions_1_proj_in`` may be read in many ways; only the base's own names say which is
meant. One prefix of the base's names (``unet_``) may be missing from all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from .adapter import Adapter
from .bind_names import nearest
from .errors import BaseMismatchError, Problems


def spelled_out(adapter: Adapter, base: Iterable[str]) -> Adapter:
    """The adapter under the base's dotted names.

    Raises:
        BaseMismatchError: names that are none of the base's, or more than one; all in one message.
    """
    if not adapter.flattened:
        return adapter
    meant: dict[str, list[str]] = {}
    for name in base:
        meant.setdefault(flat(name), []).append(name)
    prefix = _prefix(adapter.touched, meant)
    problems = Problems(BaseMismatchError, "the adapter's names are spelled with _ for ., and of the base's:")
    names: dict[str, str] = {}
    for key in sorted(adapter.touched):
        found = meant.get(prefix + key, [])
        if len(found) == 1:
            names[key] = found[0]
        elif found:
            problems.add(f"{key} may be any of {', '.join(found)}")
        else:
            problems.add(f"{key} is none{nearest(key, list(meant))}")
    problems.raise_if_any("Use the base that the adapter was trained on, with the names that it had then")
    note = (f"names repaired: the prefix {prefix!r} was put in front",) if prefix else ()
    return replace(
        adapter,
        sites={names[key]: site for key, site in adapter.sites.items()},
        replace={names[key]: tensor for key, tensor in adapter.replace.items()},
        shift={names[key]: value for key, value in adapter.shift.items()},
        rows={names[key]: value for key, value in adapter.rows.items()},
        notes=(*adapter.notes, *note),
        flattened=False,
    )


def flat(name: str) -> str:
    """``a.b_c.weight`` as ``a_b_c.weight``: the parameter's own name stays apart."""
    module, dot, leaf = name.rpartition(".")
    return f"{module.replace('.', '_')}{dot}{leaf}"


def _prefix(keys: Iterable[str], meant: Mapping[str, list[str]]) -> str:
    """What stands before every key in the base's names; nothing if the keys are there, or none fits all."""
    keys = list(keys)
    missing = next((key for key in keys if key not in meant), None)
    if missing is None:
        return ""
    ends = [name.removesuffix(missing) for name in meant if name.endswith(f"_{missing}")]
    working = [start for start in ends if all(start + key in meant for key in keys)]
    if len(working) > 1:
        raise BaseMismatchError(
            f"the adapter's names fit the base under {len(working)} prefixes ({', '.join(working)}); "
            "rename its tensors"
        )
    return working[0] if working else ""
