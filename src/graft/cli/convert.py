"""``graft convert``: an adapter from one format to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import FormatName, adapter_config, alpha, component, switches
from .output import next_step, print_facts, print_json


@click.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="What to write.")
@click.option("--to", type=FormatName("WRITERS"), help="The format to write.  [default: peft]")
@click.option(
    "--for",
    "serve",
    type=FormatName("SERVERS"),
    help="Write the PEFT files that this server loads right: one rank, every scale folded into B.",
)
@click.option("--base", metavar="BASE", help="Check names and shapes against this base, and name it.")
@adapter_config
@component
@alpha
@click.option(
    "--enable-lora",
    multiple=True,
    callback=lambda _, __, words: switches(words),
    metavar="[MODULE=]1,0,1",
    help="For loralib's MergedLinear: which blocks are adapted, as for graft fuse.",
)
@click.option(
    "--accept-loss", is_flag=True, help="Leave out what the format cannot hold, and say what it was."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def convert(adapter: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Write ADAPTER in another format.

    ADAPTER is a directory or a file of any known format, or a checkpoint of a training run with the
    adapter in it: a DeepSpeed engine's directory of any ZeRO stage, Lightning's .ckpt. DeepSpeed is not
    needed, and no code in the checkpoint is run.
    """
    from ..files.convert import convert as convert_files

    report = convert_files(adapter, out, **options)
    if as_json:
        print_json(report.to_dict())
        return
    facts = [
        ("from", f"{report.adapter} ({report.read_as})"),
        ("base", report.base or ""),
        ("sites", str(report.sites)),
        ("rank", ", ".join(map(str, report.ranks))),
        ("full tensors", str(report.replaced) if report.replaced else ""),
    ]
    print_facts(f"converted {report.out} ({report.written_as})", facts, report.notes)
    alpha = report.needs.get("alpha")
    next_step(f"graft inspect {report.out}" + (f" --alpha {alpha:g}" if isinstance(alpha, float) else ""))
