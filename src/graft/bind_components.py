"""An adapter for the models of a diffusers pipeline, against the pipeline or against one of its models.

Such an adapter's names begin with the component that they are of (``unet.down_blocks.…``), and so do the
names of a whole pipeline. Against a pipeline each component is bound on its own: its prefix, if one must be
repaired, is nobody else's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from .adapter import Adapter
from .errors import BaseMismatchError, FormatError

Shapes = Mapping[str, tuple[int, ...]]

#: what a pipeline may call a component, where files have one name for several: kohya's ``lora_unet`` and
#: ComfyUI's ``diffusion_model`` are any denoiser, and kohya's ``lora_te3`` is T5, the third text encoder of
#: SD 3 and the second of Flux
_DENOISERS = ("unet", "transformer", "prior")
_MEANT = {
    "unet": _DENOISERS,
    "diffusion_model": _DENOISERS,
    "text_encoder_3": ("text_encoder_3", "text_encoder_2"),
}


def only(adapter: Adapter, component: str) -> Adapter:
    """The part of the adapter that is for this component; a note on what is left out.

    Raises:
        FormatError: the adapter has no part for it.
    """
    known = sorted(adapter.components)
    name = component if component in known else _meaning(component, known)
    if name is None:
        has = f"its components are {', '.join(known)}" if known else "its names are one model's"
        raise FormatError(f"the adapter has nothing for the component {component!r}: {has}")
    rest = _counts(adapter, [one for one in known if one != name])
    note = (f"only the part for {name} is used, as asked; left out: {rest}",) if rest else ()
    part = adapter.renamed(lambda full: full if full.startswith(f"{name}.") else None)
    return replace(part, components=frozenset({name}), notes=(*adapter.notes, *note))


def _meaning(component: str, known: list[str]) -> str | None:
    """The file's name of what the pipeline calls ``component``."""
    return next((name for name in known if component in _MEANT.get(name, ())), None)


def bind_each(adapter: Adapter, base: Shapes, bind: Callable[[Adapter, Shapes, str], Adapter]) -> Adapter:
    """Bind an adapter of components.

    Args:
        base: the shapes of a pipeline, whose names begin with the component, or of one model.
        bind: binds one component's part to one model's shapes; the third argument is what stands before
            that model's names in the base.
    Raises:
        BaseMismatchError: a component that the base lacks, several components for one model, or whatever
            ``bind`` raises, of all components.
    """
    folders = {name.partition(".")[0] for name in base}
    places = _places(adapter.components, folders)
    if not any(places.values()):
        (name,) = _one(adapter)
        part = bind(_part(adapter, name), base, "")
        return replace(part, notes=(*adapter.notes, *part.notes))
    missing = [name for name, place in places.items() if place is None]
    if missing:
        raise BaseMismatchError(
            f"the adapter changes {_counts(adapter, missing)}, and the base has no such component; it has "
            f"{', '.join(sorted(folders))}. Use the pipeline that the adapter was trained on, or leave that "
            "part out with --component"
        )
    bound: dict[str, Adapter] = {}
    problems: list[str] = []
    for name, place in places.items():
        assert place is not None
        inner = {n.removeprefix(f"{place}."): s for n, s in base.items() if n.startswith(f"{place}.")}
        try:
            bound[place] = bind(_part(adapter, name), inner, f"{place}.")
        except BaseMismatchError as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise BaseMismatchError("\n".join(problems))
    renamed = [f"{name} is this pipeline's {place}" for name, place in places.items() if name != place]
    return _joined(adapter, bound, [f"the file's {said}" for said in renamed])


def _places(components: Iterable[str], folders: set[str]) -> dict[str, str | None]:
    """Each component → the base's folder that it is for; None if the base has none."""
    exact = {name for name in components if name in folders}
    found: dict[str, str | None] = {}
    for name in sorted(components):
        meant = (name,) if name in exact else _MEANT.get(name, ())
        found[name] = next(
            (one for one in meant if one in folders and (one == name or one not in exact)), None
        )
    return found


def _one(adapter: Adapter) -> list[str]:
    """The only component.

    Raises:
        BaseMismatchError: there are several.
    """
    names = sorted(adapter.components)
    if len(names) > 1:
        raise BaseMismatchError(
            f"the adapter changes several models of a pipeline: {_counts(adapter, names)}; the base is one "
            "model. Give the whole pipeline as the base (the directory with model_index.json), or choose the "
            f"part that this model is: {' or '.join(f'--component {name}' for name in names)} "
            f"(in Python component={names[0]!r})"
        )
    return names


def _counts(adapter: Adapter, components: Iterable[str]) -> str:
    counts = Counter(name.partition(".")[0] for name in adapter.touched)
    return ", ".join(f"{name} ({counts[name]} updates)" for name in components)


def _part(adapter: Adapter, component: str) -> Adapter:
    """What is for one component, under that model's own names; without notes."""
    start = f"{component}."
    part = adapter.renamed(lambda name: name.removeprefix(start) if name.startswith(start) else None)
    return replace(part, components=frozenset[str](), notes=())


def _joined(adapter: Adapter, parts: Mapping[str, Adapter], notes: list[str]) -> Adapter:
    """The bound parts as one adapter of the pipeline."""
    whole = Adapter({})
    for place, part in parts.items():
        mine = part.renamed(lambda name, place=place: f"{place}.{name}")
        whole = replace(
            whole,
            sites={**whole.sites, **mine.sites},
            replace={**whole.replace, **mine.replace},
            shift={**whole.shift, **mine.shift},
            rows={**whole.rows, **mine.rows},
            base={**whole.base, **mine.base},
            notes=(*whole.notes, *(f"{place}: {note}" for note in part.notes)),
        )
    return replace(
        whole,
        format=adapter.format,
        config=adapter.config,
        files=adapter.files,
        notes=(*adapter.notes, *notes, *whole.notes),
    )
