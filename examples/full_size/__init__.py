"""Adapting a whole model: what the recipes llama3_8b_64k and qwen3_4b_256k share, as arguments (docs/full_size.md)."""
