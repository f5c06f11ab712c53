"""Qwen3-4B from 32K to 256K tokens, as arXiv 2604.14339 does on 32 A100s; see docs/full_size.md."""
