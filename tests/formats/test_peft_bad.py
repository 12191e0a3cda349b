"""PEFT files that cannot be honoured: one clear error each, never a part of the adapter left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft.errors import FormatError
from graft.formats import read
from graft.formats.peft import config as peft_config

from . import peers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return peers.save(peers.adapted(peers.Net(), target_modules=["wide", "head"]), tmp_path / "a")


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


WIDE = "base_model.model.wide."

SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "no peft_type": ({"peft_type": ...}, "does not say its peft_type"),
    "VeRA": ({"peft_type": "VERA"}, "peft_type 'VERA'"),
    "IA3": ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    "LoHa": ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
    "AdaLoRA": ({"peft_type": "ADALORA"}, "peft_type 'ADALORA'"),
    "X-LoRA": ({"peft_type": "XLORA"}, "peft_type 'XLORA'"),
    "no r": ({"r": ...}, "r is missing"),
    "no alpha": ({"lora_alpha": ...}, "lora_alpha is missing"),
    "null alpha": ({"lora_alpha": None}, "lora_alpha is missing"),
    "zero rank": ({"r": 0}, "r must be a positive integer"),
    "text alpha": ({"lora_alpha": "16"}, "lora_alpha must be a positive number"),
    "negative alpha": ({"lora_alpha": -1}, "lora_alpha must be"),
    "boolean rank": ({"r": True}, "r must be"),
    "wrong rank": ({"r": 4}, "has rank 3, but adapter_config.json says 4"),
    "wrong pattern": ({"rank_pattern": {"wide": 2}}, "has rank 3, but adapter_config.json says 2"),
    "bad pattern": ({"rank_pattern": {"wide(": 2}}, "not a regular expression"),
    "pattern of text": ({"alpha_pattern": {"wide": "2"}}, "must be positive"),
    "pattern list": ({"alpha_pattern": [["wide", 2]]}, "must map"),
    "bias kind": ({"bias": "some"}, "bias must be"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    "OLoRA": ({"init_lora_weights": "olora"}, "path_initial_model"),
    "CorDA": ({"init_lora_weights": "corda"}, "path_initial_model"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "path_initial_model"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "changed the base's weights"),
    "strange init": ({"init_lora_weights": "zen"}, "init_lora_weights='zen' is unknown"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
    "QALoRA": ({"use_qalora": True}, "QA-LoRA"),
    "replication": ({"layer_replication": [[0, 4], [2, 5]]}, "replicated layers"),
    "Megatron": ({"megatron_config": {"a": 1}}, "Megatron"),
    "BD-LoRA": ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
    "Arrow": ({"arrow_config": {"top_k": 2}}, "Arrow"),
    "KaSA": ({"kasa_config": {"beta": 1}}, "KaSA"),
    "MonteCLoRA": ({"monteclora_config": {"num_samples": 2}}, "MonteCLoRA"),
    "old MergedLinear": ({"enable_lora": [True, False]}, "MergedLinear"),
    "unknown setting": ({"use_zlora": True}, "use_zlora=True"),
    "DoRA without magnitudes": ({"use_dora": True}, "no lora_magnitude_vector"),
}


@pytest.mark.parametrize(("changes", "said"), SETTINGS.values(), ids=SETTINGS.keys())
def test_settings(folder: Path, changes: dict[str, Any], said: str) -> None:
    configure(folder, **changes)
    with pytest.raises(FormatError) as error:
        read(folder)
    assert said in str(error.value)


def pop(key: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.pop(WIDE + key)


def put(key: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({WIDE + key: tensor})


TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing B": (pop("lora_B.weight"), "wide.lora_A.weight has no B"),
    "missing A": (pop("lora_A.weight"), "wide.lora_B.weight has no A"),
    "NaN": (put("lora_A.weight", torch.full((3, 12), float("nan"))), "NaN or infinite"),
    "infinite": (put("lora_B.weight", torch.full((20, 3), float("inf"))), "NaN or infinite"),
    "empty": (put("lora_A.weight", torch.empty(0)), "ZeRO-3"),
    "integers": (put("lora_A.weight", torch.ones(3, 12, dtype=torch.int32)), "dtype torch.int32"),
    "ranks differ": (put("lora_B.weight", torch.ones(20, 4)), "do not agree on the rank"),
    "one axis": (put("lora_A.weight", torch.ones(36)), "do not agree on the rank"),
    "unasked magnitude": (put("lora_magnitude_vector", torch.ones(20)), "use_dora is not set"),
    "unasked bias": (put("lora_B.bias", torch.ones(20)), "lora_bias is not set"),
    "unasked tokens": (put("token_adapter.trainable_tokens_delta", torch.ones(2, 12)), "does not name"),
    "foreign factor": (put("lora_diag", torch.ones(3)), "not a tensor of PEFT's LoRA"),
    "loralib's name": (put("lora_A", torch.ones(3, 12)), "not a tensor of PEFT's LoRA"),
    "two names": (put("lora_A.other.weight", torch.ones(3, 12)), "same tensor"),
    "lone original": (put("original_module.weight", torch.ones(20, 12)), "without the trained one"),
    "transposed": (
        lambda t: t.update({k: w.T.contiguous() for k, w in t.items()}),
        "transposed or exchanged",
    ),
    "wrapped twice": (put("base_layer.lora_A.weight", torch.ones(3, 12)), "has no B"),
}


@pytest.mark.parametrize(("change", "said"), TENSORS.values(), ids=TENSORS.keys())
def test_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], said: str) -> None:
    retensor(folder, change)
    with pytest.raises(FormatError) as error:
        read(folder)
    assert said in str(error.value)


def test_a_tensor_that_is_there_twice_is_told_once(folder: Path) -> None:
    retensor(folder, put("lora_A.other.weight", torch.ones(3, 12)))
    with pytest.raises(FormatError) as error:
        read(folder)
    assert str(error.value).count("wide.lora_A.other.weight") == 1


def test_a_mark_of_byte_order_does_no_harm(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read(folder).sites) == 2


def test_all_faults_are_told_at_once(folder: Path) -> None:
    retensor(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if key.endswith("B.weight")])
    with pytest.raises(FormatError) as error:
        read(folder)
    assert "wide.lora_A.weight has no B" in str(error.value) and "head.lora_A.weight has no B" in str(
        error.value
    )


def test_several_adapters_in_one_file(folder: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for n, key in enumerate(list(tensors)):
            tensors[key.removesuffix("weight") + f"adapter{n // 2}.weight"] = tensors.pop(key)

    retensor(folder, rename)
    with pytest.raises(FormatError, match="several adapters"):
        read(folder)


def test_config_elsewhere(folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_config.json").rename(tmp_path / "c.json")
    with pytest.raises(FormatError, match="--adapter-config"):
        read(folder)
    assert len(read(folder, config=tmp_path / "c.json").sites) == 2
    assert len(read(folder / "adapter_model.safetensors", config=tmp_path / "c.json").sites) == 2
    with pytest.raises(FormatError, match="no adapter configuration"):
        read(folder, config=tmp_path / "none.json")


def test_alpha_twice(folder: Path) -> None:
    with pytest.raises(FormatError, match="carry alpha themselves"):
        read(folder, alpha=4)


def test_unknown_places(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no adapter at"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="holds no adapter weights"):
        read(tmp_path / "empty")
    save_file({"x.weight": torch.ones(2)}, tmp_path / "empty" / "model.safetensors")
    with pytest.raises(FormatError, match="not an adapter of a known format"):
        read(tmp_path / "empty")
    save_file({"x.weight": torch.ones(2)}, tmp_path / "empty" / "model2.safetensors")
    with pytest.raises(FormatError, match="several weight files"):
        read(tmp_path / "empty")
    with pytest.raises(FormatError, match="unknown format 'zip'"):
        read(folder, format="zip")


def test_unused_patterns_are_said(folder: Path) -> None:
    configure(folder, rank_pattern={"nothing.here": 4})
    assert any("nothing.here" in note for note in read(folder).notes)


def test_every_field_of_peft_is_decided() -> None:
    """A field that a new PEFT adds must be looked at before the suite passes again."""
    from peft import LoraConfig

    names = {field.name for field in fields(LoraConfig)}
    decided = [peft_config.HARMLESS, peft_config.HONOURED, frozenset(peft_config.REFUSED)]
    assert names <= frozenset().union(*decided)
    assert sum(len(group) for group in decided) == len(frozenset().union(*decided))
