"""The samples of a prefix as training reads them, and where each of their tokens came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rpsd.data.arrangement import PADDING
from megatron_rpsd.data.documents import document_text
from megatron_rpsd.data.encoders import Encoder, build_encoder, read_tokenizer
from megatron_rpsd.data.indexed import read_pieces, sequence_lengths
from megatron_rpsd.data.manifest import Manifest, read_manifest
from megatron_rpsd.data.order import Order, read_blend, training_dataset
from megatron_rpsd.data.readers import read_document, repository_parts


@dataclass(frozen=True)
class Origin:
    """Where a token came from."""

    prefix: str
    """of the data that hold it; one of a blend's"""
    path: str
    line: int | None
    """line in a JSONL file, row in a parquet file, from 1; else the line of the character"""
    byte: int | None
    """first byte of the character in the (decompressed) file; in a JSONL file of its line; None in a parquet file"""
    characters: tuple[int, int]
    """[start, stop) in the document's text"""
    text: str
    """those characters"""
    around: str
    """the characters with up to 40 on each side"""


class Samples:
    """Samples of L + 1 tokens by index.

    Args:
        order: of a training run; without it samples are consecutive windows of the .bin.
        dataset: Megatron's, in place of `order`.

    Raises:
        ValueError: no manifest, or too few tokens for a sample.
    """

    def __init__(self, prefix: str | Path, seq_length: int, order: Order | None = None, dataset: Any = None) -> None:
        if seq_length < 1:
            raise ValueError(f"--seq-length {seq_length} must be at least 1")
        manifest = read_manifest(prefix)
        if manifest is None:
            raise ValueError(f"{prefix}.json is missing: make the data with tools/preprocess_data.py")
        self.manifest: Manifest = manifest
        self.prefix, self.seq_length = str(prefix), seq_length
        self.tokens = np.memmap(f"{prefix}.bin", manifest.dtype, mode="r")
        self._pieces: np.ndarray | None = None
        if order is not None:
            dataset = training_dataset([self.prefix], None, manifest.vocab_size, seq_length, order)
        self._dataset = dataset
        self._starts = _sequence_starts(self.prefix)
        self._count = (
            (len(self.tokens) - 1) // seq_length if self._dataset is None else len(self._dataset.shuffle_index)
        )
        if self._count < 1:
            raise ValueError(
                f"--seq-length {seq_length}: {prefix} holds {len(self.tokens)} tokens, too few for a sample"
            )

    def __len__(self) -> int:
        return self._count

    def at(self, sample: int) -> tuple[Samples, int]:
        """The prefix that a sample is read from, and the sample's number there."""
        return self, sample

    def encoder(self, tokenizer: str | Path, pattern: str | None = None) -> Encoder:
        """The encoder of the data's tokenizer.

        Raises:
            ValueError: it cannot be loaded, or is another one.
        """
        spec = read_tokenizer(tokenizer, pattern)
        if spec.sha256 != self.manifest.tokenizer_sha256:
            raise ValueError(f"--tokenizer {tokenizer} is not the one that {self.prefix} was made with")
        return build_encoder(spec)

    def places(self, sample: int) -> np.ndarray:
        """Where the L + 1 tokens of a sample stand in the .bin, int64 [L + 1].

        Raises:
            ValueError: no such sample.
        """
        if not 0 <= sample < self._count:
            raise ValueError(f"sample {sample} does not exist: {self.prefix} has samples 0 to {self._count - 1}")
        length = self.seq_length
        if self._dataset is None:
            return np.arange(sample * length, (sample + 1) * length + 1)
        window = self._dataset.shuffle_index[sample]
        (first, start), (last, stop) = self._dataset.sample_index[window], self._dataset.sample_index[window + 1]
        parts = []
        for place in range(first, last + 1):
            document = int(self._dataset.document_index[place])
            begin = int(self._starts[document]) + (int(start) if place == first else 0)
            end = int(self._starts[document]) + int(stop) + 1 if place == last else int(self._starts[document + 1])
            parts.append(np.arange(begin, end))
        found = np.concatenate(parts)
        assert len(found) == length + 1
        return found

    def ids(self, sample: int) -> np.ndarray:
        """Token ids of a sample, int64 [L + 1]: the model reads the first L, the labels are the last L."""
        return self.tokens[self.places(sample)].astype(np.int64)

    def trace(self, sample: int, token: int, encoder: Encoder) -> Origin:
        """Where a sample's token came from, found by tokenizing its document again.

        Raises:
            ValueError: no such token; it is padding or an end token, which no text has; or the document has changed.
        """
        if not 0 <= token <= self.seq_length:
            raise ValueError(f"token {token} does not exist: a sample has tokens 0 to {self.seq_length}")
        place = int(self.places(sample)[token])
        self._pieces = read_pieces(self.prefix) if self._pieces is None else self._pieces
        number = int(np.searchsorted(self._pieces["place"], place, side="right")) - 1
        piece = self._pieces[number]
        if piece["file"] == PADDING:
            raise ValueError(f"token {token} of sample {sample} is padding, which comes from no file")
        path = Path(self.manifest.inputs[int(piece["file"])].path)
        document = read_document(
            path, int(piece["line"]), int(piece["offset"]), self.manifest.json_key, self.manifest.seed
        )
        text = document_text(document, self.manifest.json_key)
        ids, spans = encoder.spans(text)
        within = int(piece["start"]) + place - int(piece["place"])
        if within == len(ids) and self.tokens[place] == self.manifest.eod_id:
            ids, spans = [*ids, self.manifest.eod_id], [*spans, (len(text), len(text))]
        self._check(document.label, piece, ids)
        return _origin(self.prefix, document, text, spans[within], self.manifest.seed)

    def _check(self, label: str, piece: np.ndarray, ids: list[int]) -> None:
        """Refuse a document that is not the one that was tokenized."""
        start, place, count = int(piece["start"]), int(piece["place"]), int(piece["tokens"])
        stored, again = self.tokens[place : place + count], ids[start : start + count]
        if len(again) < count and count - len(again) == 1 and stored[-1] == self.manifest.eod_id:
            stored = stored[:-1]
        if stored.tolist() != list(again):
            raise ValueError(f"{label} gives other tokens than those stored: it, or the tokenizer, has changed")


class BlendedSamples:
    """The samples of a run on several prefixes, as `Samples` by index.

    Args:
        prefixes, weights: of --data-args-path.
        order: of the run; --mid-level-dataset-surplus has its default.

    Raises:
        ValueError: as `Samples`; or prefixes of different tokenizers.
    """

    def __init__(self, prefixes: Sequence[str], weights: Sequence[float] | None, seq_length: int, order: Order) -> None:
        first = Samples(prefixes[0], seq_length)
        self._blend = training_dataset(prefixes, weights, first.manifest.vocab_size, seq_length, order)
        self.sources = [
            Samples(prefix, seq_length, dataset=dataset)
            for prefix, dataset in zip(prefixes, self._blend.datasets, strict=True)
        ]
        for source in self.sources:
            if source.manifest.tokenizer_sha256 != first.manifest.tokenizer_sha256:
                raise ValueError(f"{source.prefix} was made with another tokenizer than {first.prefix}")

    def __len__(self) -> int:
        return len(self._blend)

    def at(self, sample: int) -> tuple[Samples, int]:
        """The prefix that a sample is read from, and the sample's number there."""
        if not 0 <= sample < len(self):
            raise ValueError(f"sample {sample} does not exist: the run has samples 0 to {len(self) - 1}")
        return self.sources[self._blend.dataset_index[sample]], int(self._blend.dataset_sample_index[sample])

    def encoder(self, tokenizer: str | Path, pattern: str | None = None) -> Encoder:
        """The encoder of the data's tokenizer, as that of `Samples`."""
        return self.sources[0].encoder(tokenizer, pattern)

    def ids(self, sample: int) -> np.ndarray:
        """Token ids of a sample, as those of `Samples`."""
        source, place = self.at(sample)
        return source.ids(place)

    def trace(self, sample: int, token: int, encoder: Encoder) -> Origin:
        """Where a sample's token came from, as that of `Samples`."""
        source, place = self.at(sample)
        return source.trace(place, token, encoder)


def read_samples(data: str, seq_length: int, order: Order | None) -> Samples | BlendedSamples:
    """The samples of a prefix, or of the blend in a file for --data-args-path.

    Raises:
        ValueError: as `Samples` and `read_blend`; a blend without the run's order.
    """
    if not _is_blend(data):
        return Samples(data, seq_length, order)
    if order is None:
        raise ValueError(f"--data {data} is a blend, which is mixed for a run: give its --train-samples N")
    prefixes, weights = read_blend(data)
    if len(prefixes) == 1 and weights is None:
        return Samples(prefixes[0], seq_length, order)
    return BlendedSamples(prefixes, weights, seq_length, order)


def data_prefixes(data: str) -> list[str]:
    """The prefixes that `read_samples` reads."""
    return read_blend(data)[0] if _is_blend(data) else [data]


def _is_blend(data: str) -> bool:
    return Path(data).is_file() and not Path(f"{data}.bin").exists()


def _origin(prefix: str, document, text: str, span: tuple[int, int], seed: int) -> Origin:
    start, stop = span
    around = text[max(0, start - 40) : stop + 40]
    path, line, byte = document.path, document.line, len(text[:start].encode())
    if path.is_dir():
        before = 0
        for part in repository_parts(path, seed):
            if byte < before + len(part.raw):
                break
            before += len(part.raw)
        path, byte = part.path, max(0, byte - before - part.header)
        line = 1 + part.raw[part.header :][:byte].count(b"\n")
    elif line is None:
        line = 1 + text.count("\n", 0, start)
    else:
        byte = document.offset if document.is_json else None
    return Origin(prefix, str(path), line, byte, span, text[start:stop], around)


def _sequence_starts(prefix: str) -> np.ndarray:
    """First token of each sequence of an .idx, and the number of all: int64 [n + 1]."""
    return np.concatenate([[0], np.cumsum(sequence_lengths(prefix), dtype=np.int64)])
