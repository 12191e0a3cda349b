"""Tiny random pipelines of diffusers, and random updates of their modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

#: module → A ``[r, in, …]``, B ``[out, r, 1, …]``
Updates = dict[str, tuple[torch.Tensor, torch.Tensor]]

#: the ends of names of modules that are trained
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
DENOISER = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "time_emb_proj", "conv1", "conv2")
SAMPLERS = ("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out")
EMBEDDERS = ("time_embedding.linear_1", "add_embedding.linear_1", "add_embedding.linear_2")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def quiet(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call it without the warnings that libraries give about each other and themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **options)


def unet(**changes: Any) -> Any:
    """A UNet with and without attention."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 12,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            **changes,
        }
    )


def clip(projection: bool = False, seed: int = 1) -> Any:
    """A text encoder of two layers; with a projection its names begin with ``text_model``."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=40,
        max_position_embeddings=16,
        projection_dim=10,
        bos_token_id=0,
        eos_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def vae() -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(2)
    return AutoencoderKL(block_out_channels=[8], norm_num_groups=4, latent_channels=4)


def stable_diffusion() -> Any:
    """A pipeline of the form of Stable Diffusion 1."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae(), clip(), None, unet(), DDIMScheduler(), None, None, requires_safety_checker=False
    )


def sdxl() -> Any:
    """A pipeline of the form of SDXL: two text encoders, attention on the lower levels only."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    denoiser = unet(
        block_out_channels=(8, 12, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=34,
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        vae(), clip(), clip(projection=True, seed=3), None, None, denoiser, DDIMScheduler()
    )


def save(pipeline: Any, folder: Path) -> Path:
    """Save it, with a tokenizer's files, which these pipelines lack."""
    quiet(pipeline.save_pretrained, folder)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text('{"a": 0}')
    return folder


def load(kind: type[Any], folder: Path) -> Any:
    """The pipeline of a directory."""
    absent = dict.fromkeys(("tokenizer", "tokenizer_2", "feature_extractor", "image_encoder"))
    if not hasattr(kind, "from_pretrained") or "XL" not in kind.__name__:
        absent = {**absent, "safety_checker": None}
        del absent["tokenizer_2"]
    return quiet(kind.from_pretrained, folder, **absent)


def adapted(model: Any, ends: tuple[str, ...], rank: int = 2, seed: int = 0) -> Updates:
    """Random factors for each module whose name ends so."""
    torch.manual_seed(seed)
    found: Updates = {}
    for name, weight in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and any(f".{module}".endswith(f".{end}") for end in ends):
            ones = (1,) * (weight.dim() - 2)
            a = torch.randn(rank, *weight.shape[1:])
            found[module] = (a, torch.randn(weight.shape[0], rank, *ones) * 0.1)
    return found


def weights(pipeline: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a pipeline's models, by component and name."""
    models = {name: one for name, one in pipeline.components.items() if isinstance(one, torch.nn.Module)}
    return {f"{name}.{key}": value for name, one in models.items() for key, value in one.state_dict().items()}


def update(pair: tuple[torch.Tensor, torch.Tensor], scale: float) -> torch.Tensor:
    """ΔW of one module, by the definition."""
    a, b = (one.double() for one in pair)
    return scale * (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:])


def expected(
    base: Mapping[str, torch.Tensor], updates: Mapping[str, Updates], scale: float
) -> dict[str, torch.Tensor]:
    """W + ΔW in float64, by component and name."""
    found = {name: weight.double() for name, weight in base.items()}
    for component, mine in updates.items():
        for module, pair in mine.items():
            found[f"{component}.{module}.weight"] = found[f"{component}.{module}.weight"] + update(
                pair, scale
            )
    return found
