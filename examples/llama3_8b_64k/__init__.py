"""Llama-3-8B-Instruct from 8K to 64K tokens, as arXiv 2604.14339 does on 16 A100s; see docs/full_size.md."""
