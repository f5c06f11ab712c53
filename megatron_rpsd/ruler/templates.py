"""A tokenizer's own chat template around RULER's prompts."""

from __future__ import annotations

from pathlib import Path

from megatron_rpsd.ruler.prompts import ModelTemplate

MODEL_TEMPLATES = ("base", "chat")
_MARK = "The task stands here."


def model_template(name: str, tokenizer: Path) -> ModelTemplate:
    """`base` adds nothing; `chat` makes the task one user turn, and the answer's prefix begins the assistant's.

    RULER's own wraps CWE's solved example a second time; here the example stands inside the one turn, as VT's does.
    Raises ValueError where the folder has no chat template, or one that does not take a turn as it is.
    """
    if name not in MODEL_TEMPLATES:
        raise ValueError(f"--model-template {name}: the choices are {' and '.join(MODEL_TEMPLATES)}")
    if name == "base":
        return ModelTemplate()
    from transformers import AutoTokenizer  # a second of imports that base prompts do not need

    loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    if not loaded.chat_template:
        raise ValueError(
            f"--model-template chat: --tokenizer {tokenizer} has no chat template (chat_template.jinja or "
            "tokenizer_config.json); use the folder of an instruction-tuned model, or --model-template base"
        )
    turn = [{"role": "user", "content": _MARK}]
    text = loaded.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    if text.count(_MARK) != 1:
        raise ValueError(f"--model-template chat: the template of --tokenizer {tokenizer} does not show a user's turn")
    head, tail = text.split(_MARK)
    return ModelTemplate("chat", head, tail, bool(loaded.bos_token) and head.startswith(loaded.bos_token))
