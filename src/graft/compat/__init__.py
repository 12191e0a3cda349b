"""The names of other LoRA libraries on Graft's core: their users change the import line only.

``graft.compat.loralib`` stands for Microsoft's loralib, ``graft.compat.deepspeed_chat`` for the LoRA of
DeepSpeed-Chat and DeepSpeed-VisualChat, ``graft.compat.megatron_bridge`` for NVIDIA's Megatron-Bridge. Each
module lists where it differs from its original; ``docs/compat.md`` says why.
"""
