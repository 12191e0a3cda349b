"""One rank and one scale for all sites, for formats that have no place for more. ΔW stays what it is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from ..adapter import LowRank
from ..algebra import folded, padded
from .ledger import listed

Sites = Mapping[str, LowRank]


def one_rank(sites: Sites) -> tuple[int, dict[str, LowRank]]:
    """All sites padded with zeros to the largest rank, which is returned first; exact."""
    rank = max(site.rank for site in sites.values())
    return rank, {name: padded(site, rank) for name, site in sites.items()}


def commonest_scale(sites: Sites) -> float:
    """The scale that most sites have, the first of several; not 0, by which nothing can be divided."""
    found = Counter(site.scale for site in sites.values() if site.scale)
    return found.most_common(1)[0][0] if found else 0.0


def alpha_of(scale: float, divisor: float) -> int | float:
    """The alpha for which ``alpha / divisor`` is the scale, if there is one; whole if it can be."""
    alpha = scale * divisor
    near = (round(alpha), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((candidate for candidate in near if candidate and candidate / divisor == scale), alpha)


def with_scales(sites: Sites, scales: Mapping[str, float]) -> tuple[dict[str, LowRank], list[str]]:
    """The same updates with these scales, the quotient folded into B; a note where that had to round."""
    found: dict[str, LowRank] = {}
    inexact: list[str] = []
    for name, site in sites.items():
        found[name], exact = folded(site, scales[name])
        if not exact:
            inexact.append(name)
    if not inexact:
        return found, []
    return found, [
        f"the scale was folded into B, whose elements were rounded once to float32: {listed(inexact)}"
    ]


def with_scale(sites: Sites, scale: float) -> tuple[dict[str, LowRank], list[str]]:
    """:func:`with_scales` with one scale for all."""
    return with_scales(sites, dict.fromkeys(sites, scale))
