"""loralib's layers on Graft's core: ``import graft.compat.loralib as lora`` and nothing else changes.

Names, signatures, attributes, parameters, shapes, state-dict keys, initial values (the same random numbers
in the same order) and forwards are those of loralib 0.1.2 (Microsoft). Every layer is one of Graft's too:
``graft.save``, ``fuse``, ``verify``, ``export`` and ``unadapt`` work on a model that holds them.

Where loralib is broken, this works:

* ``Conv1d`` and ``Conv3d`` with a kernel above 1; ``kernel_size=(k, k)``
* ``eval()`` and ``train()`` give every bit of W back, also in half precision, and return the layer
* pickle and ``torch.save`` of a whole layer
* while merged: loading, ``half()``, ``to()``, setting ``scaling``, ``reset_parameters()``
* ``reset_parameters()`` with ``fan_in_fan_out`` draws from the fan-in, not from the fan-out
* ``MergedLinear`` with r > 0 and no block enabled, or with 0 and 1 for ``enable_lora``
* ``Embedding(_weight=…)`` and ``Embedding.from_pretrained`` keep the given weight
* ``lora_only`` means the biases of convolutions too, and saves every bias that it trains
* factors of another dtype than W
* modules that read a child's weight themselves (``nn.MultiheadAttention``'s ``out_proj``), once
  ``mark_only_lora_as_trainable`` has seen the model

Where loralib is silently wrong, this says so:

* ``state_dict()`` in eval mode holds W, not W + ΔW, so that ΔW is added once wherever it is loaded; the log
  says so, once
* loading, while merged, a whole state dict that may hold W + ΔW already: a warning
* W, A or B edited while merged, ``merged`` or ``r`` set by hand: ``StateError``
* a sum beyond fp16's range: ``StateError``, and the weight stays unmerged
* a weight tied to another module, which merging changes too: ``mark_only_lora_as_trainable`` warns
* ``lora_dropout`` of a convolution, which nothing uses: a warning
* ``lora_`` or ``bias`` inside a longer word (``flora_gate``), which counts by loralib's rule: a warning
* an embedding's ``max_norm``, negative ``r`` or ``lora_dropout``, a tensor for ``scaling``: ``TargetError``

Other differences: an embedding's ``scale_grad_by_freq`` scales the gradients of A and B, not of A alone, its
``sparse`` leaves A's gradient dense, and its padding row gives B no gradient; a backward through a forward
that ran before the weight was merged is an error of autograd; ``eval()`` does not merge a weight that is
spread over processes (``graft.fuse(model)`` does).
"""

from .conv import Conv1d, Conv2d, Conv3d, ConvLoRA
from .layers import Embedding, Linear, LoRALayer, MergedLinear
from .utils import lora_state_dict, mark_only_lora_as_trainable

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
]
