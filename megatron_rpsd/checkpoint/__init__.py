"""Hugging Face checkpoints in and out of Megatron-Core: names, layouts, folders and flags."""
