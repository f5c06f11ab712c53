"""Conversations: JSONL lines with "messages", and their tokens with a mask of what the assistant must produce.

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

            <|im_start|>user\\n2 + 2?<|im_end|>\\n<|im_start|>assistant\\n4<|im_end|>\\n
    mask                                                              1 1

A line may hold several conversations behind one another. "starts", the numbers of their first messages, tells them
apart; without it each system message begins a new one (Megatron's convention):

    {"messages": [USER, ASSISTANT, USER, ASSISTANT, ASSISTANT], "starts": [0, 2]}

The text comes from the tokenizer's own chat template. A template with {% generation %} marks says itself what the
assistant produces. For any other one the conversation is rendered in growing parts: what follows the prompt for an
assistant turn (`add_generation_prompt`) is that turn, its end-of-turn token included; white space that the template
writes behind that token is not, as no model is asked for it.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from jinja2.exceptions import TemplateError

from megatron_rpsd.data.documents import has_half_pair

ROLES = ("system", "user", "assistant", "tool")
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def parse_conversations(raw: bytes, label: str) -> list[list[dict]]:
    """The conversations of a JSONL line, each as its messages.

    Raises:
        ValueError: what is wrong with the line, behind `label` (file:line).
    """
    try:
        record = json.loads(raw)
    except UnicodeDecodeError as error:
        raise ValueError(f"{label} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{label} is not JSON: {error.msg} at column {error.colno}") from None
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{label} has no "messages": a line is {{"messages": [{{"role": ..., "content": ...}}, ...]}}')
    for turn, message in enumerate(messages, start=1):
        _check_message(message, f"{label}, turn {turn}")
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(f"{label} has no assistant turn: there is nothing to learn")
    starts = record.get("starts")
    if starts is None:
        return split_conversations(messages)
    whole = isinstance(starts, list) and all(type(start) is int for start in starts)
    if not whole or starts[:1] != [0] or starts != sorted(set(starts)) or starts[-1] >= len(messages):
        raise ValueError(
            f'{label}: "starts" is {json.dumps(starts):.60}; it must be [0, ...], ascending numbers of first messages '
            f"below {len(messages)}"
        )
    return [messages[start:stop] for start, stop in pairwise([*starts, len(messages)])]


def _check_message(message: object, where: str) -> None:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise ValueError(f"{where}: the role is {role!r}; known roles are {', '.join(ROLES)}")
    if not isinstance(message.get("content") or "", str):
        raise ValueError(f"{where}: the content is no text")
    if has_half_pair(message.get("content") or ""):
        raise ValueError(f"{where}: the content holds half of a surrogate pair, which is no character")
    if role == "assistant" and not (message.get("content") or message.get("tool_calls")):
        raise ValueError(f"{where}: the assistant's turn is empty")


class ConversationFile:
    """A JSONL file of conversations, read a line at a time: it keeps 8 bytes a line in memory. Blank lines are left
    out.

    Raises:
        ValueError: the file is missing or holds nothing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"--data-path {path}: no such file; --sft reads JSONL files of conversations")
        starts, numbers, place = array("q"), array("q"), 0
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    starts.append(place)
                    numbers.append(number)
                place += len(raw)
        if not starts:
            raise ValueError(f"--data-path {path}: the file is empty; --sft reads JSONL files of conversations")
        self._starts = np.frombuffer(starts, dtype=np.int64)
        # Only a file with blank lines needs their numbers.
        self._numbers = None if numbers[-1] == len(numbers) else np.frombuffer(numbers, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def label(self, index: int) -> str:
        """`file:line` of a conversation, for messages."""
        return f"{self.path}:{index + 1 if self._numbers is None else self._numbers[index]}"

    def __getitem__(self, index: int) -> list[list[dict]]:
        """The conversations of a line.

        Raises:
            ValueError: as `parse_conversations`.
        """
        # Opened each time: dataset workers are forked and must not share a file's place.
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            return parse_conversations(file.readline(), self.label(index))


def check_conversations(path: str | Path) -> None:
    """Read every line of a file once.

    Raises:
        ValueError: the first line that is no conversation.
    """
    path = ConversationFile(path).path
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                parse_conversations(raw, f"{path}:{number}")


class ChatEncoder:
    """Conversations as tokens, by a Hugging Face tokenizer's chat template.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"--sft: the tokenizer {tokenizer.name_or_path} has no chat template, which says how a conversation "
                "becomes text; use the tokenizer of an instruction-tuned model, or --chat-template"
            )
        self.tokenizer = tokenizer
        self.marked = tokenizer.is_fast and bool(_MARKS.search(tokenizer.get_chat_template()))
        added = tokenizer.added_tokens_decoder
        self.special = {token for token in added if added[token].special} | set(tokenizer.all_special_ids)

    def encode_line(
        self, conversations: Sequence[Sequence[dict]], label: str
    ) -> tuple[list[int], list[int], list[int]]:
        """`encode` of a line's conversations, behind one another, and for each token the number of its conversation."""
        ids, mask, owner = [], [], []
        for number, conversation in enumerate(conversations):
            tokens, kept = self.encode(conversation, label)
            ids, mask, owner = ids + tokens, mask + kept, owner + [number] * len(tokens)
        return ids, mask, owner

    def encode(self, messages: Sequence[dict], label: str) -> tuple[list[int], list[int]]:
        """Token ids of a conversation, and a mask of the same length: 1 for tokens that the assistant must produce.

        Raises:
            ValueError: the template refuses the conversation, or does not let an assistant turn be found; behind
                `label`, naming the turn.
        """
        try:
            ids, mask = self._by_marks(messages) if self.marked else self._by_parts(messages, label)
        except TemplateError as refused:
            raise ValueError(f"{label}: the chat template refuses the conversation: {refused}") from refused
        if not any(mask) and any(message["role"] == "assistant" for message in messages):
            raise ValueError(f"{label}: the chat template leaves no token to the assistant's turns")
        return ids, mask

    def _by_marks(self, messages: Sequence[dict]) -> tuple[list[int], list[int]]:
        encoded = self.tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(encoded["input_ids"]), list(encoded["assistant_masks"])

    def _by_parts(self, messages: Sequence[dict], label: str) -> tuple[list[int], list[int]]:
        whole = self._text(messages)
        ids = self._ids(whole)
        mask = [0] * len(ids)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            refusal = (
                f"{label}, turn {turn + 1}: the chat template does not continue its own prompt for this assistant "
                "turn, so the turn's tokens are not known; put {% generation %} marks into the template"
            )
            prompt, shown = self._text(messages[:turn], prompt=True), self._text(messages[: turn + 1])
            if not whole.startswith(prompt) or not shown.startswith(prompt):
                raise ValueError(refusal)
            start = _common_prefix(self._ids(prompt), ids)
            if whole.startswith(shown):
                stop = _common_prefix(self._ids(shown), ids)
                stop = self._without_space(ids, start, stop)
            else:
                stop = self._closing(ids, start, self._ids(shown)[start:])
            if stop is None or stop <= start:
                raise ValueError(refusal)
            mask[start:stop] = [1] * (stop - start)
        return ids, mask

    def _closing(self, ids: list[int], start: int, shown: list[int]) -> int | None:
        """End of a turn that the template writes otherwise when more follows, as Qwen3 leaves earlier thoughts out.

        It ends at its end-of-turn token, which closes the turn where it stands last, `shown`: as many of them on as
        there.
        """
        last = self._without_space(shown, 0, len(shown)) - 1
        if last < 0 or shown[last] not in self.special:
            return None
        places = [place for place in range(start, len(ids)) if ids[place] == shown[last]]
        count = shown.count(shown[last])
        return places[count - 1] + 1 if len(places) >= count else None

    def _without_space(self, ids: list[int], start: int, stop: int) -> int:
        """`stop` moved before the white space behind a special token; the same where no special token stands there."""
        place = stop
        while (
            place > start and ids[place - 1] not in self.special and not self.tokenizer.decode(ids[place - 1]).strip()
        ):
            place -= 1
        return place if place > start and ids[place - 1] in self.special else stop

    def _text(self, messages: Sequence[dict], prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def split_conversations(messages: Sequence[dict]) -> list[list[dict]]:
    """Conversations packed in one line without "starts": each system message begins a new one."""
    first = [turn for turn, message in enumerate(messages) if turn and message["role"] == "system"]
    return [list(messages[start:stop]) for start, stop in pairwise([0, *first, len(messages)])]


def _common_prefix(part: Sequence[int], whole: Sequence[int]) -> int:
    """Length of the longest common prefix: shorter than `part` where its last tokens merge with what follows."""
    count = 0
    for one, other in zip(part, whole, strict=False):
        if one != other:
            break
        count += 1
    return count
