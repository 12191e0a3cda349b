"""AdapterHub's files: the formula of ``adapters``, its faulty versions, its merged q/k/v, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.bind import bind
from graft.errors import BaseMismatchError, FormatError
from graft.formats import read

from .carrying import update

QUERY = "bert.encoder.layer.0.attention.self.query"
QKV = "transformer.h.0.attn.c_attn"
PLAIN = {"architecture": "lora", "r": 2, "alpha": 6, "composition_mode": "add", "use_gating": False}


def save(
    folder: Path, tensors: dict[str, torch.Tensor], version: str = "adapters.1.2.0", **config: Any
) -> Path:
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_adapter.bin")
    said = {"config": {**PLAIN, "attn_matrices": ["q", "v"], **config}, "version": version, "name": "mine"}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def factors(
    module: str, a: tuple[int, int], b: tuple[int, int], name: str = "mine"
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"{module}.loras.{name}.lora_A": torch.randn(a), f"{module}.loras.{name}.lora_B": torch.randn(b)}


@pytest.mark.parametrize(
    ("version", "scale"),
    [("adapters.1.2.0", 3.0), ("adapters.1.0.1", 1.0), ("adapters.0.2.2", 1.0), ("", 3.0)],
)
def test_scale_of_each_version(version: str, scale: float, tmp_path: Path) -> None:
    adapter = read(save(tmp_path / "a", factors(QUERY, (2, 6), (8, 2)), version))
    site = adapter.sites[f"{QUERY}.weight"]
    assert (adapter.format, site.scale) == ("adapterhub", scale)
    assert any("scale 1" in note for note in adapter.notes) == (scale == 1.0)


def test_a_merged_projection_follows_its_blocks(tmp_path: Path) -> None:
    """GPT-2's c_attn is stored [in, 3·out]; q and v are adapted, each by its own pair."""
    tensors = factors(QKV, (4, 6), (10, 2))
    adapter = bind(
        read(save(tmp_path / "a", tensors)), {f"{QKV}.weight": (6, 15)}, config={"model_type": "gpt2"}
    )
    a, b = (tensors[f"{QKV}.loras.mine.lora_{x}"].double() for x in "AB")
    want = torch.zeros(6, 15, dtype=torch.float64)
    want[:, :5] = 3.0 * (b[:5] @ a[:2]).T
    want[:, 10:] = 3.0 * (b[5:] @ a[2:]).T
    got = update(adapter.sites[f"{QKV}.weight"], torch.zeros(6, 15, dtype=torch.float64))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_one_block_of_a_merged_projection(tmp_path: Path) -> None:
    tensors = factors(QKV, (2, 6), (5, 2))
    adapter = read(save(tmp_path / "a", tensors, attn_matrices=["v"]))
    bound = bind(adapter, {f"{QKV}.weight": (6, 15)}, config={"model_type": "gpt2"})
    got = update(bound.sites[f"{QKV}.weight"], torch.zeros(6, 15, dtype=torch.float64))
    assert not got[:, :10].any() and got[:, 10:].all()
    with pytest.raises(BaseMismatchError):
        bind(adapter, {f"{QKV}.weight": (6, 12)}, config={"model_type": "gpt2"})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_gating": True}, "use_gating True"),
        ({"composition_mode": "scale"}, "composition_mode 'scale'"),
        ({"architecture": "mtl_lora"}, "architecture 'mtl_lora'"),
        ({"use_dora": True}, "use_dora"),
        ({"vera_d": 0.1}, "vera_d"),
        ({"r": None}, "r must be a positive integer"),
        ({"alpha": "6"}, "alpha must be a number"),
        ({"r": 3}, "not of rank 3"),
    ],
)
def test_other_methods_are_refused(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=said):
        read(save(tmp_path / "a", factors(QUERY, (2, 6), (8, 2)), **config))


def test_faults_are_named(tmp_path: Path) -> None:
    half = factors(QUERY, (2, 6), (8, 2))
    del half[f"{QUERY}.loras.mine.lora_B"]
    with pytest.raises(FormatError, match=r"lora_A has no lora_B\n.*odd: not a tensor"):
        read(save(tmp_path / "a", {**half, "odd": torch.ones(1)}))
    two = {**factors(QUERY, (2, 6), (8, 2)), **factors(QKV, (2, 6), (8, 2), "other")}
    with pytest.raises(FormatError, match=r"several adapters \(mine, other\)"):
        read(save(tmp_path / "b", two))
    folder = save(tmp_path / "c", factors(QUERY, (2, 6), (8, 2)))
    torch.save({"head.weight": torch.ones(2, 2)}, folder / "pytorch_model_head.bin")
    assert any("pytorch_model_head.bin" in note for note in read(folder).notes)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    with pytest.raises(FormatError, match="does not hold its config"):
        read(folder)
