"""Text to Megatron's `.bin/.idx` with a manifest: the library behind tools/preprocess_data.py.

Two steps. Documents are tokenized into checksummed shards in `.P.partial` beside the output (`data.tokenization`); then
they are arranged (`data.arrangement`) and written as P.bin, P.idx and P.sources (`data.indexed`). The first step takes
nearly all of the time, and a run that was interrupted anywhere goes on from its last finished shard; the second depends
on the first one's result alone. So an interrupted run and its repetition leave the bytes of an uninterrupted one.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_rpsd.data.arrangement import Arrangement, Counts
from megatron_rpsd.data.encoders import TokenizerSpec, read_tokenizer
from megatron_rpsd.data.files import held
from megatron_rpsd.data.indexed import write_indexed
from megatron_rpsd.data.manifest import LengthBucket, Manifest, write_manifest
from megatron_rpsd.data.shards import write_durably
from megatron_rpsd.data.tokenization import Source, Tokenized, tokenize

SHARD_TOKENS = 1 << 24
MODES = ("concatenate", "whole", "pack", "repo")
"""Arrangements, and repositories: folders joined, then concatenated."""
Report = Callable[[str], None]


@dataclass(frozen=True)
class PreprocessConfig:
    """Settings of `preprocess`, named as the flags of tools/preprocess_data.py."""

    inputs: Sequence[Path]
    """files; one document a line in `.jsonl`, a row in `.parquet`, one document a file otherwise; folders are code
    repositories (--mode repo)"""
    tokenizer: str | Path
    """Hugging Face folder, sentencepiece .model, .tiktoken file, or tiktoken:NAME"""
    output_prefix: Path
    """P of P.bin, P.idx, P.sources and P.json; existing ones are replaced"""
    seq_length: int
    """tokens a sample feeds to the model"""
    append_eod: bool = True
    """end every document with the tokenizer's end-of-sequence token"""
    json_key: str = "text"
    """key of the text in a JSONL line, column in a parquet file"""
    workers: int = 1
    """processes that tokenize"""
    mode: str = "concatenate"
    """one of MODES"""
    min_tokens: int = 0
    """leave shorter documents out"""
    max_tokens: int | None = None
    """leave longer documents out"""
    on_error: str = "stop"
    """what to do with a document that cannot be read: stop, or skip and count it"""
    seed: int = 0
    """of the order of files within a repository"""
    tiktoken_pattern: str | None = None
    """for a .tiktoken file"""
    shard_tokens: int = SHARD_TOKENS
    """tokens between two points from which an interrupted run goes on"""

    def __post_init__(self) -> None:
        for flag, value in (
            ("--seq-length", self.seq_length),
            ("--workers", self.workers),
            ("--shard-tokens", self.shard_tokens),
        ):
            if value < 1:
                raise ValueError(f"{flag} {value}: it must be at least 1")
        if self.mode not in MODES:
            raise ValueError(f"--mode {self.mode} is unknown: choose {', '.join(MODES)}")
        if self.on_error not in ("stop", "skip"):
            raise ValueError(f"--on-error {self.on_error} is unknown: choose stop or skip")
        if self.max_tokens is not None and self.max_tokens < max(self.min_tokens, 1):
            raise ValueError(f"--min-tokens {self.min_tokens} --max-tokens {self.max_tokens} leave no length between")
        if not self.inputs:
            raise ValueError("--input names no file")
        for path in self.inputs:
            check_input(path, self.mode == "repo")

    @property
    def source(self) -> Source:
        """What is tokenized."""
        return Source(tuple(self.inputs), self.json_key, self.append_eod, self.seed, self.on_error)


def check_input(path: Path, repository: bool) -> None:
    """Refuse an input that is not there, or of the other kind."""
    if repository:
        if not path.is_dir():
            raise ValueError(f"--input {path} is not a folder: --mode repo joins the files of a folder, a repository")
    elif not path.is_file():
        what = "is a folder: name its files, or join them with --mode repo" if path.is_dir() else "does not exist"
        raise ValueError(f"--input {path} {what}")


def load_tokenizer(path: str | Path, append_eod: bool, mode: str, pattern: str | None) -> TokenizerSpec:
    """The tokenizer, with the tokens that the run needs.

    Raises:
        ValueError: it cannot be loaded, or lacks one.
    """
    spec = read_tokenizer(path, pattern)
    if append_eod and spec.eod_id is None:
        raise ValueError(f"--append-eod: the tokenizer in {path} has no end-of-sequence token; use --no-append-eod")
    if mode == "pack" and spec.pad_id is None and spec.eod_id is None:
        raise ValueError(f"--mode pack: the tokenizer in {path} has neither a padding nor an end token to pad with")
    return spec


def padding_of(spec: TokenizerSpec) -> int:
    """The token that fills windows up: the tokenizer's own for that, which Megatron keeps out of the loss, unless it is
    the end token; then the end token, which --eod-mask-loss keeps out of it.
    """
    usable = spec.pad_id is not None and spec.pad_id != spec.eod_id
    return spec.pad_id if usable else spec.eod_id if spec.eod_id is not None else 0


@contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """`.P.partial` beside `target`, locked; it goes when the block ends well, or when no shard in it is finished.

    Raises:
        ValueError: it cannot be made, another run holds it, or the disk is full.
    """
    folder = target.absolute().parent / f".{target.name}.partial"
    made = []
    for parent in reversed([folder, *folder.parents]):
        if not parent.exists():
            made.append(parent)
    try:
        with held(folder, f"another run is writing in {folder}: wait for it, or use another output"):
            yield folder
            shutil.rmtree(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(
                f"--output-prefix {target}: the disk is full; free some space and run again, finished shards are kept"
            ) from error
        if not folder.exists():
            raise ValueError(f"cannot write {target}: {error.strerror or error}") from error
        raise
    finally:
        if folder.exists() and not any(folder.rglob("[0-9][0-9][0-9][0-9][0-9].json")):
            shutil.rmtree(folder)
        if not folder.exists():
            for parent in reversed(made[:-1]):
                if parent.exists() and not any(parent.iterdir()):
                    parent.rmdir()


def write_arranged(
    prefix: Path, tokenized: Tokenized, spec: TokenizerSpec, arrangement: Arrangement, source: Source, mode: str
) -> Manifest:
    """Writes `.bin/.idx/.sources/.json` (and `.skipped.jsonl`) of `prefix`.

    Raises:
        ValueError: too few tokens for one sample.
    """
    padding = padding_of(spec)
    arranged = arrangement(tokenized.store.documents())
    tokens, files = write_indexed(prefix, arranged, tokenized.store.reader(), spec.dtype, padding)
    counts, length = arrangement.counts, arrangement.seq_length
    windows = max(tokens - 1, 0) // length
    if windows < 1:
        raise ValueError(
            f"--seq-length {length} needs {length} + 1 = {length + 1} tokens for one sample, the input holds {tokens}"
            f"{_left_out(counts)}: give more text or a shorter --seq-length"
        )
    largest = [shard.max_token_id for shard in tokenized.store.shards]
    manifest = Manifest(
        tokenizer_sha256=spec.sha256,
        vocab_size=spec.vocab_size,
        max_token_id=max([*largest, padding] if counts.padding_tokens else largest),
        dtype=spec.dtype,
        eod_id=spec.eod_id if source.append_eod else None,
        documents=counts.documents - counts.left_out_documents,
        empty_documents=len(tokenized.empty),
        tokens=tokens,
        seq_length=length,
        windows=windows,
        inputs=tokenized.inputs,
        mode=mode,
        json_key=source.json_key,
        seed=source.seed,
        skipped=len(tokenized.faults),
        left_out_documents=counts.left_out_documents,
        left_out_tokens=counts.left_out_tokens,
        cut_documents=counts.cut_documents,
        padding_tokens=counts.padding_tokens,
        padding_id=padding if counts.padding_tokens else None,
        special_tokens=sum(shard.special_tokens for shard in tokenized.store.shards),
        lengths=_buckets(counts.lengths),
        files=files,
    )
    reasons = [{"skipped": fault} for fault in tokenized.faults] + [{"empty": label} for label in tokenized.empty]
    if reasons:
        lines = "".join(json.dumps(reason, ensure_ascii=False) + "\n" for reason in reasons)
        write_durably(Path(f"{prefix}.skipped.jsonl"), lines.encode(errors="surrogateescape"))
    write_manifest(prefix, manifest)
    return manifest


def _buckets(lengths: np.ndarray) -> tuple[LengthBucket, ...]:
    """`Counts.lengths` without what is empty at either end."""
    found = np.flatnonzero(lengths[0])
    bits = range(int(found[0]), int(found[-1]) + 1)
    return tuple(LengthBucket(2 ** (bit - 1), 2**bit - 1, *lengths[:, bit].tolist()) for bit in bits)


def _left_out(counts: Counts) -> str:
    if not counts.left_out_documents:
        return ""
    return f" after {counts.left_out_documents} of {counts.documents} documents were left out"


def publish(staged: Path, target: Path) -> None:
    """Renames what was written under `staged` to `target`, the manifest last; an older manifest goes first, so that no
    moment shows a manifest beside data that it does not describe.
    """
    Path(f"{target}.json").unlink(missing_ok=True)
    Path(f"{target}.skipped.jsonl").unlink(missing_ok=True)
    for suffix in (".bin", ".idx", ".sources", ".skipped.jsonl", ".json"):
        path = Path(f"{staged}{suffix}")
        if path.exists():
            path.replace(f"{target}{suffix}")


def preprocess(config: PreprocessConfig, report: Report = lambda line: None) -> Manifest:
    """Tokenizes `config.inputs` into P.bin and P.idx and describes them in P.json; returns that manifest.

    Document boundaries are kept: under `concatenate` one Megatron document with one sequence for each, in the order of
    the inputs. Everything is written aside and renamed at the end, P.json last. The number of workers changes nothing.

    Args:
        report: called with lines on how the run goes.

    Raises:
        ValueError: leaving finished shards at most, when the tokenizer cannot be loaded, a document cannot be read
            (with its file and line), or all of them hold fewer than seq_length + 1 tokens.
    """
    spec = load_tokenizer(config.tokenizer, config.append_eod, config.mode, config.tiktoken_pattern)
    target, source = config.output_prefix, config.source
    arranged = "concatenate" if config.mode == "repo" else config.mode
    with work_folder(target) as folder:
        tokenized = tokenize(source, spec, folder / "tokens", config.workers, config.shard_tokens, report)
        arrangement = Arrangement(arranged, config.seq_length, config.min_tokens, config.max_tokens)
        try:
            manifest = write_arranged(folder / "data", tokenized, spec, arrangement, source, config.mode)
        except ValueError:
            shutil.rmtree(folder)
            raise
        target.parent.mkdir(parents=True, exist_ok=True)
        publish(folder / "data", target)
    return manifest


def describe(prefix: str | Path, manifest: Manifest) -> str:
    """What was stored, in lines for a terminal."""
    empty = f"{manifest.empty_documents} empty ones left out"
    lines = [
        f"{prefix}: {manifest.documents} documents ({empty}), {manifest.tokens} tokens, {manifest.windows} samples of "
        f"{manifest.seq_length} tokens"
    ]
    if manifest.mode == "pack":
        share = manifest.padding_tokens / manifest.tokens
        lines.append(
            f"padding: {manifest.padding_tokens} tokens ({share:.2%}); cut: {manifest.cut_documents} documents"
        )
    if manifest.left_out_documents or manifest.left_out_tokens:
        lines.append(
            f"left out by --mode {manifest.mode} and the bounds on length: {manifest.left_out_documents} documents, "
            f"with rests of others {manifest.left_out_tokens} tokens"
        )
    if manifest.skipped:
        lines.append(f"skipped: {manifest.skipped}, listed in {prefix}.skipped.jsonl")
    if manifest.special_tokens:
        lines.append(
            f"special tokens: the texts spell {manifest.special_tokens} that this tokenizer does not read as text; an "
            "end token among them looks like the end of a document"
        )
    lines.append(f"{'tokens of a document':>23s} {'documents':>12s} {'share of tokens':>16s}")
    total = sum(bucket.tokens for bucket in manifest.lengths)
    for bucket in manifest.lengths:
        share = bucket.tokens / total
        lines.append(f"{bucket.low:>10d} .. {bucket.high:>9d} {bucket.documents:>12d} {share:>16.1%}")
    return "\n".join(lines)
