"""llama.cpp's GGUF adapters: one file, read and written with the ``gguf`` package."""
