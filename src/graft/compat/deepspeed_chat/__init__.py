"""The LoRA of DeepSpeed-Chat and DeepSpeed-VisualChat, on Graft's core.

The names, signatures, parameters (``lora_right_weight`` ``[in, r]``, ``lora_left_weight`` ``[r, out]``),
first values and state-dict keys are those of microsoft/DeepSpeedExamples, ``utils/module/lora.py`` and the
two savers of ``utils/utils.py``. Change the import, keep the code. ::

    from graft.compat.deepspeed_chat import convert_linear_layer_to_lora, fuse_lora, unfuse_lora

What is different:

* **Fusing** rounds ``W + right · left · scale`` once, and unfusing gives every bit back; the originals add
  and subtract in the weight's dtype and drift. Training while fused, and unfusing after the factors or the
  fused weight changed, are errors.
* **Under ZeRO-3** each process edits its own slice, and A and B alone are gathered. The originals gather
  every weight, and fuse a temporary copy where a forward left one alive.
* **Choosing**: a ``part_module_name`` that matches nothing, a tied weight, a linear with a forward of its own
  and an unknown name in ``force_optimize_params`` are errors; the originals pass over them. The linear inside
  a ``MultiheadAttention`` trains; the originals' factors get no gradient there.
* **Converting** keeps the module object, with its hooks; the originals put a new one in its place. A layer is
  an ``nn.Linear``. ``train()`` and ``eval()`` return it and set ``training``. ``fuse_lora`` cannot be
  assigned.
* **Files**: the module tells what is LoRA, not ``"lora"`` in a key, so ``flora_gate`` stays. Factors are left
  out where the weight holds ΔW, and kept where it does not. ``save_zero_three_model`` writes buffers and tied
  weights too. No tensor is empty, and no file is half-written: under ZeRO-3 ``save_hf_format``, which one
  process calls, leaves ``pytorch_model.bin`` to ``save_zero_three_model``. ``train_args.pt`` holds as text
  what ``torch.load(weights_only=True)`` would not take back.
* **A state dict taken while fused** has one key more for each layer, ``lora_fused_weight``; loading it is an
  error.
* ``make_model_gradient_checkpointing_compatible`` looks inside a model too (a reward model), and warns where
  it can do nothing.
"""

from .convert import (
    _z3_params_to_fetch,  # pyright: ignore[reportPrivateUsage]
    convert_linear_layer_to_lora,
    convert_lora_to_linear_layer,
    fuse_lora,
    make_model_gradient_checkpointing_compatible,
    only_optimize_lora_parameters,
    recursive_getattr,
    recursive_setattr,
    unfuse_lora,
)
from .layer import LinearLayer_LoRA
from .saving import save_hf_format, save_zero_three_model

__all__ = [
    "LinearLayer_LoRA",
    "_z3_params_to_fetch",
    "convert_linear_layer_to_lora",
    "convert_lora_to_linear_layer",
    "fuse_lora",
    "make_model_gradient_checkpointing_compatible",
    "only_optimize_lora_parameters",
    "recursive_getattr",
    "recursive_setattr",
    "save_hf_format",
    "save_zero_three_model",
    "unfuse_lora",
]
