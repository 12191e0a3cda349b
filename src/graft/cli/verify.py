"""``graft verify``: is OUT really base + adapter?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .output import print_json, progress_bar


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", required=True, help="The base that OUT was fused from: directory or hub id.")
@click.option("--adapter", required=True, type=click.Path(path_type=Path), help="The adapter that was fused.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads that compute.  [default: all cores]")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON; no progress bar.")
def verify(out: Path, base: str, adapter: Path, as_json: bool, **options: Any) -> None:
    """Prove that OUT is BASE + ADAPTER.

    Untouched tensors are compared bit for bit, touched ones recomputed and compared, hashes checked
    against those that fuse recorded. Exit code 1 if anything differs, with the tensors named.
    """
    from ..verify_files import verify as verify_files

    with progress_bar("verifying", quiet=as_json) as progress:
        report = verify_files(out, base, adapter, progress=progress, **options).to_dict()
    if as_json:
        print_json(report)
