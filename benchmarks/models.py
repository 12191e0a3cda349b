"""Write a Llama-shaped base of random bf16 weights and a PEFT adapter for all its linear layers.

python benchmarks/models.py FOLDER --size 300m|1b|3b [--rank 16]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size",
)  # fmt: skip
_ROWS = {
    "30m": (384, 1024, 6, 6, 2, 64, 32000),
    "300m": (1024, 4096, 16, 16, 8, 64, 32000),
    "1b": (2048, 5632, 22, 32, 4, 64, 32000),
    "3b": (3072, 8192, 28, 24, 8, 128, 128256),
}
SIZES = {name: dict(zip(_FIELDS, row, strict=True)) for name, row in _ROWS.items()}


def linears(c: dict[str, int]) -> dict[str, tuple[int, int]]:
    h, f = c["hidden_size"], c["intermediate_size"]
    q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    return {
        "self_attn.q_proj": (q, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, q), "mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f),
    }  # fmt: skip


class Noise:
    """Normal numbers cut from one pool at odd offsets: as good as fresh ones for a benchmark, and quick."""

    def __init__(self) -> None:
        self.pool = torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
        self.at = 0

    def __call__(self, *shape: int) -> torch.Tensor:
        count = int(torch.Size(shape).numel())
        self.at = (self.at + 7919 * 131) % 1000003
        reps = -(-(self.at + count) // self.pool.numel())
        return self.pool.repeat(reps)[self.at : self.at + count].view(shape).clone()


def write_base(folder: Path, c: dict[str, int], shard_bytes: int = 5 * 10**9) -> None:
    folder.mkdir(parents=True)
    noise, h = Noise(), c["hidden_size"]
    shards: list[dict[str, torch.Tensor]] = [{}]
    sizes = [0]

    def put(name: str, tensor: torch.Tensor) -> None:
        if sizes[-1] + tensor.nbytes > shard_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = tensor
        sizes[-1] += tensor.nbytes

    put("model.embed_tokens.weight", noise(c["vocab_size"], h))
    for n in range(c["num_hidden_layers"]):
        for name, shape in linears(c).items():
            put(f"model.layers.{n}.{name}.weight", noise(*shape))
        put(f"model.layers.{n}.input_layernorm.weight", torch.ones(h, dtype=torch.bfloat16))
        put(f"model.layers.{n}.post_attention_layernorm.weight", torch.ones(h, dtype=torch.bfloat16))
    put("model.norm.weight", torch.ones(h, dtype=torch.bfloat16))
    where = {}
    for n, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{n:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        **c,
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_adapter(folder: Path, c: dict[str, int], rank: int) -> None:
    folder.mkdir(parents=True)
    g = torch.Generator().manual_seed(1)
    tensors = {}
    for n in range(c["num_hidden_layers"]):
        for name, (o, i) in linears(c).items():
            key = f"base_model.model.model.layers.{n}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, i, generator=g) / i**0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(o, rank, generator=g) * 1e-3
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
              "target_modules": sorted({k.split(".")[-1] for k in linears(c)}), "bias": "none"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="300m")
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    write_base(args.folder / "base", SIZES[args.size])
    write_adapter(args.folder / "adapter", SIZES[args.size], args.rank)


if __name__ == "__main__":
    main()
