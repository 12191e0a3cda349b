"""An adapter from one file format to another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import fingerprint, formats
from ..adapter import Adapter
from ..bind import bind
from ..errors import FormatError, OutputError
from ..formats.own_shapes import own_shapes
from ..formats.protocol import EnableLora
from . import inputs


@dataclass(frozen=True)
class ConvertReport:
    """What was converted.

    Args:
        sites: how many low-rank updates; replaced: how many full tensors.
        ranks: rank → how many sites have it.
        base: the base that the names and shapes were checked against; None if none was given.
        needs: what the new files do not carry, and their reader must be told: alpha, enable_lora.
        notes: what was repaired, and what the new files cannot say.
    """

    adapter: str
    out: str
    read_as: str
    written_as: str
    sites: int
    replaced: int
    ranks: dict[int, int]
    base: str | None
    needs: dict[str, object]
    notes: list[str]

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def convert(
    adapter: Path,
    out: Path,
    *,
    to: str | None = None,
    serve: str | None = None,
    base: Path | str | None = None,
    alpha: float | None = None,
    adapter_config: Path | None = None,
    enable_lora: EnableLora | None = None,
    accept_loss: bool = False,
    component: str | None = None,
) -> ConvertReport:
    """Write an adapter, or the adapter in a training checkpoint, in another format.

    Args:
        adapter: a file or directory of any known format.
        out: the new directory or file.
        to: the format to write; PEFT's if neither this nor ``serve`` is given.
        serve: write the form that this server loads right (``vllm``).
        base: the base, against whose names and shapes the adapter is then checked; without it they are
            what the adapter's own file says.
        alpha, adapter_config, enable_lora, component: as for :func:`graft.fuse_files.fuse`.
        accept_loss: leave out what the format cannot hold, and say it.
    Raises:
        GraftError: one message that says what is wrong and what mends it; nothing was written.
    """
    adapter, out = Path(adapter), Path(out)
    writer = _writer(to, serve)
    if out.exists():
        raise OutputError(f"{out} already exists; choose another output")
    found = None if base is None else inputs.open_base(base)
    model = None if found is None else found.config or None
    read = formats.read(
        adapter,
        alpha=alpha,
        config=adapter_config,
        enable_lora=enable_lora,
        model=model,
        component=component,
    )
    name = None
    if found is None:
        bound = _alone(read)
    else:
        assert base is not None
        inputs.spare_inputs(out, found.folder, adapter)
        bound = bind(read, found.shapes, config=found.config)
        fingerprint.check(bound.base, lambda one: found.read(one) if one in found.entries else None)
        name = inputs.base_name(base, found, read.config.get("base_model_name_or_path"))
    bound = _for_one_model(bound, writer, frozenset(found.parts) if found is not None else read.components)
    done = formats.written(bound, out, writer, formats.Target(name, model), accept_loss=accept_loss)
    return ConvertReport(
        adapter=str(adapter),
        out=str(out),
        read_as=read.format,
        written_as=writer.name,
        sites=len(bound.sites),
        replaced=len(bound.replace),
        ranks=dict(sorted(Counter(site.rank for site in bound.sites.values()).items())),
        base=name,
        needs=dict(done.needs),
        notes=[*dict.fromkeys([*bound.notes, *done.notes])],
    )


def _writer(to: str | None, serve: str | None) -> formats.Writer:
    if serve is None:
        return formats.writer(to or "peft")
    if to not in (None, "peft"):
        raise FormatError(f"--for {serve} is a form of PEFT's files; leave --to {to} out")
    if serve not in formats.SERVERS:
        raise FormatError(f"unknown server {serve!r}; use one of: {', '.join(formats.SERVERS)}")
    return formats.SERVERS[serve]


def _for_one_model(bound: Adapter, writer: formats.Writer, components: frozenset[str]) -> Adapter:
    """Under the model's own names, for a format that is of one model.

    Args:
        components: the models of a pipeline that the adapter's names begin with, if they do.
    Raises:
        FormatError: the adapter is for several models.
    """
    if not components or writer.name in formats.PIPELINES:
        return bound
    changed = sorted({name.partition(".")[0] for name in bound.touched})
    if len(changed) > 1:
        raise FormatError(
            f"{writer.name} files are for one model, and this adapter changes {', '.join(changed)}; choose "
            f"one: --component {changed[0]}"
        )
    return bound.renamed(lambda name: name.partition(".")[2])


def _alone(adapter: Adapter) -> Adapter:
    """Bound to the shapes that its own file tells; a square weight is stored as the file says, or plainly."""
    if adapter.flattened:
        return adapter  # writing refuses it, and says what mends it
    turned: Mapping[str, bool] = {name: bool(s.fan_in_fan_out) for name, s in adapter.sites.items()}
    return bind(adapter, own_shapes(adapter), transposed=lambda name: turned.get(name, False))
