"""Which model of a diffusers pipeline an adapter is for, where a format's names begin with it."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping

from ..adapter import Adapter
from ..errors import FormatError
from .protocol import Loss, Target

#: names of a pipeline's models that are trained with LoRA
COMPONENT = re.compile(r"(unet|transformer|prior|text_encoder)(_[2-9])?")


def is_pipeline(model: Mapping[str, object]) -> bool:
    """Whether this is the content of a pipeline's ``model_index.json``."""
    return "_diffusers_version" in model and str(model.get("_class_name", "")).endswith("Pipeline")


def with_components(adapter: Adapter, target: Target, format: str) -> dict[str, tuple[str, str]]:
    """Each adapted parameter → its component, and its name within that.

    Names that were bound to a pipeline begin with it; for one model's names the base's configuration says
    which component such a model is.

    Raises:
        FormatError: nothing says it.
    """
    model = target.model
    firsts = {name.partition(".")[0] for name in adapter.sites}
    if is_pipeline(model) if model is not None else all(COMPONENT.fullmatch(first) for first in firsts):
        split = {name: name.partition(".") for name in adapter.sites}
        return {name: (first, rest) for name, (first, _, rest) in split.items()}
    component = _of(model or {})
    if component is None:
        raise FormatError(
            f"{format} names begin with the model's place in a pipeline (unet, transformer, text_encoder), "
            "and nothing here says it; give the base, a pipeline or one of its models: --base BASE"
        )
    return {name: (component, name) for name in adapter.sites}


def nameless(format: str, names: Mapping[str, tuple[str, str]], known: Container[str] | None) -> list[Loss]:
    """Sites that the format has no name for.

    Args:
        names: of :func:`with_components`.
        known: the components that it has a name for; None if it takes any of :data:`COMPONENT`.
    """
    found: list[Loss] = []
    for name, (component, rest) in names.items():
        there = component in known if known is not None else COMPONENT.fullmatch(component) is not None
        if not there:
            found.append(Loss("site", name, f"{format} has no name for the component {component}"))
        elif "." not in rest:
            found.append(Loss("site", name, f"{format} has no name for a model that is one layer"))
    return found


def _of(model: Mapping[str, object]) -> str | None:
    """The component that a model with this ``config.json`` is."""
    name = str(model.get("_class_name", ""))
    if "UNet" in name:
        return "unet"
    if "Transformer" in name:
        return "transformer"
    return "text_encoder" if "model_type" in model else None
