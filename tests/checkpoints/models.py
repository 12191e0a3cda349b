"""Small models whose checkpoints are difficult: odd sizes, ties, buffers, frozen parts, two groups."""

from __future__ import annotations

import warnings

import torch
from torch import nn


class Odd(nn.Module):
    """Sizes that nothing divides, a tied head, buffers of two kinds, frozen and one-element weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 7)
        self.frozen = nn.Linear(7, 5)
        self.norm = nn.LayerNorm(5)
        self.register_buffer("shift", torch.randn(5))
        self.register_buffer("count", torch.arange(4))
        self.register_buffer("unsaved", torch.zeros(2), persistent=False)
        self.lin = nn.Linear(5, 7)
        self.gain = nn.Parameter(torch.tensor([1.5]))
        self.last_frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.frozen(self.embed(ids))) + self.shift.to(self.lin.weight.dtype)
        return self.head(self.lin(hidden) * self.gain + self.last_frozen.sum()).float().square().mean()

    def groups(self) -> list[dict[str, object]]:
        """One group with weight decay, one without."""
        trained = {n: p for n, p in self.named_parameters() if p.requires_grad}
        plain = [p for n, p in trained.items() if p.dim() < 2]
        return [
            {"params": [p for p in trained.values() if p.dim() >= 2], "weight_decay": 0.1},
            {"params": plain, "weight_decay": 0.0},
        ]


def llama(layers: int = 2, dtype: torch.dtype = torch.bfloat16, seed: int = 0):
    """A Llama whose layers are small and no multiples of anything."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=20, intermediate_size=33, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=10, vocab_size=37, tie_word_embeddings=False,
        max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


#: what the PEFT checkpoints were trained with, besides LoraConfig's defaults
PEFT = {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
PEFT_MORE = {
    **PEFT,
    "target_modules": ["q_proj", "down_proj", "embed_tokens"],
    "modules_to_save": ["lm_head"],
    "use_rslora": True,
}


def with_peft(model: nn.Module, **config: object):
    """The model in PEFT's wrapper, its B factors not zero."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT about transformers' names, and about the models' configuration
        adapted = get_peft_model(model, LoraConfig(**config))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.03)
    return adapted
