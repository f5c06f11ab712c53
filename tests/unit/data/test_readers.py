"""Kinds of input, tokenizers, and what is said of bad ones."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import pkgutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tiny_tiktoken import PATTERN, ids_of, save_tiktoken  # noqa: E402

from megatron_rpsd.data.documents import document_text  # noqa: E402
from megatron_rpsd.data.encoders import build_encoder, read_tokenizer  # noqa: E402
from megatron_rpsd.data.encoding import DocumentEncoder  # noqa: E402
from megatron_rpsd.data.preprocess import PreprocessConfig, describe, preprocess  # noqa: E402
from megatron_rpsd.data.readers import iter_documents, read_document, repository_parts  # noqa: E402
from tests.unit.data.hard_death import contents  # noqa: E402

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


def save_slow(folder: Path) -> Path:
    """A tokenizer in Python: bytes + 3, and </s> behind them."""
    from transformers import ByT5Tokenizer

    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize("kind", ["fast", "slow", "sentencepiece", "tiktoken"])
def test_special_tokens_in_a_text_are_text(tmp_path: Path, tokenizer_folder: Path, kind: str) -> None:
    """A document that spells the end token, in its middle and at its end, has the token once: behind it."""
    import sentencepiece

    if kind == "sentencepiece":
        (tmp_path / "text").write_text("ab < / s >\n" * 20)
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), model_type="char", vocab_size=10,
            minloglevel=2,
        )  # fmt: skip
    tokenizer, mark = {
        "fast": lambda: (tokenizer_folder, "<|end|>"),
        "slow": lambda: (save_slow(tmp_path / "slow"), "</s>"),
        "sentencepiece": lambda: (tmp_path / "m.model", "</s>"),
        "tiktoken": lambda: (save_tiktoken(tmp_path / "b.tiktoken"), "<|endoftext|>"),
    }[kind]()
    spec = read_tokenizer(tokenizer, PATTERN)
    assert spec.eod_id in spec.special_ids
    text = f"a{mark} b{mark}"
    (tmp_path / "a.txt").write_text(text)
    batch = DocumentEncoder(spec, True, "text")(list(iter_documents(tmp_path / "a.txt", hashlib.sha256())))
    ids = batch.tokens.tolist()
    assert ids.count(spec.eod_id) == 1 and ids[-1] == spec.eod_id and batch.special == 0
    assert build_encoder(spec).decode(ids[:-1]) == text


def test_special_tokens_that_cannot_be_text_are_counted(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer class that parses them all the same."""
    from megatron_rpsd.data import encoders

    start = encoders._Fast.__init__

    def stubborn(self, spec) -> None:
        start(self, spec)
        self._tokenizer.encode_special_tokens = False

    monkeypatch.setattr(encoders._Fast, "__init__", stubborn)
    for name, text in (("a.txt", "one<|end|>two<|end|>"), ("b.txt", "three"), ("c.txt", "<|end|><|end|>x")):
        (tmp_path / name).write_text(text)
    inputs = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    manifest = preprocess(PreprocessConfig(inputs, tokenizer_folder, tmp_path / "p", 4, shard_tokens=1))
    assert manifest.special_tokens == 2 + 0 + 2  # the last one of a.txt stands in the end token's place
    assert "the texts spell 4 that this tokenizer does not read as text" in describe("p", manifest)


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


GOOD = ["first", "größe", "last"]
ONE_FAULT = {
    "broken line": ("x.jsonl", b'{"text": "ok"}\n{"text": "a\n{"text": "ok"}\n', "x.jsonl:2 is not JSON: "),
    "no object": ("x.jsonl", b'{"text": "ok"}\n{"text": "ok"}\n[1]\n', "x.jsonl:3 is not a JSON object but a list"),
    "no key": ("x.jsonl", b'{"text": "ok"}\n{"texts": "a"}\n{"text": "ok"}\n', "x.jsonl:2 has no key 'text'"),
    "no text": ("x.jsonl", b'{"text": 7}\n{"text": "ok"}\n{"text": "ok"}\n', "x.jsonl:1: 'text' (--json-key) holds no"),
    "half pair": ("x.jsonl", b'{"text": "\\ud83d"}\n{"text": "ok"}\n{"text": "ok"}\n', "x.jsonl:1: 'text' holds half"),
    "line's encoding": ("x.jsonl", b'{"text": "ok"}\n{"text": "gr\xf6"}\n{"text": "ok"}\n', "x.jsonl:2 is not UTF-8"),
    "file's encoding": ("x.txt", "größe".encode("utf-16"), "x.txt is not UTF-8 text: "),
    "too long": ("x.jsonl", b'{"text": "ok"}\n{"text": "123456789"}\n{"text": "ok"}\n', "x.jsonl:2 has 10 tokens; Meg"),
    "cut short": ("x.jsonl.gz", gzip.compress(b'{"text": "ok"}\n' * 2)[:-6], "x.jsonl.gz is damaged behind line 2: "),
}


@pytest.mark.parametrize("fault", ONE_FAULT)
def test_each_fault_stops_by_file_and_line_or_costs_itself_alone(tmp_path: Path, fault: str, monkeypatch) -> None:
    monkeypatch.setattr("megatron_rpsd.data.encoding.LONGEST", 9)
    name, raw, words = ONE_FAULT[fault]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in GOOD[:2])
    (tmp_path / "a.jsonl").write_text(lines + "\n")  # with an empty document
    (tmp_path / name).write_bytes(raw)
    (tmp_path / "z.txt").write_text(GOOD[2])
    inputs = [tmp_path / each for each in ("a.jsonl", name, "z.txt")]
    tokenizer, prefix = save_tiktoken(tmp_path / "bytes.tiktoken"), tmp_path / "out" / "p"

    def made(on_error: str):
        return preprocess(PreprocessConfig(inputs, tokenizer, prefix, 4, tiktoken_pattern=PATTERN, on_error=on_error))

    with pytest.raises(ValueError) as refused:
        made("stop")
    assert str(refused.value).startswith(f"{tmp_path}/{words}") and "\n" not in str(refused.value)
    assert not prefix.parent.exists()
    manifest = made("skip")
    kept = [*GOOD[:2], "ok", "ok", GOOD[2]] if name.startswith("x.jsonl") else GOOD
    assert np.fromfile(f"{prefix}.bin", manifest.dtype).tolist() == [token for text in kept for token in ids_of(text)]
    listed = [json.loads(line) for line in Path(f"{prefix}.skipped.jsonl").read_text().splitlines()]
    assert [set(entry) for entry in listed] == [{"skipped"}, {"empty"}] and listed[1]["empty"].endswith("a.jsonl:3")
    assert listed[0]["skipped"].startswith(f"{tmp_path}/{words}")
    assert (manifest.skipped, manifest.empty_documents, manifest.documents) == (1, 1, len(kept))


PLACES = {
    "shard": "shards.ShardWriter.add",
    "shard's record": "shards.ShardStore.finish",
    "output": "indexed._HashedOutput.write",
    "index": "indexed._write_index",
    "manifest": "preprocess.write_manifest",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_full_disk_is_one_line_and_costs_no_finished_shard(tmp_path: Path, place: str, monkeypatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES * 50)
    tokenizer = save_tiktoken(tmp_path / "bytes.tiktoken")
    monkeypatch.setattr("megatron_rpsd.data.tokenization.BATCH_BYTES", 200)

    def run(name: str, on_error: str = "stop", said: list | None = None) -> dict[str, bytes]:
        inputs, prefix = [tmp_path / "a.jsonl"], tmp_path / name
        config = PreprocessConfig(
            inputs, tokenizer, prefix, 4, tiktoken_pattern=PATTERN, shard_tokens=100, on_error=on_error
        )
        preprocess(config, (said if said is not None else []).append)
        return contents(prefix)

    expected = run("untouched")
    for on_error in ("stop", "skip"):
        module, _, name = PLACES[place].partition(".")
        target = f"megatron_rpsd.data.{module}.{name}"
        with monkeypatch.context() as patch:
            patch.setattr(target, full_behind(3 if "shard" in place else 0, pkgutil.resolve_name(target)))
            with pytest.raises(ValueError, match="the disk is full; free some space and run again"):
                run("p", on_error)
        assert not contents(tmp_path / "p")
        said: list[str] = []
        assert run("p", on_error, said) == expected
        assert "finished shards of an earlier run" in said[0] and not (tmp_path / ".p.partial").exists()
        for path in tmp_path.glob("p.*"):
            path.unlink()


def full_behind(calls: int, function):
    """`function` on a disk that is full after some calls."""
    left = [calls]

    def limited(*arguments, **named):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*arguments, **named)

    return limited
