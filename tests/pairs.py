"""A small valid base and adapter, written with torch, safetensors and json alone, and ways to damage them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HIDDEN, INNER, VOCAB, LAYERS, RANK = 32, 48, 64, 2, 4
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
Q0 = "model.layers.0.self_attn.q_proj.weight"
PREFIX = "base_model.model."
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
ADAPTER_CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "base_model_name_or_path": "somebody/tiny-llama",
    "task_type": "CAUSAL_LM",
    "r": RANK,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "target_modules": ["q_proj", "v_proj"],
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}

Tensors = dict[str, torch.Tensor]


def llama(dtype: torch.dtype = torch.bfloat16, seed: int = 0, width: int = 1) -> Tensors:
    """The tensors of a two-layer Llama with grouped-query attention, ``width`` times as wide."""
    torch.manual_seed(seed)
    hidden, inner, vocab = HIDDEN * width, INNER * width, VOCAB * width
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for n in range(LAYERS):
        layer = f"model.layers.{n}."
        for name, rows in (("q_proj", hidden), ("k_proj", hidden // 2), ("v_proj", hidden // 2)):
            shapes[f"{layer}self_attn.{name}.weight"] = (rows, hidden)
        shapes[f"{layer}self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}mlp.gate_proj.weight"] = shapes[f"{layer}mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{layer}input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (hidden,)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    return {name: (0.05 * torch.randn(shape)).to(dtype) for name, shape in shapes.items()}


def lora(dtype: torch.dtype = torch.float32, seed: int = 1, width: int = 1) -> Tensors:
    """PEFT's tensors for q_proj and v_proj of both layers."""
    torch.manual_seed(seed)
    hidden, tensors = HIDDEN * width, Tensors()
    for n in range(LAYERS):
        for name, rows in (("q_proj", hidden), ("v_proj", hidden // 2)):
            site = f"{PREFIX}model.layers.{n}.self_attn.{name}"
            tensors[f"{site}.lora_A.weight"] = (0.1 * torch.randn(RANK, hidden)).to(dtype)
            tensors[f"{site}.lora_B.weight"] = (0.1 * torch.randn(rows, RANK)).to(dtype)
    return tensors


@dataclass
class Pair:
    """A base, an adapter, the place for the output, and the arguments of the call."""

    root: Path
    out: Path = field(init=False)
    args: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.base, self.adapter = self.root / "base", self.root / "adapter"
        self.out = self.root / "out"

    @property
    def weights(self) -> Path:
        return self.adapter / "adapter_model.safetensors"

    @property
    def settings(self) -> Path:
        return self.adapter / "adapter_config.json"

    @property
    def shards(self) -> tuple[Path, Path]:
        return self.base / SHARDS[0], self.base / SHARDS[1]

    @property
    def index(self) -> Path:
        return self.base / INDEX

    @property
    def call(self) -> list[str]:
        return ["fuse", str(self.base), str(self.adapter), "-o", str(self.out), *self.args]


def write_pair(root: Path, dtype: torch.dtype = torch.bfloat16, width: int = 1) -> Pair:
    """A valid pair in ``root``: base in two shards with an index, adapter as PEFT writes it."""
    pair = Pair(root)
    pair.base.mkdir(parents=True)
    pair.adapter.mkdir()
    write_shards(pair, llama(dtype, width=width))
    sizes = {"hidden_size": HIDDEN * width, "intermediate_size": INNER * width, "vocab_size": VOCAB * width}
    (pair.base / "config.json").write_text(json.dumps(CONFIG | sizes))
    (pair.base / "generation_config.json").write_text('{"eos_token_id": 2}')
    save_file(lora(width=width), pair.weights, metadata={"format": "pt"})
    pair.settings.write_text(json.dumps(ADAPTER_CONFIG))
    return pair


def write_shards(pair: Pair, tensors: Tensors) -> None:
    """``tensors`` in two shards and the index that names them."""
    names = list(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    weight_map: dict[str, str] = {}
    for file, half in zip(pair.shards, halves, strict=True):
        save_file({n: tensors[n] for n in half}, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(half, file.name)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    pair.index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))


def edit_tensors(file: Path, edit: Callable[[Tensors], object]) -> None:
    """Change the tensors of a safetensors file in place."""
    tensors = {name: t.clone() for name, t in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_header(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a safetensors file in place and leave its data."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    write_header(file, json.dumps(header).encode(), raw[8 + length :])


def write_header(file: Path, header: bytes, data: bytes = b"") -> None:
    """A safetensors file of this header, valid or not, and this data."""
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


def snapshot(root: Path) -> dict[str, str]:
    """Every path below ``root`` with what it is and a hash of what it holds."""
    found: dict[str, str] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        else:
            found[name] = "folder" if path.is_dir() else sha256(path.read_bytes()).hexdigest()
    return found
