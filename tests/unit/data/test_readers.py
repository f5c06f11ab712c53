"""Kinds of input, tokenizers, and what is said of bad ones."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tiny_tiktoken import PATTERN, ids_of, save_tiktoken  # noqa: E402

from megatron_rpsd.data.documents import document_text  # noqa: E402
from megatron_rpsd.data.encoders import build_encoder, read_tokenizer  # noqa: E402
from megatron_rpsd.data.encoding import DocumentEncoder  # noqa: E402
from megatron_rpsd.data.preprocess import PreprocessConfig, preprocess  # noqa: E402
from megatron_rpsd.data.readers import iter_documents, read_document, repository_parts  # noqa: E402

TEXTS = ["first é", "se\ncond", "third"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def texts_of(path: Path) -> list[str]:
    digest = hashlib.sha256()
    found = [document_text(document, "text") for document in iter_documents(path, digest)]
    if path.is_file():
        assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def test_compressed_lines_and_texts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES[:20]) + gzip.compress(LINES[20:]))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"one\n\ntext"))
    assert texts_of(tmp_path / "a.jsonl.gz") == TEXTS
    assert texts_of(tmp_path / "b.txt.gz") == ["one\n\ntext"]
    zstandard = pytest.importorskip("zstandard")
    frames = zstandard.ZstdCompressor().compress(LINES[:20]) + zstandard.ZstdCompressor().compress(LINES[20:])
    (tmp_path / "c.jsonl.zst").write_bytes(frames)
    assert texts_of(tmp_path / "c.jsonl.zst") == TEXTS


def test_a_document_is_read_again_by_its_place(tmp_path: Path) -> None:
    for name, raw in (("a.jsonl", LINES), ("a.jsonl.gz", gzip.compress(LINES))):
        (tmp_path / name).write_bytes(raw)
        for document in iter_documents(tmp_path / name, hashlib.sha256()):
            again = read_document(tmp_path / name, document.line, document.offset, "text", 0)
            assert again.raw == document.raw == LINES[document.offset :].splitlines(keepends=True)[0]
    with pytest.raises(ValueError, match="has no document 9"):
        read_document(tmp_path / "a.jsonl.gz", 9, 0, "text", 0)


def test_parquet_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [*TEXTS, None], "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == [*TEXTS, ""]
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'body' \(--json-key\), only \['text', 'n'\]"):
        list(iter_documents(tmp_path / "a.parquet", hashlib.sha256(), "body"))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(ValueError, match=r"b\.parquet is no readable parquet file"):
        texts_of(tmp_path / "b.parquet")


@pytest.mark.parametrize(("name", "package"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch, name: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=f"needs the package {package}: pip install {package}"):
        texts_of(tmp_path / name)


def test_a_repository_is_joined_in_an_order_of_its_own(tmp_path: Path) -> None:
    names = [f"pkg/m{number}.py" for number in range(9)]
    (tmp_path / "pkg" / ".git").mkdir(parents=True)
    for name in names:
        (tmp_path / name).write_text(f"# {name} é\n")
    (tmp_path / "pkg" / ".git" / "config").write_text("hidden")
    (tmp_path / "pkg" / "picture").write_bytes(b"\0\1")
    (tmp_path / "pkg" / "latin").write_bytes(b"\xe9t\xe9")
    (tmp_path / "pkg" / "empty.py").write_text("\n")
    orders = []
    for seed in (1, 1, 2):
        (text,) = [document_text(d, "text") for d in iter_documents(tmp_path, hashlib.sha256(), seed=seed)]
        parts = list(repository_parts(tmp_path, seed))
        orders.append([part.path.relative_to(tmp_path).as_posix() for part in parts])
        assert text == "".join(f"File: {name}\n\n# {name} é\n\n\n" for name in orders[-1])
    assert sorted(orders[0]) == names and orders[0] == orders[1] != orders[2] and orders[0] != names


def test_tiktoken_file(tmp_path: Path) -> None:
    path = save_tiktoken(tmp_path / "bytes.tiktoken")
    with pytest.raises(ValueError, match="--tiktoken-pattern"):
        read_tokenizer(path)
    with pytest.raises(ValueError, match=r"--tiktoken-pattern \(: "):
        read_tokenizer(path, "(")
    spec = read_tokenizer(path, PATTERN)
    assert (spec.eod_id, spec.vocab_size, spec.dtype) == (256, 257, "uint16")
    encoder = build_encoder(spec)
    text = "aé €b"
    assert [*encoder.encode_batch([text])[0], 256] == ids_of(text)
    ids, spans = encoder.spans(text)
    assert [text[start:stop] for start, stop in spans] == ["a", "é", "é", " ", "€", "€", "€", "b"]
    assert encoder.decode(ids) == text
    path.write_text("no base64 at all\n")
    with pytest.raises(ValueError, match="cannot be loaded: lines of base64"):
        read_tokenizer(path, PATTERN)


def test_tiktoken_by_name_reads_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken.load
    from tiktoken import registry

    def no_network(path: str) -> bytes:
        raise OSError("no network")

    monkeypatch.setattr(tiktoken.load, "read_file", no_network)
    monkeypatch.setattr(registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="no network; without a network put its file .* TIKTOKEN_CACHE_DIR"):
        read_tokenizer("tiktoken:r50k_base")
    with pytest.raises(ValueError, match="tiktoken:none cannot be loaded"):
        read_tokenizer("tiktoken:none")


def test_sentencepiece_model(tmp_path: Path) -> None:
    import sentencepiece

    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=30, minloglevel=2
    )
    spec = read_tokenizer(tmp_path / "m.model")
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    assert (spec.eod_id, spec.vocab_size) == (model.eos_id(), 30)
    encoder, text = build_encoder(spec), "the lazy fox"
    assert list(encoder.encode_batch([text])[0]) == model.encode(text) == encoder.spans(text)[0]
    assert encoder.decode(model.encode(text)) == text
    (tmp_path / "bad.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"bad\.model cannot be loaded"):
        read_tokenizer(tmp_path / "bad.model")


def faulty_inputs(folder: Path) -> tuple[list[Path], list[str]]:
    """Inputs with every kind of fault among good documents, and the faults' beginnings."""
    damaged = gzip.compress(LINES * 200)
    files = {
        "a.jsonl": b'{"text": "good"}\n{"text": \n\n{"text": "\xff"}\n{"text": "good again"}\n',
        "b.txt": "größe".encode("latin-1"),
        "c.jsonl.gz": damaged[: len(damaged) // 2],
        "d.txt": b" \n",
        "e.txt": b"the last good one",
    }
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    expected = ["a.jsonl:2 is not JSON", "a.jsonl:4 is not UTF-8", "b.txt is not UTF-8", "c.jsonl.gz is damaged behind"]
    return [folder / name for name in files], expected


def test_faults_stop_or_are_skipped_and_counted(tmp_path: Path) -> None:
    inputs, expected = faulty_inputs(tmp_path)
    tokenizer = save_tiktoken(tmp_path / "bytes.tiktoken")
    prefix = tmp_path / "out" / "p"

    def config(**changes) -> PreprocessConfig:
        return PreprocessConfig(inputs, tokenizer, prefix, 4, tiktoken_pattern=PATTERN, **changes)

    with pytest.raises(ValueError, match=r"a\.jsonl:2 is not JSON"):
        preprocess(config())
    assert not prefix.parent.exists()
    manifest = preprocess(config(on_error="skip"))
    listed = [json.loads(line) for line in Path(f"{prefix}.skipped.jsonl").read_text().splitlines()]
    skipped = [entry["skipped"] for entry in listed if "skipped" in entry]
    assert [line.removeprefix(f"{tmp_path}/")[: len(e)] for line, e in zip(skipped, expected, strict=True)] == expected
    empty = [entry["empty"].removeprefix(f"{tmp_path}/") for entry in listed if "empty" in entry]
    assert empty == ["a.jsonl:3", "d.txt"] and (manifest.skipped, manifest.empty_documents) == (4, 2)
    from_gzip = int(skipped[-1].split("behind line ")[1].split(":")[0])
    assert from_gzip > 0 and manifest.documents == 3 + from_gzip
    assert len(manifest.inputs) == len(inputs)


def test_a_document_longer_than_an_index_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_rpsd.data.encoding.LONGEST", 8)
    spec = read_tokenizer(save_tiktoken(tmp_path / "bytes.tiktoken"), PATTERN)
    (tmp_path / "a.jsonl").write_bytes(LINES)
    batch = DocumentEncoder(spec, True, "text")(list(iter_documents(tmp_path / "a.jsonl", hashlib.sha256())))
    assert batch.lengths.tolist() == [-2, 8, 6] and "a.jsonl:1 has 9 tokens" in batch.faults[0]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.jsonl").write_bytes(LINES * 50)
    tokenizer = save_tiktoken(tmp_path / "bytes.tiktoken")
    config = PreprocessConfig(
        [tmp_path / "a.jsonl"], tokenizer, tmp_path / "p", 4, tiktoken_pattern=PATTERN, shard_tokens=100
    )
    monkeypatch.setattr("megatron_rpsd.data.tokenization.BATCH_BYTES", 200)
    with monkeypatch.context() as patch:
        patch.setattr("megatron_rpsd.data.indexed._HashedOutput.write", full)
        with pytest.raises(ValueError, match="the disk is full; free some space and run again"):
            preprocess(config)
    said: list[str] = []
    preprocess(config, said.append)
    assert "finished shards of an earlier run: 150 documents" in said[0]
    assert not (tmp_path / ".p.partial").exists()
