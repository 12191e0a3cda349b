"""``graft inspect``: what is in an adapter or a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from .options import adapter_config, alpha, component
from .output import count, exactly, number, print_facts, print_json, print_table, size

if TYPE_CHECKING:
    from ..inspect_files import AdapterReport, ModelReport, SiteReport


@click.command(short_help="Show what an adapter or a model holds.")
@click.argument("path", type=click.Path(path_type=Path))
@alpha
@adapter_config
@component
@click.option("--base", metavar="BASE", help="Show the sites under this base's names, proved to fit it.")
@click.option("--all", "show_all", is_flag=True, help="List every site, not the first 20.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(
    path: Path,
    alpha: float | None,
    adapter_config: Path | None,
    component: str | None,
    base: str | None,
    show_all: bool,
    as_json: bool,
) -> None:
    """Show what PATH holds: an adapter (directory or file) or a model (directory).

    For an adapter: format, sites, ranks, scales, parameters, norms of A, B and ΔW, dead sites
    (B = 0). For a model: tensors, dtypes, and what was fused into it.
    """
    from ..inspect_files import AdapterReport
    from ..inspect_files import inspect as inspect_files

    report = inspect_files(path, alpha=alpha, adapter_config=adapter_config, base=base, component=component)
    if as_json:
        print_json(report.to_dict())
    elif isinstance(report, AdapterReport):
        _show_adapter(report, show_all)
    else:
        _show_model(report)


def _show_adapter(report: AdapterReport, show_all: bool) -> None:
    facts = [
        ("format", report.format),
        ("base", report.base or ""),
        ("sites", str(len(report.sites))),
        ("rank", ", ".join(map(str, report.ranks))),
        ("scale", ", ".join(map(number, report.scales))),
        ("parameters", exactly(report.parameters)),
        ("dtype", ", ".join(report.dtypes)),
        ("DoRA", f"{sum(s.dora for s in report.sites)} sites" if any(s.dora for s in report.sites) else ""),
        ("replaced", _few(report.replaced)),
        ("shifted", _few(report.shifted)),
        ("rows", ", ".join(f"{n} of {name}" for name, n in report.rows.items())),
        (
            "dead",
            f"{len(report.dead)} of {len(report.sites)} sites change nothing (A or B is 0)"
            * bool(report.dead),
        ),
        ("not finite", _few([s.name for s in report.sites if not s.finite])),
    ]
    print_facts(f"adapter {report.path}", facts, report.notes)
    shown = report.sites if show_all else report.sites[:20]
    if shown:
        headers = ("site", "rank", "scale", "‖A‖", "‖B‖", "‖ΔW‖", "")
        print_table(headers, [_row(site) for site in shown], right=(1, 2, 3, 4, 5))
    if len(shown) < len(report.sites):
        click.echo(f"… and {len(report.sites) - len(shown)} more sites; --all lists them")


def _row(site: SiteReport) -> tuple[str, ...]:
    norms = (site.norm_A, site.norm_B, site.norm_delta)
    mark = "" if site.finite else "not finite"
    return (site.name, str(site.rank), number(site.scale), *map(number, norms), "dead" if site.dead else mark)


def _show_model(report: ModelReport) -> None:
    facts = [
        ("model", ", ".join(report.architectures) or report.model_type or ""),
        ("components", ", ".join(f"{name} ({n} tensors)" for name, n in report.components.items())),
        ("tensors", f"{report.tensors} in {len(report.files)} file{'s' * (len(report.files) != 1)}"),
        ("parameters", exactly(report.parameters)),
        ("size", size(report.bytes)),
        ("dtype", ", ".join(f"{name} ({count(n)})" for name, n in report.dtypes.items())),
        ("quantised", report.quantised or ""),
        *_fused(report.fused or {}),
    ]
    print_facts(f"model {report.path}", facts, report.notes)


def _fused(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What graft.json says, as far as it has the form that fuse writes."""
    if not record:
        return []
    base, adapters, options = record.get("base"), record.get("fused"), record.get("options")
    names = (
        [str(_get(one, "name")) for one in cast("list[object]", adapters)]
        if isinstance(adapters, list)
        else []
    )
    scale = _get(options, "scale")
    return [
        ("fused", " + ".join([str(_get(base, "name") or "?"), *names])),
        ("scale", number(scale) if isinstance(scale, float) and scale != 1.0 else ""),
        ("by", f"graft {record.get('graft', '?')}"),
    ]


def _get(table: object, key: str) -> object:
    return cast("dict[str, object]", table).get(key) if isinstance(table, dict) else None


def _few(names: tuple[str, ...] | list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
