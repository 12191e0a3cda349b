"""A small model of DeepSpeed-VisualChat's make: CLIP's vision encoder, a projection, a LLaMA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig

WIDTH = 32


def write_pretrained(folder: Path, words: int) -> None:
    """Two models with random numbers, in the place of downloaded ones."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
    }
    vision = CLIPVisionConfig(image_size=16, patch_size=4, num_hidden_layers=1, **sizes)
    lang = LlamaConfig(vocab_size=words, num_hidden_layers=2, tie_word_embeddings=True, **sizes)
    CLIPVisionModel(vision).save_pretrained(folder / "vision")
    LlamaForCausalLM(lang).save_pretrained(folder / "lang")


def create_model(folder: Path, ds_config: dict[str, Any] | None = None) -> VisionLanguageModel:
    """The two models joined; under ZeRO-3 they are partitioned as they load."""
    spread = ds_config is not None and ds_config["zero_optimization"]["stage"] == 3
    told = HfDeepSpeedConfig(ds_config) if spread else None  # while it lives, from_pretrained partitions
    vision = CLIPVisionModel.from_pretrained(folder / "vision")
    lang = LlamaForCausalLM.from_pretrained(folder / "lang")
    del told
    return VisionLanguageModel(vision, lang).to(lang.dtype)


class VisionLanguageModel(nn.Module):
    """The image's projected features, then the caption's embeddings, through the language model.

    As in VisualChat the vision encoder and the language model are frozen; the projection and the embeddings
    of what is read train. The language model's head is tied to embeddings of its own.
    """

    def __init__(self, vis_encoder: CLIPVisionModel, lang_decoder: LlamaForCausalLM) -> None:
        super().__init__()
        self.vis_encoder = vis_encoder.requires_grad_(False)
        self.lang_decoder = lang_decoder.requires_grad_(False)
        self.lang_embed = nn.Embedding(lang_decoder.config.vocab_size, WIDTH)
        self.projection = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
        self.register_buffer("image_mean", torch.zeros(3, 1, 1))

    def forward(self, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The mean loss of the caption's tokens after the first."""
        images = (images - self.image_mean).to(self.lang_embed.weight.dtype)
        seen = self.projection(self.vis_encoder(images).last_hidden_state)
        read = self.lang_embed(ids)
        logits = self.lang_decoder(inputs_embeds=torch.cat([seen, read], dim=1)).logits
        guesses = logits[:, seen.shape[1] : -1].flatten(0, 1).float()
        return nn.functional.cross_entropy(guesses, ids[:, 1:].flatten())
