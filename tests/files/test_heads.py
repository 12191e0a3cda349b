"""A classifier that the adapter brings and the base never had."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from graft.errors import BaseMismatchError
from graft.fuse_files import fuse
from graft.verify_files import verify

peft = pytest.importorskip("peft")

# PEFT asks transformers by a name that transformers now calls old
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """An encoder's files, a sequence classifier's PEFT adapter beside them, and what PEFT's model says."""
    folder = tmp_path_factory.mktemp("heads")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=60
    )
    transformers.BertModel(config).save_pretrained(folder / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(folder / "base", num_labels=3)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    for name, p in adapted.named_parameters():
        if p.requires_grad and "lora_A" not in name.split("."):
            torch.nn.init.normal_(p, std=0.3)
    adapted.save_pretrained(folder / "adapter")
    ids = torch.arange(3, 11)[None]
    return folder, ids, adapted.eval()(ids).logits


def test_the_classifier_is_added_and_said(
    trained: tuple[Path, torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    folder, ids, expected = trained
    report = fuse(folder / "base", folder / "adapter", tmp_path / "out")
    verify(tmp_path / "out", folder / "base", folder / "adapter")
    assert any("AutoModelForSequenceClassification" in note for note in report.notes)
    assert report.changed["classifier.weight"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert model.config.num_labels == 3
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_full_tensor_that_is_not_declared_is_refused(
    trained: tuple[Path, torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    folder = trained[0]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in (folder / "adapter").iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": None}))
    with pytest.raises(BaseMismatchError, match=r"classifier\.weight"):
        fuse(folder / "base", adapter, tmp_path / "out")


def test_a_wrapper_s_prefix_is_no_part_of_the_new_head_s_name(
    trained: tuple[Path, torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    folder, ids, expected = trained
    adapter = tmp_path / "adapter"
    shutil.copytree(folder / "adapter", adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({f"module.{k}": v.clone() for k, v in tensors.items()}, adapter / "adapter_model.safetensors")
    fuse(folder / "base", adapter, tmp_path / "out")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
