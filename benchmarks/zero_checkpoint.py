"""ZeRO-3 checkpoint → fused model: ``graft fuse`` against DeepSpeed's converter followed by PEFT's merge.

    python benchmarks/models.py /tmp/m300 --size 300m
    python benchmarks/zero_checkpoint.py /tmp/m300 [--ranks 4] [--runs 3] [--recipe 1]

The checkpoint is made here, file by file as DeepSpeed lays it out (bf16 frozen base, fp32 masters and two
moments for the adapter), of the base and the adapter in the folder; no training is run. Three ways, each a
process of its own, run in turn:

- graft: ``graft fuse BASE CHECKPOINT --adapter-config … -o OUT``, which ends with the fused model;
- zero_to_fp32: DeepSpeed's conversion alone, to safetensors, which ends with nothing merged;
- recipe: zero_to_fp32, then base, get_peft_model, load, merge_and_unload, save_pretrained.

Anonymous memory is the largest RssAnon seen in /proc, above that of ``import torch``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from pathlib import Path

import torch
from common import machine, median_ratio
from fuse_files import run
from safetensors.torch import load_file

CONVERT = """
import sys
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert
convert(sys.argv[1], sys.argv[2], safe_serialization=True)
"""

RECIPE = """
import json, sys, torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
checkpoint, base, config, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = get_peft_model(model, LoraConfig.from_pretrained(config))
model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(checkpoint), strict=False)
model.merge_and_unload().save_pretrained(out)
"""


def write_checkpoint(folder: Path, base: Path, adapter: Path, ranks: int) -> None:
    """A ZeRO stage 3 checkpoint of the base under PEFT's names, with the adapter trained."""
    factors = load_file(adapter / "adapter_model.safetensors")
    trained = {n.removesuffix("weight") + "default.weight": t.float() for n, t in factors.items()}
    adapted = {n.partition(".lora_")[0] for n in trained}
    frozen: dict[str, torch.Tensor] = {}
    for file in sorted(base.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            module, _, leaf = f"base_model.model.{name}".rpartition(".")
            frozen[f"{module}.base_layer.{leaf}" if module in adapted else f"{module}.{leaf}"] = tensor
    tag = folder / "global_step1"
    tag.mkdir(parents=True)
    names = [*frozen, *trained]
    for rank in range(ranks):
        model = {
            "module": {name: torch.empty(0, dtype=torch.bfloat16) for name in names},
            "buffer_names": [],
            "param_shapes": [{n: t.shape for n, t in trained.items()}],
            "frozen_param_shapes": {n: t.shape for n, t in frozen.items()},
            "frozen_param_fragments": {n: share(t, rank, ranks) for n, t in frozen.items()},
            "shared_params": {},
            "global_steps": 1,
            "global_samples": ranks,
            "skipped_steps": 0,
            "ds_version": "0.19.8",
        }
        torch.save(model, tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        flat = torch.cat([share(t, rank, ranks) for t in trained.values()])
        moments = {"step": torch.tensor(1.0), "exp_avg": flat * 0.1, "exp_avg_sq": flat * flat}
        states = {
            "zero_stage": 3,
            "partition_count": ranks,
            "optimizer_state_dict": {"state": {0: moments}, "param_groups": [{"params": [0]}]},
            "fp32_flat_groups": [flat],
        }
        path = tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": states, "ds_version": "0.19.8"}, path)
    (folder / "latest").write_text("global_step1")


def share(tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """A rank's part of the flat tensor, the last one padded."""
    part = -(-tensor.numel() // ranks)
    flat = torch.nn.functional.pad(tensor.reshape(-1), (0, part * ranks - tensor.numel()))
    return flat[rank * part : (rank + 1) * part].clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--recipe", type=int, default=1, help="how many of the runs include the whole recipe")
    args = parser.parse_args()
    base, adapter = args.folder / "base", args.folder / "adapter"
    checkpoint = args.folder / f"zero3-{args.ranks}"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, base, adapter, args.ranks)
    out, python = args.folder / "out-zero", sys.executable
    config = str(adapter / "adapter_config.json")
    ways = {
        "import torch": [python, "-c", "import torch"],
        "graft": [python, "-m", "graft", "fuse", str(base), str(checkpoint), "--adapter-config", config,
                  "-o", str(out)],
        "zero_to_fp32": [python, "-c", CONVERT, str(checkpoint), str(out)],
        "recipe": [python, "-c", RECIPE, str(checkpoint), str(base), str(adapter), str(out)],
    }  # fmt: skip
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "DS_ACCELERATOR": "cpu"}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, list[float]] = {name: [] for name in ways}
    for n in range(-1, args.runs):
        for name, command in ways.items():
            if name == "recipe" and n >= args.recipe:
                continue
            shutil.rmtree(out, ignore_errors=True)
            t, m = run(command, env)
            if n >= 0:
                seconds[name].append(t)
                memory[name].append(m)
    shutil.rmtree(out, ignore_errors=True)
    report(args, checkpoint, seconds, memory)


def report(
    args: argparse.Namespace,
    checkpoint: Path,
    seconds: dict[str, list[float]],
    memory: dict[str, list[float]],
) -> None:
    size = sum(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file()) / 1e9
    alpha = json.loads((args.folder / "adapter" / "adapter_config.json").read_text())
    print(f"{machine()}; checkpoint {size:.2f} GB of {args.ranks} ranks, rank-{alpha['r']} adapter")
    floor = statistics.median(memory["import torch"])
    print("| way | wall s, median (min – max) | anonymous MB above import torch |")
    print("|---|---|---|")
    for name, t in seconds.items():
        if t:
            above = statistics.median(memory[name]) - floor
            print(f"| {name} | {statistics.median(t):.2f} ({min(t):.2f} – {max(t):.2f}) | {above:.0f} |")
    for name in ("zero_to_fp32", "recipe"):
        if seconds[name]:
            ours = seconds["graft"][: len(seconds[name])]
            print(f"{name} over graft, wall: {median_ratio(seconds[name], ours):.1f}")


if __name__ == "__main__":
    main()
