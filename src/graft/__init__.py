"""Graft: LoRA for PyTorch. Adapt, train, save, fuse, unfuse and export; exactly, on every road."""

__version__ = "0.1.0"
