"""Megatron-Bridge's LoRA (``megatron.bridge.peft``, and NeMo's before it) on Graft's core.

Change the import, keep the code::

    from graft.compat.megatron_bridge import LoRA, LoRAMerge, VLMLoRA

Names, fields, defaults, attributes and state-dict keys are those of NVIDIA-NeMo/Megatron-Bridge:
``<linear>.linear_in.weight`` and ``<linear>.linear_out.weight`` for an ``nn.Linear``,
``<linear>.adapter.linear_in.weight`` and ``….linear_out.weight`` for a linear of Megatron-core. Factors begin
in the same distributions; the random numbers are not the same ones. An adapted layer is the same object as
before with its class swapped, and one of Graft's: ``graft.save``, ``fuse``, ``verify``, ``export`` and
``unadapt`` work on it. ``layer.to_wrap`` is the layer itself.

What is different:

* **Options** are honoured on every kind of layer. The original ignores ``dropout_position`` and
  ``lora_B_init_method`` for an ``nn.Linear``, and ``lora_dtype`` for Megatron's linears. ``mid`` is a third
  position. An unknown init method, or A and B both zero, is an error. The weight and bias of an adapted layer
  are frozen, whatever ``freeze_model`` leaves.
* **Tensor parallelism**: A is cut iff W is cut along its inputs, B iff W is cut along its outputs, and the
  other is whole on every process; the original cuts A along ``dim`` for column-parallel layers and B along
  its rows for row-parallel ones. So ``dim`` need not be a multiple of the processes, merging sends nothing,
  and a run does not depend on their number. ``sharded_state_dict`` describes the factors as they are cut.
* **Targets**: ``*`` is any text and a dot a dot. A target that stands for no linear is an error with the
  nearest names; one by exact name that is another layer is an error too, and so is a tied weight (use
  ``graft.adapt``). If one layer cannot be adapted, none is.
* **Calling twice** leaves the factors training; the original freezes them. ``training=True`` on a model that
  is in ``DistributedDataParallel`` already is an error: its new factors' gradients would not be summed.
* **disable_adapter** leaves every layer as it was before, and merged layers are W inside of it; the original
  switches all on at the end. ``disable_adapter_layers`` refuses merged layers.
* **LoRAMerge** merges ``nn.Linear`` layers too, all or none, with one rounding. A merged layer's forward adds
  nothing (the original's adds ΔW again), merging again does nothing, and ``graft.unfuse(model)`` gives every
  bit back; ``graft.unadapt(model, keep_fused=True)`` makes plain layers of them. Its state dict has one key
  more, ``lora_fused_weight``, and loading that is an error. ``merge`` refuses factors whose shapes fit no
  layout; the original multiplies what it has.
* **VLMLoRA** knows Hugging Face's names too, and looks into all chunks. A model without any part is an error.
* **Experts**: those of a ``SequentialMLP`` have factors of their own. Grouped expert layers, routers and
  Transformer Engine's ``Linear`` are refused, so ``share_expert_adapters`` has nothing to decide.
"""

from .base import PEFT
from .layers import LinearAdapter, LoRALinear
from .lora import LoRA, VLMLoRA
from .matcher import ModuleMatcher, wildcard_match
from .merging import LoRAMerge

__all__ = [
    "PEFT",
    "LinearAdapter",
    "LoRA",
    "LoRALinear",
    "LoRAMerge",
    "ModuleMatcher",
    "VLMLoRA",
    "wildcard_match",
]
