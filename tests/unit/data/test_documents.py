"""Documents in files, the standard library as text, and the split by path."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from megatron_rpsd.data.documents import (
    Document,
    document_text,
    python_sources,
    split_documents,
    standard_library,
)
from megatron_rpsd.data.readers import iter_documents


def read(path: Path, key: str = "text") -> list[str]:
    return [document_text(document, key) for document in iter_documents(path, hashlib.sha256())]


def test_a_file_is_one_document_and_jsonl_one_a_line(tmp_path: Path) -> None:
    text = tmp_path / "a.py"
    text.write_text("one\n\ntwo é\n")
    lines = tmp_path / "b.jsonl"
    lines.write_text('{"text": "first", "id": 1}\n\n{"text": "se\\ncond é"}')
    assert read(text) == ["one\n\ntwo é\n"]
    assert read(lines) == ["first", "", "se\ncond é"]
    for path in (text, lines):
        digest = hashlib.sha256()
        size = sum(len(document.raw) for document in iter_documents(path, digest))
        assert (size, digest.hexdigest()) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"{not json}", "is not JSON"),
        (b'["text"]', "not a JSON object but a list"),
        (b'{"body": "x"}', "has no key 'text'"),
        (b'{"text": 3}', "holds no string: 3"),
        (b'{"text": "\xff"}', "is not UTF-8 text: invalid start byte at byte 10"),
        (b'{"text": "a\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(raw: bytes, words: str) -> None:
    with pytest.raises(ValueError) as error:
        document_text(Document(Path("in.jsonl"), 7, raw, is_json=True), "text")
    assert str(error.value).startswith("in.jsonl:7 ") or str(error.value).startswith("in.jsonl:7:")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_python_sources_are_long_readable_text() -> None:
    sources = python_sources()
    names = [path.relative_to(standard_library()).as_posix() for path in sources]
    assert names == sorted(set(names))
    assert {"argparse.py", "asyncio/base_events.py", "json/decoder.py"} <= set(names)
    unwanted = ("site-packages/", "test/", "idlelib/", "lib2to3/", "encodings/", "_sysconfigdata")
    assert not [name for name in names if name.startswith(unwanted) or "/tests/" in name or "/test/" in name]
    assert sum(len(path.read_bytes().decode("utf-8")) for path in sources) > 3_000_000


def test_split_is_disjoint_complete_and_independent_of_the_list_and_the_root(tmp_path: Path) -> None:
    names = [f"pkg{i % 7}/m{i}.py" for i in range(400)]
    train, held_out = split_documents([tmp_path / name for name in names], 0.1, tmp_path)
    assert set(train).isdisjoint(held_out)
    assert set(train) | set(held_out) == {tmp_path / name for name in names}
    assert 20 <= len(held_out) <= 65  # binomial(400, 0.1): mean 40, four standard deviations of 6
    elsewhere = Path("/elsewhere")
    moved = split_documents([elsewhere / name for name in reversed(names)], 0.1, elsewhere)
    assert [path.relative_to(elsewhere) for path in moved[1]] == [p.relative_to(tmp_path) for p in reversed(held_out)]
    wider = split_documents([tmp_path / name for name in names], 0.3, tmp_path)
    assert set(held_out) < set(wider[1])


def test_split_rule_is_fixed_for_all_time() -> None:
    """sha256sum: "json/decoder.py" 3b2e3cb3..., "argparse.py" c93fa572...: 0.231174 and 0.786127 of the range."""
    decoder, argparse = standard_library() / "json/decoder.py", standard_library() / "argparse.py"
    for fraction in (0.2312, 0.5, 0.7861):
        assert split_documents([argparse, decoder], fraction) == ([argparse], [decoder])
    for fraction in (0.2311, 0.7862):
        with pytest.raises(ValueError, match="leaves"):
            split_documents([argparse, decoder], fraction)


def test_split_refusals(tmp_path: Path) -> None:
    for fraction in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            split_documents([tmp_path / "a"], fraction, tmp_path)
    with pytest.raises(ValueError, match="does not lie under"):
        split_documents([Path("/other/a.py")], 0.5, tmp_path)
    with pytest.raises(ValueError, match="leaves 1 to train on and 0 held out|leaves 0 to train on and 1 held out"):
        split_documents([tmp_path / "a"], 0.5, tmp_path)
