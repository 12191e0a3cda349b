"""PEFT (Hugging Face): ``adapter_config.json`` + ``adapter_model.safetensors`` or ``.bin``."""
