"""``graft inspect`` and :func:`graft.inspect_files.inspect`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from graft.cli.app import cli
from graft.errors import FormatError
from graft.inspect_files import AdapterReport, ModelReport, inspect, norm_of_product

from ..pairs import PREFIX, RANK, Pair, edit_json, edit_tensors, lora, write_pair


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return write_pair(tmp_path / "work")


def shown(*words: str) -> str:
    result = CliRunner().invoke(cli, ["inspect", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def as_json(*words: str) -> dict[str, Any]:
    return json.loads(shown(*words, "--json"))


@given(
    n=st.integers(1, 3),
    r=st.integers(1, 5),
    i=st.integers(1, 7),
    o=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_norm_of_the_product_needs_no_product(n: int, r: int, i: int, o: int, seed: int) -> None:
    torch.manual_seed(seed)
    a, b = torch.randn(n * r, i, dtype=torch.float64), torch.randn(n * o, r, dtype=torch.float64)
    whole = torch.stack([y @ x for x, y in zip(a.chunk(n), b.chunk(n), strict=True)])
    assert math.isclose(norm_of_product(a, b), float(whole.norm()), rel_tol=1e-9)


def test_adapter_report(pair: Pair) -> None:
    report = inspect(pair.adapter)
    assert isinstance(report, AdapterReport)
    tensors, site = lora(), "model.layers.0.self_attn.v_proj"
    a, b = (tensors[f"{PREFIX}{site}.lora_{x}.weight"] for x in "AB")
    found = next(s for s in report.sites if s.name == f"{site}.weight")
    assert (report.format, report.base, len(report.sites)) == ("peft", "somebody/tiny-llama", 4)
    assert (report.ranks, report.scales, report.dtypes) == ((RANK,), (8 / RANK,), {"float32": 4})
    assert report.parameters == sum(t.numel() for t in tensors.values())
    assert (found.rank, found.scale, found.shape_A, found.shape_B) == (4, 2.0, (4, 32), (16, 4))
    assert found.norm_A == pytest.approx(float(a.norm()))
    assert found.norm_B == pytest.approx(float(b.norm()))
    assert found.norm_delta == pytest.approx(float((2.0 * b @ a).norm()))
    assert not found.dead and report.dead == ()


def test_dead_sites_are_named(pair: Pair) -> None:
    edit_tensors(pair.weights, lambda t: [t[n].zero_() for n in t if "layers.1" in n and "lora_B" in n])
    found = as_json(str(pair.adapter))
    assert found["dead"] == [f"model.layers.1.self_attn.{x}_proj.weight" for x in "qv"]
    assert "2 of 4 sites change nothing" in shown(str(pair.adapter))


def test_patterns_give_every_rank_and_scale(pair: Pair) -> None:
    edit_json(pair.settings, lambda c: c.update(alpha_pattern={"v_proj": 2}, use_rslora=True))
    report = inspect(pair.adapter)
    assert isinstance(report, AdapterReport)
    assert report.scales == (2 / math.sqrt(RANK), 8 / math.sqrt(RANK))


def test_loralib_needs_no_alpha_to_be_looked_at(tmp_path: Path) -> None:
    file = tmp_path / "lora.pt"
    torch.save({"fc.lora_A": torch.ones(2, 8), "fc.lora_B": torch.ones(4, 2)}, file)
    unknown, known = as_json(str(file)), as_json(str(file), "--alpha", "6")
    assert (unknown["format"], unknown["scales"], known["scales"]) == ("loralib", [0.5], [3.0])
    assert any("alpha" in note for note in unknown["notes"])


def test_model_report(pair: Pair) -> None:
    report = inspect(pair.base)
    assert isinstance(report, ModelReport)
    assert (report.model_type, report.tensors, len(report.files)) == ("llama", 21, 2)
    assert report.bytes == 2 * report.parameters and report.dtypes == {"bfloat16": report.parameters}
    assert report.fused is None
    assert "21 in 2 files" in shown(str(pair.base))


def test_quantised_model_is_said(pair: Pair) -> None:
    edit_json(pair.base / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"}))
    assert as_json(str(pair.base))["quantised"] == "gptq"
    assert "dequantise" in shown(str(pair.base))


def test_json_has_the_fields_that_are_promised(pair: Pair) -> None:
    adapter, model = as_json(str(pair.adapter)), as_json(str(pair.base))
    assert set(adapter) == {
        *("what", "path", "format", "base", "sites", "replaced", "shifted", "rows", "parameters"),
        *("ranks", "scales", "dtypes", "dead", "notes"),
    }
    assert set(adapter["sites"][0]) == {
        *("name", "kind", "rank", "scale", "shape_A", "shape_B", "dtype", "parameters"),
        *("norm_A", "norm_B", "norm_delta", "dead", "finite", "dora"),
    }
    assert set(model) == {
        *("what", "path", "format", "model_type", "architectures", "files", "tensors", "parameters"),
        *("bytes", "dtypes", "components", "quantised", "fused", "notes"),
    }
    assert (adapter["what"], model["what"]) == ("adapter", "model")


def test_long_lists_are_cut_unless_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "lora.pt"
    factors = {f"l{n}.lora_A": torch.ones(1, 3) for n in range(30)}
    torch.save(factors | {f"l{n}.lora_B": torch.ones(3, 1) for n in range(30)}, file)
    assert "… and 10 more sites" in shown(str(file))
    assert "more sites" not in shown(str(file), "--all") and "l29.weight" in shown(str(file), "--all")


def test_nothing_at_the_path(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist"):
        inspect(tmp_path / "nowhere")


def test_damaged_provenance(pair: Pair) -> None:
    (pair.base / "graft.json").write_text("{")
    with pytest.raises(FormatError, match=r"graft\.json"):
        inspect(pair.base)
