"""DeepSpeed-VisualChat's training script on a small model, with the LoRA of graft.compat.

    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 examples/visualchat/main.py --zero_stage 3 \
        --lang_lora_dim 8 --vis_lora_dim 8 --only_optimize_lora

The options are VisualChat's. After each epoch the model is fused, saved and unfused, and trains on. All of it
is done twice, with and without the saving, to show that saving leaves no trace.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from data import batches, tokenizer
from model import create_model, write_pretrained

from graft.compat.deepspeed_chat import (
    LinearLayer_LoRA,
    convert_linear_layer_to_lora,
    fuse_lora,
    only_optimize_lora_parameters,
    save_hf_format,
    save_zero_three_model,
    unfuse_lora,
)

WEIGHTS = "pytorch_model.bin"
PASSES = 3  # over the 48 captions, in an epoch


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fine-tune a small vision-language model on made-up captions."
    )
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--per_device_train_batch_size", default=8, **number)
    parser.add_argument("--learning_rate", type=float, default=2e-2, metavar="LR")
    parser.add_argument("--num_train_epochs", default=3, **number)
    parser.add_argument("--seed", default=1234, **number)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--zero_stage", choices=range(4), default=3, **number)
    parser.add_argument("--lang_lora_dim", default=8, help="rank in the language model; 0: none", **number)
    parser.add_argument("--lang_lora_module_name", default="model.layers.")
    parser.add_argument("--vis_lora_dim", default=8, help="rank in the vision encoder; 0: none", **number)
    parser.add_argument("--vis_lora_module_name", default="encoder.layers.")
    parser.add_argument("--only_optimize_lora", action="store_true", help="train LoRA alone in both of them")
    parser.add_argument("--output_dir", help="keep the saved models here")
    return parser.parse_args()


def ds_config(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
        "bf16": {"enabled": args.precision == "bf16"},
        "zero_optimization": {"stage": args.zero_stage, "stage3_param_persistence_threshold": 100},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def build(args: argparse.Namespace) -> Any:
    """The model with LoRA in an engine."""
    torch.manual_seed(args.seed)
    model = create_model(args.pretrained, ds_config(args))
    if args.lang_lora_dim > 0:
        model.lang_decoder = convert_linear_layer_to_lora(
            model.lang_decoder, args.lang_lora_module_name, args.lang_lora_dim
        )
        if args.only_optimize_lora:
            model.lang_decoder = only_optimize_lora_parameters(model.lang_decoder)
    if args.vis_lora_dim > 0:
        model.vis_encoder = convert_linear_layer_to_lora(
            model.vis_encoder, args.vis_lora_module_name, args.vis_lora_dim
        )
        if args.only_optimize_lora:
            model.vis_encoder = only_optimize_lora_parameters(model.vis_encoder)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(args))[0]


def mine(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """This process's part of a batch."""
    return tuple(part.chunk(dist.get_world_size())[dist.get_rank()] for part in batch)


def mean(loss: torch.Tensor) -> float:
    total = loss.detach().float().clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


@torch.no_grad()
def evaluate(model: Any) -> float:
    model.eval()
    losses = [mean(model(*mine(batch))) for batch in batches(tokenizer(), 24, seed=0)]
    model.train()
    return sum(losses) / len(losses)


def train(args: argparse.Namespace, out: Path | None) -> tuple[Any, list[float], list[bool]]:
    """One run, saved after each epoch if there is a place: the engine, its losses, each save's check."""
    engine, words = build(args), tokenizer()
    size = args.per_device_train_batch_size * dist.get_world_size()
    losses: list[float] = []
    checks: list[bool] = []
    for epoch in range(args.num_train_epochs):
        for seed in range(PASSES * epoch + 1, PASSES * (epoch + 1) + 1):
            for batch in batches(words, size, seed):
                loss = engine(*mine(batch))
                engine.backward(loss)
                engine.step()
                losses.append(mean(loss))
        evaluated = evaluate(engine)
        if out is not None:
            say(f"epoch {epoch}: loss {losses[-1]:.3f}, evaluated {evaluated:.3f}")
            checks.append(save(engine, args, out, f"epoch-{epoch}"))
    return engine, losses, checks


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line)


def save(engine: Any, args: argparse.Namespace, out: Path, name: str) -> bool:
    """Fuse, save, unfuse; whether the file holds the fused bits and every weight got its own bits back."""
    parameters = dict(engine.module.named_parameters())
    before = {n: held(p).clone() for n, p in parameters.items()}
    engine = fuse_lora(engine)
    if dist.get_rank() == 0:
        args.output_dir = str(out)
        save_hf_format(engine, tokenizer(), args, name)
    if args.zero_stage == 3:
        save_zero_three_model(engine, dist.get_rank(), out, zero_stage=args.zero_stage, sub_folder=name)
    dist.barrier()
    stored = torch.load(out / name / WEIGHTS, weights_only=True)
    there = [same_bits(p, stored[n]) for n, p in parameters.items() if n in stored]
    engine = unfuse_lora(engine)
    back = [torch.equal(held(p), before[n]) for n, p in parameters.items()]
    return len(there) > 40 and all(there) and all(back)


def held(parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter."""
    return getattr(parameter, "ds_tensor", parameter).detach()


def same_bits(parameter: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether this process's part of a parameter is that of the stored tensor."""
    part, flat = held(parameter).view(-1), stored.view(-1)
    if hasattr(parameter, "ds_tensor"):
        flat = flat[dist.get_rank() * part.numel() :][: part.numel()]  # the last slice ends with padding
    return torch.equal(part[: flat.numel()], flat)


def main() -> None:
    args = parse_args()
    os.environ.setdefault("LOCAL_SIZE", os.environ["LOCAL_WORLD_SIZE"])
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
        False  # a CPU operator, compiled for half a minute
    )
    deepspeed.init_distributed("gloo" if os.environ.get("DS_ACCELERATOR") == "cpu" else None, verbose=False)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as own:
        folders = [own]
        dist.broadcast_object_list(folders, 0)
        args.pretrained = Path(folders[0], "pretrained")
        if dist.get_rank() == 0:
            write_pretrained(args.pretrained, len(tokenizer()))
        dist.barrier()
        report(args, Path(args.output_dir or folders[0]))
        dist.barrier()  # the folder goes when the first process is through
    dist.destroy_process_group()


def report(args: argparse.Namespace, out: Path) -> None:
    _, undisturbed, _ = train(args, None)
    engine, losses, checks = train(args, out)
    same = losses == undisturbed
    fused = evaluate(fuse_lora(engine))
    plain = create_model(args.pretrained).to(engine.module.lang_embed.weight.dtype)
    file = out / f"epoch-{args.num_train_epochs - 1}" / WEIGHTS
    plain.load_state_dict(torch.load(file, weights_only=True), strict=True)
    close = abs(evaluate(plain) - fused) < 1e-2
    parts = (engine.module.lang_decoder, engine.module.vis_encoder)
    lang, vis = (sum(isinstance(m, LinearLayer_LoRA) for m in part.modules()) for part in parts)
    say(f"stage {args.zero_stage}; LoRA in {lang} linears of lang_decoder and {vis} of vis_encoder")
    say(f"loss {losses[0]:.3f} → {losses[-1]:.3f}; the same curve without saving: {same}")
    say(f"the files hold the fused bits, and every bit came back: {all(checks)}")
    say(f"a plain model loads the last file and computes the same: {close}")
    assert same and all(checks) and close and losses[-1] < losses[0] / 2


if __name__ == "__main__":
    main()
