"""Conversations to tokens and masks, against masks written by hand; every line that is refused."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from megatron_rpsd.data.chat import (
    ChatEncoder,
    ConversationFile,
    check_conversations,
    parse_conversations,
    split_conversations,
)
from tests.chat_tokenizer import (
    BROKEN,
    MARKED,
    PLAIN,
    REFUSING,
    THINKING,
    assistant,
    save_chat_tokenizer,
    system,
    user,
    write_chats,
)


@pytest.fixture
def encoder(tmp_path):
    def of(template: str | None) -> ChatEncoder:
        return ChatEncoder(AutoTokenizer.from_pretrained(save_chat_tokenizer(tmp_path / "tokenizer", template)))

    return of


def spans(encoder: ChatEncoder, messages: list[dict]) -> str:
    """The text as tokens, those that the assistant must produce in [brackets]."""
    ids, mask = encoder.encode(messages, "chats.jsonl:1")
    assert len(ids) == len(mask) and set(mask) <= {0, 1}
    text, inside = "", 0
    for token, kept in zip(ids, mask, strict=True):
        text += "]" * (inside > kept) + "[" * (kept > inside) + encoder.tokenizer.decode(token)
        inside = kept
    return text + "]" * inside


TWO_TURNS = [system("be kind"), user("hi"), assistant("hello"), user("2+2?"), assistant("4 \n")]
TWO_TURNS_TEXT = (
    "<s>system\nbe kind<e>\n<s>user\nhi<e>\n<s>assistant\n[hello<e>]\n<s>user\n2+2?<e>\n<s>assistant\n[4 \n<e>]\n"
)


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["parts", "marks"])
def test_the_assistants_words_and_its_end_of_turn_are_kept(template, encoder):
    chosen = encoder(template)
    assert chosen.marked == (template is MARKED)
    assert spans(chosen, TWO_TURNS) == TWO_TURNS_TEXT
    # Two answers in a row, and an answer that quotes an end of turn.
    text = spans(chosen, [user("a"), assistant("b"), assistant("c<e>d")])
    assert text == "<s>user\na<e>\n<s>assistant\n[b<e>]\n<s>assistant\n[c<e>d<e>]\n"


def test_marks_decide_where_there_are_any(encoder):
    without_end = MARKED.replace("{% endgeneration %}", "").replace(
        "{{ m.content + '<e>' }}{% else %}", "{{ m.content }}{% endgeneration %}{{ '<e>' }}{% else %}"
    )
    assert spans(encoder(without_end), [user("a"), assistant("b")]) == "<s>user\na<e>\n<s>assistant\n[b]<e>\n"


def test_a_template_that_shows_the_last_turn_otherwise(encoder):
    text = spans(encoder(THINKING), [user("a"), assistant("b"), user("c"), assistant("d")])
    assert text == "<s>user\na<e>\n<s>assistant\n[b<e>]\n<s>user\nc<e>\n<s>assistant\n[T\nd<e>]\n"
    text = spans(encoder(THINKING), [user("a"), assistant("b<e>x"), user("c")])
    assert text == "<s>user\na<e>\n<s>assistant\n[b<e>x<e>]\n<s>user\nc<e>\n"


def test_a_template_without_an_end_of_turn_keeps_all_that_follows_the_prompt(encoder):
    bare = PLAIN.replace(" + '<e>'", "")
    assert spans(encoder(bare), [user("a"), assistant("b")]) == "<s>user\na\n<s>assistant\n[b\n]"


def test_a_line_of_packed_conversations(encoder):
    chosen, packed = encoder(PLAIN), [system("x"), user("a"), assistant("b"), system("y"), user("c"), assistant("d")]
    assert split_conversations(packed) == [packed[:3], packed[3:]]
    assert split_conversations(packed[1:3]) == [packed[1:3]]
    ids, mask, owner = chosen.encode_line(parse_conversations(line_of(packed), "f:1"), "f:1")
    parts = [chosen.encode(part, "f:1") for part in (packed[:3], packed[3:])]
    assert ids == parts[0][0] + parts[1][0] and mask == parts[0][1] + parts[1][1]
    assert owner == [0] * len(parts[0][0]) + [1] * len(parts[1][0])


def line_of(messages: list[dict], **more) -> bytes:
    return json.dumps({"messages": messages, **more}).encode()


def test_starts_tell_conversations_apart_with_or_without_system_messages():
    packed = [user("a"), assistant("b"), system("x"), user("c"), assistant("d"), user("e"), assistant("f")]
    assert parse_conversations(line_of(packed), "f:1") == [packed[:2], packed[2:]]
    assert parse_conversations(line_of(packed, starts=[0, 5]), "f:1") == [packed[:5], packed[5:]]
    assert parse_conversations(line_of(packed, starts=[0]), "f:1") == [packed]
    for starts in ([], [1], [0, 7], [0, 3, 2], [0, 2, 2], [0, True], [0, 2.0], "0", {}):
        with pytest.raises(ValueError, match=r'f:1: "starts" is .*; it must be \[0, ...\], ascending .* below 7'):
            parse_conversations(line_of(packed, starts=starts), "f:1")


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (BROKEN, [user("a"), assistant("b")], r"f:3, turn 2: the chat template does not continue its own prompt"),
        (REFUSING, [system("a"), assistant("b")], r"f:3: the chat template refuses .*no system turn here"),
        (MARKED.replace("'assistant'", "'model'"), [user("a"), assistant("b")], r"f:3: the chat template leaves no"),
        (THINKING.replace(" + '<e>'", ""), [user("a"), assistant("b"), user("c")], r"f:3, turn 2: "),
    ],
)
def test_a_template_that_hides_the_turns_is_refused(template, messages, message, encoder):
    with pytest.raises(ValueError, match=message) as refused:
        encoder(template).encode(messages, "f:3")
    assert "\n" not in str(refused.value)


def test_a_tokenizer_without_a_template_is_refused(encoder):
    with pytest.raises(ValueError, match="--sft: the tokenizer .* has no chat template"):
        encoder(None)


REFUSED = {
    "json": (b'{"messages": [', "is not JSON: .* at column"),
    "utf8": (b'{"messages": "\xff"}', "is not UTF-8 text: .* byte 14"),
    "text": (b'{"text": "a"}', 'has no "messages"'),
    "list": (b"[1]", 'has no "messages"'),
    "none": (b'{"messages": []}', 'has no "messages"'),
    "role": ([user("a"), {"role": "model", "content": "b"}], "turn 2: the role is 'model'; known roles are system"),
    "no_role": ([user("a"), "b"], "turn 2: the role is None"),
    "content": ([{"role": "user", "content": [1]}, assistant("b")], "turn 1: the content is no text"),
    "empty": ([user("a"), assistant("b"), user("c"), assistant("")], "turn 4: the assistant's turn is empty"),
    "null": ([user("a"), {"role": "assistant", "content": None}], "turn 2: the assistant's turn is empty"),
    "half": ([user("a"), assistant("\ud83d")], "turn 2: the content holds half of a surrogate pair"),
    "nothing": ([system("a"), user("b")], "has no assistant turn"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_line_that_is_no_conversation_is_refused_by_file_and_line(case, tmp_path):
    bad, message = REFUSED[case]
    raw = bad if isinstance(bad, bytes) else json.dumps({"messages": bad}).encode()
    good = json.dumps({"messages": [user("a"), assistant("b")]}).encode()
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\n".join([good, b"", raw, good]))
    with pytest.raises(ValueError, match=message) as refused:
        check_conversations(path)
    assert str(refused.value).startswith(f"{path}:3") and "\n" not in str(refused.value)
    assert parse_conversations(good, "f:1") == [[user("a"), assistant("b")]]


def test_a_file_is_read_by_line(tmp_path):
    lines = [[user(f"ä{number}"), assistant("b" * number)] for number in range(1, 6)]
    file = ConversationFile(write_chats(tmp_path / "chats.jsonl", lines))
    assert len(file) == 5 and file.label(4).endswith(":5")
    assert [file[index] for index in (4, 0, 2)] == [[lines[4]], [lines[0]], [lines[2]]]
    assert not any(isinstance(value, list) for value in vars(file).values())  # offsets alone stay in memory


def test_a_missing_or_empty_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--data-path .*none.jsonl: no such file"):
        check_conversations(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match="--data-path .*empty.jsonl: the file is empty"):
        check_conversations(tmp_path / "empty.jsonl")
