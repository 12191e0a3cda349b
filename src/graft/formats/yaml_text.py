"""Settings as YAML text, without PyYAML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import cast


def yaml_text(settings: Mapping[str, object], indent: str = "") -> str:
    """A mapping, of mappings too; lists are written in JSON's form, which is YAML's."""
    lines: list[str] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}:\n", yaml_text(cast("Mapping[str, object]", value), f"{indent}  ")]
        else:
            lines.append(f"{indent}{key}: {_scalar(value)}\n")
    return "".join(lines)


def _scalar(value: object) -> str:
    """YAML 1.1 reads a number with an exponent and without a point as text."""
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and "e" in text and "." not in text:
        return text.replace("e", ".0e")
    return text
