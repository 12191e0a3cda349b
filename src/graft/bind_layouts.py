"""Which layout a stored parameter has, told by the factors' shapes and, where they cannot, by the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from .adapter import LowRank
from .layout import Layout

#: modules whose rows are the vocabulary: the only ones that may grow
EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared", "embeddings", "embed"}
    | {"token_embedding", "tok_embed"}
)
HEADS = frozenset({"lm_head", "embed_out", "output", "output_projection", "decoder", "head"})

Transposed = Callable[[str], "bool | None"]

#: transformers' model types with GPT-2's Conv1D (weight ``[in, out]``) and the modules that are one
_CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"})
_CONV1D_MODULES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
#: transformers' model types whose packed experts are ``[E, in, out]``
_EXPERTS_IN_OUT = frozenset(
    {"gpt_oss", "aria", "aria_text", "openai_privacy_filter", "llama4", "llama4_text"}
)


class Misfit(Exception):
    """Why the factors do not fit; one line, or several aligned ones, for the user."""


@dataclass(frozen=True)
class Witness:
    """Who tells a square weight's orientation: the caller, then the model's type."""

    config: Mapping[str, object] | None = None
    transposed: Transposed | None = None

    def linear(self, name: str) -> bool | None:
        """Whether a linear weight of this name is stored ``[in, out]``; None if nobody knows."""
        if self.transposed is not None and (said := self.transposed(name)) is not None:
            return said
        kind = self._model_type()
        if kind is None:
            return None
        return kind in _CONV1D_TYPES and _module(name) in _CONV1D_MODULES

    def experts(self, name: str) -> bool | None:
        """Whether packed experts of this name are stored ``[E, in, out]``; None if nobody knows."""
        if self.transposed is not None and (said := self.transposed(name)) is not None:
            return said
        kind = self._model_type()
        return None if kind is None else kind in _EXPERTS_IN_OUT

    def _model_type(self) -> str | None:
        kind = (self.config or {}).get("model_type")
        return kind if isinstance(kind, str) else None


def fit(site: LowRank, name: str, shape: tuple[int, ...], witness: Witness) -> LowRank:
    """The site with its layout and shape.

    Raises:
        Misfit: the factors do not fit the stored parameter, or fit it in more than one way.
    """
    if site.layout is not None and (site.kind != "loralib" or site.shape is not None):
        fitted = _with(site, site.layout, shape) if _fits(site, site.layout, shape) else None
    else:
        fitted = _FITTERS[site.kind](site, name, shape, witness)
    if fitted is None or (site.shape is not None and site.shape != shape):
        raise Misfit(_expected(site, shape))
    assert fitted.layout is not None
    if fitted.magnitude is not None:
        g, o, _ = fitted.layout.dims(shape)
        if fitted.magnitude.numel() != g * o:
            raise Misfit(
                f"its DoRA magnitude has {fitted.magnitude.numel()} entries, the weight has {g * o} rows"
            )
    return fitted


def _fits(site: LowRank, layout: Layout, shape: tuple[int, ...]) -> bool:
    try:
        want = layout.factor_shapes(shape, site.rank)
    except ValueError:
        return False
    return want == (tuple(site.A.shape), tuple(site.B.shape))


def _with(site: LowRank, layout: Layout, shape: tuple[int, ...]) -> LowRank:
    return replace(site, layout=layout, shape=shape, among=())


def _linear(site: LowRank, name: str, shape: tuple[int, ...], witness: Witness) -> LowRank | None:
    if len(shape) != 2:
        return None
    plain, turned = (_fits(site, Layout(pattern), shape) for pattern in ("o i", "i o"))
    if plain and turned:
        said = witness.linear(name)
        turned = site.fan_in_fan_out if said is None else said
        if turned is None:
            raise Misfit(
                f"the weight {list(shape)} is square and nothing says whether it is stored [out, in] or "
                "[in, out] (GPT-2's Conv1D); set fan_in_fan_out in adapter_config.json, or give the base's "
                "config"
            )
        plain = not turned
    return _with(site, Layout("o i" if plain else "i o"), shape) if plain or turned else None


def _embedding(site: LowRank, name: str, shape: tuple[int, ...], witness: Witness) -> LowRank | None:
    layout = Layout("i o")
    return _with(site, layout, shape) if len(shape) == 2 and _fits(site, layout, shape) else None


def _conv(site: LowRank, name: str, shape: tuple[int, ...], witness: Witness) -> LowRank | None:
    layout = Layout("o i")
    return _with(site, layout, shape) if len(shape) >= 3 and _fits(site, layout, shape) else None


def _projection(site: LowRank, name: str, shape: tuple[int, ...], witness: Witness) -> LowRank | None:
    """A linear layer, or the convolution of kernel 1 that other versions of a model have in its place."""
    if len(shape) == 2:
        return _linear(replace(site, kind="linear"), name, shape, witness)
    one = all(size == 1 for size in shape[2:])
    return _conv(replace(site, kind="conv"), name, shape, witness) if one else None


def _parameter(site: LowRank, name: str, shape: tuple[int, ...], witness: Witness) -> LowRank | None:
    if len(shape) == 2:
        return _with(site, Layout("o i"), shape) if _fits(site, Layout("o i"), shape) else None
    if len(shape) != 3:
        return None
    plain, turned = Layout("g o i", shape[0]), Layout("g i o", shape[0])
    fitting = [layout for layout in (plain, turned) if _fits(site, layout, shape)]
    if len(fitting) < 2:
        return _with(site, fitting[0], shape) if fitting else None
    said = site.fan_in_fan_out if site.fan_in_fan_out is not None else witness.experts(name)
    if said is None:
        raise Misfit(
            f"each expert of {list(shape)} is square and nothing says whether it is stored [out, in] or "
            "[in, out]; give the base's config, or call bind with transposed="
        )
    return _with(site, turned if said else plain, shape)


def _loralib(site: LowRank, name: str, shape: tuple[int, ...], witness: Witness) -> LowRank | None:
    """loralib's four storages, told apart by shape: see :mod:`graft.formats.loralib`."""
    if len(shape) > 2:
        return _loralib_conv(site, shape)
    if len(shape) < 2:
        return None
    if site.layout is not None and _any_fits(site, shape):
        return _named(_oriented(site, site.layout, name, shape, witness), name, witness)
    site = replace(site, layout=None)
    if site.A.shape[0] == site.rank:
        if is_embedding(name) and _fits(site, Layout("i o"), shape):
            return replace(_with(site, Layout("i o"), shape), kind="embedding")
        fitted = _linear(site, name, shape, witness)
        if fitted is not None:
            return _named(fitted, name, witness)
    return _named(_merged(site, name, shape, witness), name, witness)


def _graft(site: LowRank, name: str, shape: tuple[int, ...], witness: Witness) -> LowRank | None:
    """Graft's own storage, ``A [(g r), i]`` and ``B [(g o), r]`` of any layout."""
    if len(shape) < 3:
        return _loralib(replace(site, kind="loralib"), name, shape, witness)
    if len(shape) == 3 and name.rpartition(".")[2] != "weight":
        return _parameter(replace(site, kind="parameter"), name, shape, witness)
    groups = site.A.shape[0] // site.rank
    for layout in (Layout("(g o) i", groups), Layout("(g i) o", groups)):
        if _fits(site, layout, shape):
            return replace(_with(site, layout, shape), kind="conv")
    return None


def _module(name: str) -> str:
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else ""


def is_embedding(name: str) -> bool:
    """Whether a parameter of this name is an embedding's, by its module."""
    return _module(name) in EMBEDDINGS


def _named(site: LowRank | None, name: str, witness: Witness) -> LowRank | None:
    """``kind`` of a module that only shapes describe; ``i o`` alone may be an Embedding or a Conv1D."""
    if site is None or site.layout is None:
        return None
    if site.layout.pattern != "i o" or _module(name) in _CONV1D_MODULES:
        return replace(site, kind="linear")
    known = is_embedding(name) or witness.linear(name) is False
    return replace(site, kind="embedding") if known else site


def _loralib_conv(site: LowRank, shape: tuple[int, ...]) -> LowRank | None:
    """ΔW of a convolution with kernel k is ``(B·A).view(W.shape)``, of rank r·k; alpha is divided by r."""
    kernel, columns = shape[2], site.A.shape[1]
    if math.prod(shape) % columns or site.rank % kernel:
        return None
    layout = Layout("o i", matrix=(math.prod(shape) // columns, columns))
    if not _fits(site, layout, shape):
        return None
    return replace(_with(site, layout, shape), scale=site.scale * kernel, kind="conv")


def _merged(site: LowRank, name: str, shape: tuple[int, ...], witness: Witness) -> LowRank | None:
    """MergedLinear without ``enable_lora``: sure only when every block is enabled."""
    enabled = site.A.shape[0] // site.rank
    for full in (0, 1):
        if (site.A.shape[1], site.B.shape[0]) == (shape[1 - full], shape[full]):
            break
    else:
        if _blocks(site, shape):
            raise Misfit(
                f"a MergedLinear with {enabled} enabled block(s) of {site.B.shape[0] // enabled} outputs, of "
                f"a weight {list(shape)}; which blocks are enabled is not in the file: give "
                "--enable-lora 1,0,1 (enable_lora=[True, False, True])"
            )
        return None
    return _oriented(site, Layout("(g o) i", enabled), name, shape, witness)


def _blocks(site: LowRank, shape: tuple[int, ...]) -> bool:
    block = site.B.shape[0] // (site.A.shape[0] // site.rank)
    return any(
        site.A.shape[1] == shape[1 - full] and shape[full] % block == 0 and shape[full] > site.B.shape[0]
        for full in (0, 1)
    )


def _turned(layout: Layout) -> Layout:
    return replace(layout, pattern="i (g o)")


def _any_fits(site: LowRank, shape: tuple[int, ...]) -> bool:
    assert site.layout is not None
    return _fits(site, site.layout, shape) or _fits(site, _turned(site.layout), shape)


def _oriented(
    site: LowRank, layout: Layout, name: str, shape: tuple[int, ...], witness: Witness
) -> LowRank | None:
    plain, turned = _fits(site, layout, shape), _fits(site, _turned(layout), shape)
    if plain and turned:
        said = witness.linear(name)
        said = site.fan_in_fan_out if said is None else said
        if said is None:
            raise Misfit(
                f"the weight {list(shape)} is square and nothing says how it is stored; give the config"
            )
        plain = not said
    return _with(site, layout if plain else _turned(layout), shape) if plain or turned else None


_FITTERS: Mapping[str, Callable[[LowRank, str, tuple[int, ...], Witness], LowRank | None]] = {
    "linear": _linear,
    "embedding": _embedding,
    "conv": _conv,
    "projection": _projection,
    "parameter": _parameter,
    "loralib": _loralib,
    "graft": _graft,
}


def _expected(site: LowRank, shape: tuple[int, ...]) -> str:
    if site.shape is not None:
        return (
            f"shapes differ\n      adapter made for {list(site.shape)}\n      base has         {list(shape)}"
        )
    return (
        f"its factors do not fit the base's weight\n      base has {list(shape)}\n"
        f"      A is     {list(site.A.shape)}\n      B is     {list(site.B.shape)}"
    )
