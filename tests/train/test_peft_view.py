"""Models that PEFT adapted: exported as Graft's own are, and PEFT's merge is the oracle."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import graft  # noqa: E402
from graft.train.peft_model import holds_peft, plain_view  # noqa: E402
from tests.checkpoints import models  # noqa: E402
from tests.train import small  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

LORA: dict[str, Any] = {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
HELD = {
    "plain": {},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 3}},
    "saved": {"modules_to_save": ["lm_head", "norm"]},
    "bias": {"bias": "all", "target_modules": ["c_attn", "c_fc"]},
}


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=37, n_positions=32, n_embd=20, n_layer=2, n_head=2, tie_word_embeddings=False
    )
    return transformers.GPT2LMHeadModel(config)


def base(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    return gpt2() if "c_attn" in config.get("target_modules", ()) else models.llama(dtype=dtype)


def trained(**config: Any) -> Any:
    """A model that PEFT adapted, every trained number another than at the start."""
    settings = {**LORA, **config}
    dtype = settings.pop("dtype", torch.float32)
    model = models.with_peft(base(settings, dtype), **settings)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05)
    return model


@pytest.mark.parametrize("name", HELD)
def test_fused_and_adapter_compute_what_the_model_does(name: str, tmp_path: Path) -> None:
    model = trained(**HELD[name])
    want, before = small.logits(model), copy.deepcopy(model.state_dict())
    kept = {n: type(m) for n, m in model.named_modules()}
    view = plain_view(model)
    assert not holds_peft(view) and holds_peft(model)
    graft.export(view, tmp_path / "fused")
    graft.save(view, tmp_path / "adapter")
    assert {n: type(m) for n, m in model.named_modules()} == kept
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(small.logits(model), want)
    fused = type(base({**LORA, **HELD[name]})).from_pretrained(tmp_path / "fused")
    torch.testing.assert_close(small.logits(fused), want, rtol=0, atol=2e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about full tensors that its configuration does not list
        again = peft.PeftModel.from_pretrained(base({**LORA, **HELD[name]}), tmp_path / "adapter")
    torch.testing.assert_close(small.logits(again), want, rtol=0, atol=2e-6)
    merged = copy.deepcopy(model).merge_and_unload()
    exported = dict(fused.named_parameters())
    for parameter, value in merged.named_parameters():
        torch.testing.assert_close(exported[parameter], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_two_roads_one_number(dtype: torch.dtype, tmp_path: Path) -> None:
    """While it trains, and from file to file of PEFT's own save."""
    from graft.fuse_files import fuse
    from graft.tensors import open_checkpoint

    models.llama(dtype=dtype).save_pretrained(tmp_path / "base")
    model = trained(dtype=dtype)
    graft.export(plain_view(model), tmp_path / "live")
    model.save_pretrained(tmp_path / "adapter")
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "files")
    live, files = open_checkpoint(tmp_path / "live"), open_checkpoint(tmp_path / "files")
    assert live.entries.keys() == files.entries.keys()
    for name in live.entries:
        assert live.read(name).dtype == dtype and torch.equal(live.read(name), files.read(name)), name


def test_adapters_that_transformers_injects(tmp_path: Path) -> None:
    model = models.llama(dtype=torch.float32)
    model.add_adapter(peft.LoraConfig(**LORA, init_lora_weights=False))
    want = small.logits(model)
    graft.export(plain_view(model), tmp_path / "fused")
    fused = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "fused")
    torch.testing.assert_close(small.logits(fused), want, rtol=0, atol=2e-6)


def test_the_active_of_several_adapters(tmp_path: Path) -> None:
    model = trained()
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"]))
    want = small.logits(model)
    assert len(graft.state_dict(plain_view(model))) == 8
    model.set_adapter("other")
    assert len(graft.state_dict(plain_view(model))) == 4
    model.set_adapter("default")
    graft.export(plain_view(model), tmp_path / "fused")
    fused = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "fused")
    torch.testing.assert_close(small.logits(fused), want, rtol=0, atol=2e-6)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(graft.StateError, match="several adapters are active"):
        plain_view(model)


def tied(**config: Any) -> Any:
    model = models.llama(dtype=torch.float32)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return models.with_peft(model, **{**LORA, **config})


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)


def merged() -> Any:
    model = trained()
    model.merge_adapter()
    return model


def switched_off() -> Any:
    model = trained()
    model.base_model.disable_adapter_layers()
    return model


REFUSED = {
    "dora": (lambda: trained(use_dora=True), "q_proj: a variant of LoRA"),
    "lora_bias": (lambda: trained(lora_bias=True, target_modules=["c_attn"]), "c_attn: lora_bias"),
    "tokens": (
        lambda: trained(trainable_token_indices={"embed_tokens": [1, 2]}),
        "embed_tokens: a Trainable",
    ),
    "conv": (lambda: models.with_peft(Conv(), r=2, target_modules=["conv"]), "conv: PEFT's layer Conv2d"),
    "tied": (lambda: tied(target_modules=["lm_head", "q_proj"]), "are one weight"),
    "tied embedding": (lambda: tied(target_modules=["embed_tokens"]), "are one weight"),
    "tied saved": (lambda: tied(modules_to_save=["lm_head"]), "lm_head is trained apart from"),
    "merged": (merged, "merged into the weight; call unmerge_adapter"),
    "switched off": (switched_off, "switched off; call enable_adapter_layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_plain_lora_is_refused_by_name(name: str) -> None:
    make, text = REFUSED[name]
    with pytest.raises(graft.StateError, match=text) as caught:
        plain_view(make())
    assert "graft fuse BASE CHECKPOINT" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "peft_type 'IA3'"),
        (lambda: peft.LoraConfig(**LORA, init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    ],
)
def test_settings_that_no_fused_weight_equals(config: Any, text: str) -> None:
    model = peft.get_peft_model(models.llama(dtype=torch.float32), config())
    with pytest.raises(graft.FormatError, match=text):
        plain_view(model)
