"""``graft verify``: is OUT really base + adapter?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import adapter_config, finite, threads
from .output import duration, print_facts, print_json, progress_bar, size

if TYPE_CHECKING:
    from ..verify_files import VerifyReport


@click.command(short_help="Prove that OUT is BASE + ADAPTER.")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", required=True, help="The base that OUT was fused from: a directory or a hub id.")
@click.option("--adapter", required=True, type=click.Path(path_type=Path), help="The adapter that was fused.")
@click.option("--alpha", type=finite, metavar="NUMBER", help="Another alpha than graft.json records.")
@adapter_config
@threads
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, and no progress bar.")
def verify(out: Path, base: str, adapter: Path, as_json: bool, **options: Any) -> None:
    """Prove that OUT is BASE + ADAPTER, with the options that its graft.json records.

    Untouched tensors must equal the base's bit for bit, touched ones are computed again and compared,
    and all files must have the recorded hashes. Exit code 1 if anything differs, with its name.
    """
    from ..verify_files import verify as verify_files

    with progress_bar("verifying", quiet=as_json) as progress:
        report = verify_files(out, base, adapter, progress=progress, **options)
    if as_json:
        print_json({"verified": True, **report.to_dict()})
    else:
        _show(report)


def _show(report: VerifyReport) -> None:
    compared = report.bytes_compared
    copied, seconds = report.tensors - report.recomputed, max(report.seconds, 1e-9)
    facts = [
        ("base", report.base),
        ("adapter", report.adapter),
        ("changed", f"{report.recomputed} tensors equal W + ΔW rounded once, bit for bit"),
        ("copied", f"{copied} tensors equal the base's, bit for bit"),
        ("hashes", f"{len(report.files)} files as recorded"),
        ("read", f"{size(compared)} in {duration(seconds)}, {size(compared / seconds)}/s"),
    ]
    print_facts(f"verified {report.out}", facts)
