"""RULER's prompts, byte for byte in both editions, with where the evidence of every answer stands; and variants."""
