"""``graft fuse``: base + adapter → a model, from file to file."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import adapter_config, alpha, component, dtype, finite, size, switches, threads
from .output import duration, next_step, number, percent, print_facts, print_json, progress_bar
from .output import size as size_text

if TYPE_CHECKING:
    from ..files.loss import Loss
    from ..fuse_files import FuseReport


@click.command(short_help="Write BASE + ADAPTER to OUT as one model.")
@click.argument("base")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Directory to write.")
@click.option(
    "--dtype",
    type=dtype,
    metavar="DTYPE",
    help="Round the fused model to bfloat16, float16 or float32 (bf16, fp16, fp32).  [default: as BASE]",
)
@click.option(
    "--scale",
    type=finite,
    metavar="NUMBER",
    default="1",
    show_default=True,
    help="Multiply ΔW by this: 0.5 fuses half of it, -1 takes it away.",
)
@alpha
@click.option(
    "--enable-lora",
    multiple=True,
    callback=lambda _, __, words: switches(words),
    metavar="[MODULE=]1,0,1",
    help="For loralib's MergedLinear, whose files do not say it: which blocks of q, k, v are adapted; "
    "once for all modules, or once for each name's end.",
)
@click.option(
    "--max-shard-size",
    type=size,
    metavar="SIZE",
    help="Largest file to write: 5GB, 500MB, 2GiB; a larger tensor gets its own.  [default: as BASE]",
)
@adapter_config
@component
@click.option(
    "--tied",
    type=click.Choice(["untie", "shared"]),
    help="What to do when an adapter changes one of two tied weights: untie them, or change both.",
)
@threads
@click.option(
    "--again",
    is_flag=True,
    help="Fuse an adapter that BASE holds already by its own graft.json: ΔW is added once more.",
)
@click.option(
    "--other-base",
    is_flag=True,
    help="Fuse into BASE although the adapter was saved with other weights of the same names.",
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists and is a model; it stays until then.")
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, and no progress bar.")
def fuse(base: str, adapter: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Write BASE + ADAPTER to OUT as one model, without ever loading it.

    BASE is a Hugging Face directory, a diffusers pipeline's or a hub id; ADAPTER is a directory or a file of
    any known format.
    Every fused weight is W + scale·B·A rounded once; all others are copied bit for bit. OUT appears
    whole or not at all, and neither input is ever written to.
    """
    from ..fuse_files import fuse as fuse_files

    with progress_bar("fusing", quiet=as_json) as progress:
        report = fuse_files(base, adapter, out, progress=progress, **options)
    if as_json:
        print_json(report.to_dict())
    else:
        _show(report)
        if not report.dry_run:
            next_step(_verify_command(base, adapter, out, options))


def _show(report: FuseReport) -> None:
    """What changed, how fast it went, what rounding took."""
    seconds, written = max(report.seconds, 1e-9), report.bytes_written
    pace = "" if report.dry_run else f" in {duration(seconds)}, {size_text(written / seconds)}/s"
    files = f"{len(report.files)} file{'s' * (len(report.files) != 1)}"
    kinds = Counter(report.changed.values())
    facts = [
        ("base", report.base),
        ("adapter", f"{report.adapter} ({report.format})"),
        ("changed", f"{len(report.changed)} of {report.tensors} tensors"),
        ("", ", ".join(f"{n} {how}" for how, n in kinds.most_common()) if len(kinds) > 1 else ""),
        ("copied", f"{report.copied} bit for bit"),
        ("size", f"{size_text(written)} in {files}" if report.dry_run else ""),
        ("wrote", "" if report.dry_run else f"{size_text(written)} in {files}{pace}"),
        ("dtype", report.dtype or ""),
        ("scale", "" if report.scale == 1.0 else number(report.scale)),
        *_loss(report.loss),
    ]
    notes = report.notes if report.kernel == "c" else [*report.notes, f"kernel: {report.kernel}"]
    print_facts(f"{'would write' if report.dry_run else 'fused'} {report.out}", facts, notes)


def _loss(loss: Loss | None) -> list[tuple[str, str]]:
    if loss is None:
        return []
    lost = f"takes {percent(loss.measured)} of the update (predicted {percent(loss.predicted)})"
    return [("‖ΔW‖/‖W‖", number(loss.ratio)), ("rounding", lost)]


def _verify_command(base: str, adapter: Path, out: Path, options: Mapping[str, Any]) -> str:
    words = ["graft", "verify", str(out), "--base", base, "--adapter", str(adapter)]
    if options["adapter_config"] is not None:
        words += ["--adapter-config", str(options["adapter_config"])]
    return shlex.join(words)
