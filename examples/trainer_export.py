"""Hugging Face's Trainer: after each epoch a fused model and the adapter, while training goes on.

Under accelerate with DDP or DeepSpeed the script is the same, started by `accelerate launch` or torchrun.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
import transformers

import graft
from graft.train.transformers import ExportCallback

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=30, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
model = transformers.LlamaForCausalLM(config)
base = copy.deepcopy(model)
graft.adapt(model, ["q_proj", "v_proj", "down_proj"], rank=4, alpha=8, dropout=0.05)

numbers = torch.randint(0, 30, (16, 8))
rows = [{"input_ids": row, "labels": row} for row in numbers]

with tempfile.TemporaryDirectory() as folder:
    runs = Path(folder, "runs")
    arguments = transformers.TrainingArguments(
        str(Path(folder, "trainer")),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        logging_strategy="epoch",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    # after the epochs 1 and 3, in 16 bits; every export has both, fused/ and adapter/
    callback = ExportCallback(runs / "epoch-{epoch}", epochs=[1, 3], dtype=torch.bfloat16)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()
    print("exported", *sorted(p.name for p in runs.iterdir()))

    model.eval()
    with torch.no_grad():
        adapted = model(numbers).logits
        fused = transformers.AutoModelForCausalLM.from_pretrained(runs / "epoch-3" / "fused", dtype="auto")
        far = (fused.eval()(numbers).logits - adapted).abs().max() / adapted.abs().max()
        graft.load(base, runs / "epoch-3" / "adapter", quiet=True)
        same = torch.equal(base.eval()(numbers).logits, adapted)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}; fused in {fused.dtype}, logits within {far:.1%}")
    print(f"the base with the saved adapter computes the same: {same}")

assert same and far < 0.02 and losses[-1] < losses[0]
