"""Names that the command line offers, apart from the engines so that asking for help imports none."""

BACKENDS = ("transformers", "vllm", "openai", "replay", "oracle", "random", "blind:LOW-HIGH")
LOCAL_MODEL = ("transformers", "vllm")
"""Backends that load a model folder."""
COMPUTING = (*LOCAL_MODEL, "openai")
"""Backends where a model reads the prompts, here or on a server."""
FORCING = ("transformers", "vllm")
"""Backends that have teacher-forced scores."""
BOS_CHOICES = ("auto", "add", "none")
KEY_VARIABLE = "OPENAI_API_KEY"
