"""A tokenizer in which every character is a token, with chat templates small enough to write masks by hand."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<s>", "<e>", "<pad>")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,:?!+=0123456789\n"

_HEAD, _REST = "{{ '<s>' + m.role + '\n' }}", "{{ m.content + '<e>' }}"
_PROMPT = "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
PLAIN = "{% for m in messages %}" + _HEAD + _REST + "{{ '\n' }}{% endfor %}" + _PROMPT
MARKED = (
    "{% for m in messages %}" + _HEAD + "{% if m.role == 'assistant' %}{% generation %}" + _REST + "{% endgeneration %}"
    "{% else %}" + _REST + "{% endif %}{{ '\n' }}{% endfor %}" + _PROMPT
)
# The last assistant turn has an empty thought, as Qwen3's: what is rendered is no beginning of what is rendered later.
THINKING = (
    "{% for m in messages %}" + _HEAD + "{% if m.role == 'assistant' and loop.last %}{{ 'T\n' }}{% endif %}" + _REST
    + "{{ '\n' }}{% endfor %}" + _PROMPT
)  # fmt: skip
# The prompt for an answer is not how the answer begins.
BROKEN = PLAIN.replace("<s>assistant", "<s>A:")
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}" + PLAIN


def save_chat_tokenizer(folder: Path, template: str | None = PLAIN) -> Path:
    """Saves it in `folder`: 71 characters and 3 special tokens, with ids in that order."""
    vocabulary = {token: index for index, token in enumerate([*CHARACTERS, *SPECIAL])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", pad_token="<pad>")
    saved.add_special_tokens({"bos_token": "<s>"})
    saved.chat_template = template
    saved.save_pretrained(folder)
    return folder


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict:
    return {"role": "system", "content": content}


def write_chats(path: Path, lines: list[list[dict]]) -> Path:
    """A JSONL file of conversations."""
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in lines))
    return path
