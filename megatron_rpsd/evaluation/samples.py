"""Prepared files of RULER as samples: what a model is asked, what it should say, where the evidence stands."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_rpsd.ruler.generate import beside

MANIFEST_FIELDS = (
    "dialect",
    "edition",
    "task",
    "metric",
    "length",
    "generated_tokens",
    "samples",
    "seed",
    "tokenizer_sha256",
    "sha256",
)


@dataclass(frozen=True)
class Evidence:
    """Where the prompt says what one reference answers."""

    reference: str
    characters: tuple[tuple[int, int], ...]
    """Half-open spans of the prompt's characters."""
    tokens: tuple[tuple[int, int], ...]
    """The same spans in tokens, counted without special tokens."""


@dataclass(frozen=True)
class Sample:
    """One question."""

    id: str
    """Unique: edition, task, length, seed, tokenizer and number in one."""
    task: str
    length: int
    """The whole budget in tokens: prompt and answer."""
    number: int
    """Line of the prepared file, from 0."""
    prompt: str
    """What the model reads, whole: RULER's input and the answer's beginning."""
    answer_prefix: str
    """The answer's beginning, the end of `prompt`; empty in edition 2024-12, which does not tell it apart."""
    outputs: tuple[str, ...]
    """The references."""
    prompt_tokens: int
    """Tokens of `prompt` without special tokens."""
    generated_tokens: int
    """Most tokens that the model may answer with."""
    metric: str
    """`all`: the share of references found; `part`: any one is enough."""
    evidence: tuple[Evidence, ...]
    """One for each reference, in the references' order."""
    item: int | None = None
    """In grids: samples of one item differ in depth alone."""
    depth: float | None = None
    """In grids: where the evidence was put, as a share of the text from 0 to 1."""


@dataclass(frozen=True)
class Prepared:
    """A task at one length."""

    path: Path
    manifest: dict
    samples: tuple[Sample, ...]

    @property
    def task(self) -> str:
        return self.manifest["task"]

    @property
    def length(self) -> int:
        return self.manifest["length"]

    @property
    def name(self) -> str:
        """TASK-LENGTH, as the file is called and as results name it."""
        return f"{self.task}-{self.length}"


def json_lines(path: Path) -> Iterator[tuple[bytes, dict]]:
    """Every line's bytes and its JSON object; ValueError names the first line that holds none."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise ValueError(f"{path}: line {number} is no JSON object")
            yield line, record


def _spans(pairs: list[list[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((start, stop) for start, stop in pairs)


def _sample(manifest: dict, number: int, record: dict, where: dict) -> Sample:
    evidence = tuple(Evidence(e["reference"], _spans(e["characters"]), _spans(e["tokens"])) for e in where["evidence"])
    outputs = tuple(record["outputs"])
    if where["sample"] != number or tuple(e.reference for e in evidence) != outputs:
        raise ValueError(f"the evidence of {where['id']} belongs to another sample")
    # Edition 2024-12 has the answer's beginning at the end of its input.
    prefix = record.get("answer_prefix", "")
    return Sample(
        id=where["id"],
        task=manifest["task"],
        length=manifest["length"],
        number=number,
        prompt=record["input"] + prefix,
        answer_prefix=prefix,
        outputs=outputs,
        prompt_tokens=where["prompt_tokens"],
        generated_tokens=manifest["generated_tokens"],
        metric=manifest["metric"],
        evidence=evidence,
        item=where.get("item"),
        depth=where.get("depth"),
    )


def load_manifest(path: Path) -> dict:
    """The manifest beside FILE.jsonl; ValueError where it is missing or lacks a field."""
    place = beside(path, ".manifest.json")
    if not place.is_file():
        raise ValueError(f"{path} has no {place.name} beside it: prepare it with tools/make_ruler.py")
    try:
        manifest = json.loads(place.read_bytes())
    except ValueError:
        raise ValueError(f"{place} is no JSON: prepare {path.name} again") from None
    missing = [field for field in MANIFEST_FIELDS if field not in manifest]
    if missing:
        raise ValueError(f"{place} lacks {', '.join(missing)}: prepare {path.name} again")
    return manifest


def load_prepared(path: Path) -> Prepared:
    """FILE.jsonl with its evidence and manifest, all samples in memory (about four bytes a token of prompt).

    Raises ValueError, in one line, where a file is missing or torn, the sha256 of FILE.jsonl is not the manifest's, the
    numbers of lines differ, or two samples have one id.
    """
    path = Path(path)
    places = (path, beside(path, ".evidence.jsonl"))
    for place in places:
        if not place.is_file():
            raise ValueError(f"{place} does not exist: prepare it with tools/make_ruler.py")
    manifest, digest = load_manifest(path), hashlib.sha256()
    records, evidence = json_lines(path), json_lines(places[1])
    samples = []
    try:
        for line, record in records:
            digest.update(line)
            _, where = next(evidence, (b"", {}))
            if where:
                samples.append(_sample(manifest, len(samples), record, where))
    except KeyError as error:
        raise ValueError(f"{path}: sample {len(samples)} or its evidence lacks {error}: prepare it again") from None
    if digest.hexdigest() != manifest["sha256"]:
        found = digest.hexdigest()
        raise ValueError(f"{path}: sha256 {found} is not its manifest's {manifest['sha256']}: prepare it again")
    if next(evidence, None) is not None or len(samples) != manifest["samples"]:
        raise ValueError(
            f"{path}: the manifest counts {manifest['samples']} samples, but the prompts and the evidence do not both "
            f"have as many lines: prepare it again"
        )
    if len({sample.id for sample in samples}) != len(samples):
        raise ValueError(f"{path}: two samples have one id: prepare it again")
    return Prepared(path, manifest, tuple(samples))
