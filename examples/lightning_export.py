"""Lightning: LoRA by PEFT, a fused model and the adapter after each epoch; then the same from a checkpoint.

On GPUs take strategy="deepspeed_stage_3", "ddp" or ModelParallelStrategy below: the callback is the same.
A model that graft.adapt has adapted needs nothing else either.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import peft
import torch
import transformers
from safetensors.torch import load_file

from graft.fuse_files import fuse
from graft.train.lightning import ExportCallback

NUMBERS = torch.randint(0, 30, (16, 8), generator=torch.Generator().manual_seed(0))


class Module(lightning.LightningModule):
    def __init__(self, base: Path) -> None:
        super().__init__()
        plain = transformers.AutoModelForCausalLM.from_pretrained(base)
        lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
        self.model = peft.get_peft_model(plain, lora)
        self.losses: list[float] = []

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=2e-2)


with tempfile.TemporaryDirectory() as folder:
    base, runs, checkpoint = Path(folder, "base"), Path(folder, "runs"), Path(folder, "last.ckpt")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(base)

    # 1. Train. The callback finds the adapted model in the module and writes runs/epoch-0, runs/epoch-1, ….
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=3,
        callbacks=[ExportCallback(runs / "epoch-{epoch}", keep=2)],
        enable_progress_bar=False,
        **options,
    )
    module = Module(base)
    trainer.fit(module, torch.utils.data.DataLoader(list(NUMBERS), batch_size=4))
    print(f"loss {module.losses[0]:.3f} → {module.losses[-1]:.3f}")
    print("kept", *sorted(p.name for p in runs.iterdir()))

    # 2. What was exported is a plain model, and computes what the adapted one does.
    fused = transformers.AutoModelForCausalLM.from_pretrained(runs / "epoch-2" / "fused")
    with torch.no_grad():
        far = (fused.eval()(NUMBERS).logits - module.model.eval()(input_ids=NUMBERS).logits).abs().max()
    print(f"largest difference of logits: {far:.1e}")

    # 3. Without the callback: the trainer's checkpoint, fused from file to file. In a shell:
    #    graft fuse base last.ckpt --adapter-config adapter_config.json -o late
    trainer.save_checkpoint(checkpoint, weights_only=True)
    module.model.peft_config["default"].save_pretrained(folder)
    fuse(base, checkpoint, Path(folder, "late"), adapter_config=Path(folder, "adapter_config.json"))
    one = load_file(runs / "epoch-2" / "fused" / "model.safetensors")
    other = load_file(Path(folder, "late", "model.safetensors"))
    same = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    print(f"exported and fused from the checkpoint alike, bit for bit: {same}")

assert same and far < 1e-5 and module.losses[-1] < module.losses[0]
