"""Tiny bases and PEFT adapters on disk, and a reference that adds them up in float64."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from graft.rounding import round_once
from graft.tensors import load_file, open_checkpoint


def llama(tied: bool = False, dtype: torch.dtype = torch.bfloat16, **changes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 96, **changes,
        },
        tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def gpt2(dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16)
    return GPT2LMHeadModel(config).to(dtype)


def peft(model: PreTrainedModel, folder: Path, **config: object):
    """An adapter with random B on the model, saved to ``folder``; the PEFT model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT and transformers about their own internals
        adapted = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 7, **config}))  # type: ignore[arg-type]
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                keep = "lora_" not in name or "magnitude" in name
                parameter.data = (keep * parameter.data + noise.to(parameter.dtype) * 0.05).to(
                    parameter.dtype
                )
        adapted.save_pretrained(folder)
    return adapted


def save(model: PreTrainedModel, folder: Path, **how: object) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **how)  # type: ignore[arg-type]
    return folder


def merged(adapted) -> dict[str, torch.Tensor]:
    """PEFT's own merge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(adapted.merge_and_unload().state_dict())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    opened = open_checkpoint(folder)
    return {name: opened.read(name).clone() for name in opened.entries}


def linear_reference(base: Path, adapter: Path, scale: float, dtype: torch.dtype | None = None):
    """``round(W + scale·B·A)`` in float64 for an adapter of plain Linear modules, all others copied."""
    out = tensors(base)
    factors = load_file(adapter / "adapter_model.safetensors")
    for key in factors:
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            a, b = factors[key].double(), factors[key.replace("lora_A", "lora_B")].double()
            weight = out[f"{module}.weight"]
            out[f"{module}.weight"] = round_once(weight.double() + scale * (b @ a), dtype or weight.dtype)
    if dtype is not None:
        out = {n: round_once(t.double(), dtype) for n, t in out.items()}
    return out


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name
