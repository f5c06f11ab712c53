"""RULER's prompts, byte for byte (edition 2025-07), with where the evidence of every answer stands."""
