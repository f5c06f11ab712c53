"""tools/preprocess_data.py, read back with Megatron's own reader; a byte-level tokenizer is the oracle for tokens."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, pre_tokenizers

from megatron_rpsd.data.manifest import read_manifest
from megatron_rpsd.data.preprocess import PreprocessConfig, preprocess
from tests.unit.data.tools import called, typed

EOD = 256
TEXTS = ["alpha beta", "  \n", "été\n" * 3, "x"]


def oracle(text: str, eod: bool = True) -> list[int]:
    """The tokens of `text`: its UTF-8 bytes, each at its place in the sorted printable alphabet of byte-level BPE.

    That alphabet keeps the printable Latin-1 bytes and moves the rest, in order, to 256 and on.
    """
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    ids = {byte: rank for rank, byte in enumerate(kept + moved)}
    return [ids[byte] for byte in text.encode()] + ([EOD] if eod else [])


def stored(prefix: Path) -> list[list[int]]:
    """Documents in `prefix`, by Megatron's document index; each must be one sequence."""
    dataset = IndexedDataset(str(prefix))
    bounds = dataset.document_indices
    assert np.array_equal(bounds, np.arange(len(dataset) + 1))
    return [dataset[i].tolist() for i in range(len(dataset))]


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """TEXTS as two text files and a JSONL file, in order."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text(TEXTS[0])
    (folder / "b.md").write_text(TEXTS[1])
    (folder / "c.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS[2:]))
    return sorted(folder.iterdir())


def config(inputs: list[Path], tokenizer: Path, prefix: Path, **changes) -> PreprocessConfig:
    return PreprocessConfig(inputs, tokenizer, prefix, **{"seq_length": 4, "json_key": "body", **changes})


def test_the_oracle_is_the_tokenizer(tokenizer_folder: Path) -> None:
    assert len(pre_tokenizers.ByteLevel.alphabet()) == 256
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer.encode(text).ids == oracle(text, eod=False)


def test_cli_writes_what_megatron_reads(tmp_path: Path, tokenizer_folder: Path, inputs: list[Path]) -> None:
    prefix = tmp_path / "new" / "v1.5"
    flags = ("--seq-length", 4, "--json-key", "body")
    result = typed(
        "preprocess_data.py", "--input", *inputs, "--tokenizer", tokenizer_folder, "--output-prefix", prefix, *flags
    )
    assert (result.returncode, result.stderr) == (0, "")
    expected = [oracle(text) for text in TEXTS if text.strip()]
    tokens = sum(map(len, expected))
    assert stored(prefix) == expected
    assert f"3 documents (1 empty ones left out), {tokens} tokens, {(tokens - 1) // 4} samples" in result.stdout
    assert {path.name for path in prefix.parent.iterdir()} == {
        f"v1.5{suffix}" for suffix in (".bin", ".idx", ".sources", ".skipped.jsonl", ".json", ".lengths.png")
    }
    assert {path.name for path in tmp_path.iterdir()} == {"in", "new"}

    manifest = read_manifest(prefix)
    assert manifest.tokenizer_sha256 == hashlib.sha256((tokenizer_folder / "tokenizer.json").read_bytes()).hexdigest()
    assert (manifest.vocab_size, manifest.max_token_id, manifest.eod_id) == (257, EOD, EOD)
    assert (manifest.documents, manifest.empty_documents, manifest.tokens) == (3, 1, tokens)
    assert (manifest.seq_length, manifest.windows, manifest.dtype) == (4, (tokens - 1) // 4, "uint16")
    for record, path in zip(manifest.inputs, inputs, strict=True):
        assert record.path == str(path)
        assert (record.size, record.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


def test_without_eod(tmp_path: Path, endless_tokenizer_folder: Path, inputs: list[Path]) -> None:
    manifest = preprocess(config(inputs, endless_tokenizer_folder, tmp_path / "p", append_eod=False))
    expected = [oracle(text, eod=False) for text in TEXTS if text.strip()]
    assert stored(tmp_path / "p") == expected
    assert manifest.eod_id is None
    assert manifest.max_token_id == max(max(ids) for ids in expected)
    with pytest.raises(ValueError, match="--no-append-eod"):
        preprocess(config(inputs, endless_tokenizer_folder, tmp_path / "q"))


def test_workers_change_nothing(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of one tokenizer; tests/integration/test_data_interruption.py has processes."""
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"body": f"{i} " * (i % 50)}) + "\n" for i in range(200)))
    monkeypatch.setattr("megatron_rpsd.data.tokenization.BATCH_BYTES", 500)  # several are under way at once
    preprocess(config([path], tokenizer_folder, tmp_path / "one", seq_length=8))
    for workers in (2, 3):
        preprocess(config([path], tokenizer_folder, tmp_path / "more", seq_length=8, workers=workers))
        for suffix in (".bin", ".idx", ".sources", ".json"):
            assert Path(f"{tmp_path / 'more'}{suffix}").read_bytes() == Path(f"{tmp_path / 'one'}{suffix}").read_bytes()


def test_a_second_run_replaces_the_first(tmp_path: Path, tokenizer_folder: Path, inputs: list[Path]) -> None:
    preprocess(config(inputs, tokenizer_folder, tmp_path / "p"))
    preprocess(config(inputs[:1], tokenizer_folder, tmp_path / "p"))
    assert stored(tmp_path / "p") == [oracle(TEXTS[0])]
    assert read_manifest(tmp_path / "p").documents == 1


def test_an_interrupted_run_leaves_the_older_data_whole(
    tmp_path: Path, tokenizer_folder: Path, inputs: list[Path]
) -> None:
    preprocess(config(inputs, tokenizer_folder, tmp_path / "p"))
    before = {path: path.read_bytes() for path in tmp_path.glob("p.*")}
    with pytest.raises(ValueError, match=r"c\.jsonl:1 has no key 'absent'"):
        preprocess(config(inputs, tokenizer_folder, tmp_path / "p", json_key="absent"))
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_cli_refuses_in_one_line_and_leaves_nothing(
    tmp_path: Path, tokenizer_folder: Path, inputs: list[Path], capsys: pytest.CaptureFixture
) -> None:
    """Too few tokens shows only after all is written aside, past every import that likes to remark on stderr."""
    needed = sum(len(oracle(text)) for text in TEXTS if text.strip())
    common = ("--output-prefix", tmp_path / "out" / "p", "--tokenizer", tokenizer_folder, "--json-key", "body")
    missing = tmp_path / "absent.txt"
    bad = tmp_path / "in" / "bad.jsonl"
    bad.write_text('{"body": "fine"}\n{"body": \n')
    short = f"--seq-length {needed} needs {needed} + 1 = {needed + 1} tokens"
    cases = {
        short: (
            *common,
            "--seq-length",
            needed,
            "--input",
            *inputs,
        ),
        f"{bad}:2 is not JSON": (*common, "--seq-length", 4, "--input", bad),
        f"--input {missing} does not exist": (*common, "--seq-length", 4, "--input", missing),
        f"--tokenizer {missing} is not a folder": (*common, "--seq-length", 4, "--input", bad, "--tokenizer", missing),
    }
    for words, arguments in cases.items():
        result = (
            typed("preprocess_data.py", *arguments)
            if words == short
            else called(capsys, "preprocess_data.py", *arguments)
        )
        assert result.returncode == 2, result.stderr
        assert len(result.stderr.splitlines()) == 1 and words in result.stderr, result.stderr
        assert result.stdout == ""
        assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_exactly_enough_tokens_are_one_window(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcd")
    assert preprocess(config([path], tokenizer_folder, tmp_path / "p", seq_length=4)).windows == 1
    with pytest.raises(ValueError, match="5 \\+ 1 = 6 tokens"):
        preprocess(config([path], tokenizer_folder, tmp_path / "q", seq_length=5))


def test_settings_are_checked(tmp_path: Path, tokenizer_folder: Path, inputs: list[Path]) -> None:
    for words, changes in {
        "--seq-length 0": {"seq_length": 0},
        "--workers 0": {"workers": 0},
        "is a folder": {"inputs": [tmp_path]},
        "names no file": {"inputs": []},
        "holds no tokenizer.json": {"tokenizer": tmp_path},
    }.items():
        arguments = {"inputs": inputs, "tokenizer": tokenizer_folder, "prefix": tmp_path / "p", **changes}
        with pytest.raises(ValueError, match=words):
            preprocess(config(**arguments))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"--tokenizer .*broken cannot be loaded") as error:
        preprocess(config(inputs, broken, tmp_path / "p"))
    assert "\n" not in str(error.value)
