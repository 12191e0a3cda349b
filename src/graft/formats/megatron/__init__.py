"""LoRA of Megatron-Bridge and NeMo: ``torch_dist`` checkpoints, read and written without Megatron."""
