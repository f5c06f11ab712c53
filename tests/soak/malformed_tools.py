"""Malformed command lines of the tools."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.soak.malformed import Malformed, table
from tests.soak.workspace import overwrite
from tests.unit.runs.test_checkpoints import remove, truncate

Harm = Callable[[Path, random.Random], None]


def _with(place: str, harm: Harm) -> Callable[[Path, random.Random], None]:
    """`harm` done to the file at `place` of the folder."""

    def prepare(here: Path, dice: random.Random) -> None:
        harm(here / place, dice)

    prepare.__name__ = f"{harm.__name__} {place}"
    return prepare


def _text(content: str) -> Harm:
    def write(path: Path, dice: random.Random) -> None:
        path.write_text(content)

    write.__name__ = content
    return write


_IMPORT = "import --hf {here}/hf --output {here}/out"
_EXPORT = "export --checkpoint {here}/checkpoint --hf-reference {here}/hf --output {here}/out"
convert_words = table("conversion", [
    ("", "command"),
    ("implode", "implode"),
    ("import --hf {here}/hf", "--output"),
    ("import --hf {here}/nowhere --output {here}/out", "{here}/nowhere"),
    ("import --hf {here}/file --output {here}/out", "{here}/file"),
    ("import --hf {here}/empty --output {here}/out", "{here}/empty"),
    ("import --hf {here}/hf --output {here}/file", "--output {here}/file"),
    ("import --hf {here}/hf --output {here}/file/below", "--output {here}/file/below"),
    ("import --hf {here}/hf --output {here}/checkpoint", "--output {here}/checkpoint"),
    (f"{_IMPORT} --dtype int8", "--dtype int8"),
    (f"{_IMPORT} --tensor-model-parallel-size 2", "--tensor-model-parallel-size 2 torchrun"),
    (f"{_IMPORT} --tensor-model-parallel-size 0", "--tensor-model-parallel-size 0"),
    (f"{_IMPORT} --pipeline-model-parallel-size -1", "--pipeline-model-parallel-size -1"),
    (f"{_IMPORT} --decoder-first-pipeline-num-layers 9", "--decoder-first-pipeline-num-layers 9"),
    ("export --checkpoint {here}/nowhere --hf-reference {here}/hf --output {here}/out", "--checkpoint {here}/nowhere"),
    ("export --checkpoint {here}/hf --hf-reference {here}/hf --output {here}/out", "--checkpoint {here}/hf"),
    ("export --checkpoint {here}/checkpoint --hf-reference {here}/empty --output {here}/out", "{here}/empty"),
    (f"{_EXPORT} --iteration 7", "--iteration 7"),
    (f"{_EXPORT} --iteration -1", "--iteration -1"),
    (f"{_EXPORT} --max-shard-gigabytes 0", "--max-shard-gigabytes 0"),
    (f"{_EXPORT} --max-shard-gigabytes nan", "--max-shard-gigabytes nan"),
    (f"{_EXPORT} --yarn-factor 0.5", "--yarn-factor 0.5"),
    (f"{_EXPORT} --yarn-factor nan", "--yarn-factor nan"),
    ("verify --hf {here}/hf", "--checkpoint --hf-exported"),
    ("verify --hf {here}/hf --checkpoint {here}/nowhere", "--checkpoint {here}/nowhere"),
    ("verify --hf {here}/hf --hf-exported {here}/hf --iteration 3", "--iteration 3"),
], "convert_checkpoint")  # fmt: skip


def convert_files(dice: random.Random) -> Malformed:
    """A model's folder, or a checkpoint, that is damaged."""
    config, weights = "config.json", "model.safetensors"
    place, harm = dice.choice([
        (f"hf/{config}", truncate), (f"hf/{config}", remove), (f"hf/{config}", _text("[]")),
        (f"hf/{config}", _text('{"architectures": ["LlamaForCausalLM"]}')), (f"hf/{weights}", truncate),
        (f"hf/{weights}", remove), (f"hf/{weights}", overwrite), ("checkpoint/release/metadata.json", truncate),
        ("checkpoint/release/.metadata", truncate), ("checkpoint/release/__0_0.distcp", remove),
        ("checkpoint/latest_checkpointed_iteration.txt", _text("seven")),
    ])  # fmt: skip
    words = _IMPORT if place.startswith("hf") else _EXPORT
    names = ("{here}/hf" if place.startswith("hf") else "{here}/checkpoint",)
    return Malformed("conversion", "convert_checkpoint", tuple(words.split()), names, prepare=_with(place, harm))


_TEXT = "--input {here}/text.jsonl --tokenizer {here}/tokenizer --output-prefix {here}/out --seq-length 16"
preprocess_words = table("preparation of data", [
    ("--seq-length 0", "--seq-length 0"),
    ("--seq-length x", "--seq-length x"),
    ("--input {here}/nowhere.jsonl", "--input {here}/nowhere.jsonl"),
    ("--input {here}/hf", "--input {here}/hf"),
    ("--input {here}/file --mode repo", "--input {here}/file"),
    ("--tokenizer {here}/empty", "--tokenizer {here}/empty"),
    ("--tokenizer {here}/nowhere", "--tokenizer {here}/nowhere"),
    ("--tokenizer {here}/file", "--tokenizer {here}/file"),
    ("--tokenizer {here}/endless_tokenizer", "--append-eod {here}/endless_tokenizer"),
    ("--mode shuffle", "--mode shuffle"),
    ("--mode mix", "--mode --recipe"),
    ("--recipe {here}/file", "--mode --recipe"),
    ("--workers 0", "--workers 0"),
    ("--shard-tokens 0", "--shard-tokens 0"),
    ("--min-tokens 9 --max-tokens 8", "--min-tokens 9 --max-tokens 8"),
    ("--output-prefix {here}/file/below", "{here}/file/below"),
    ("--json-key body", "{here}/text.jsonl:1 body"),
    ("--on-error hope", "--on-error hope"),
], "preprocess_data", before=_TEXT)  # fmt: skip


def preprocess_files(dice: random.Random) -> Malformed:
    """An input that cannot be read to its end."""
    name, content = dice.choice([
        ("bad.jsonl", '{"text": "t1"}\n{"text": \n'), ("bad.jsonl", '{"text": "t1"}\n[3]\n'),
        ("bad.jsonl", '{"text": "t1"}\n{"text": 3}\n'), ("bad.jsonl.gz", "no gzip"), ("bad.jsonl.zst", "no zstandard"),
        ("bad.parquet", "PAR1 no parquet"), ("bad.jsonl", ""),
    ])  # fmt: skip
    words = (*_TEXT.split(), "--input", f"{{here}}/{name}")
    return Malformed(
        "preparation of data", "preprocess_data", words, (f"{{here}}/{name}",), prepare=_with(name, _text(content))
    )


def recipes(dice: random.Random) -> Malformed:
    """A recipe of a mixture that is none."""
    source = {"name": "a", "inputs": ["text.jsonl"], "share": 1.0}
    text = dice.choice([
        "{", "[]", "{}", json.dumps({"source": []}), json.dumps({"source": [{}]}), json.dumps({"source": [3]}),
        json.dumps({"source": [{**source, "share": 0}]}), json.dumps({"source": [{**source, "inputs": ["no*"]}]}),
        json.dumps({"source": [source, source]}), json.dumps({"source": [source], "tokens": -1}),
        json.dumps({"source": [{**source, "mode": "x"}]}), json.dumps({"source": [{**source, "name": "../x"}]}),
    ])  # fmt: skip
    words = "--mode mix --recipe {here}/mix.json --tokenizer {here}/tokenizer --output-prefix {here}/out --seq-length 8"
    prepare = _with("mix.json", _text(text))
    return Malformed("preparation of data", "preprocess_data", tuple(words.split()), ("mix.json",), prepare=prepare)


_SOUND_EVALUATION = (
    "--hf {here}/hf --tokenizer {here}/tokenizer --tasks vt --lengths 256 --yarn-factor auto --output {here}/out"
)
evaluation = table("evaluation", [
    ("", "--output"),
    ("--output {here}/out", "--tasks"),
    ("--tasks all --lengths 64 --output {here}/out", "--hf"),
    ("--hf {here}/nowhere --tasks vt --lengths 256 --output {here}/out", "{here}/nowhere"),
    ("--hf {here}/hf --tasks needle --lengths 256 --output {here}/out", "needle"),
    ("--hf {here}/hf --tasks vt --lengths 0 --output {here}/out", "--lengths 0"),
    ("--hf {here}/hf --tasks vt --lengths 4k5 --output {here}/out", "--lengths 4k5"),
    ("--hf {here}/hf --tasks vt --lengths 256 --num-samples 0 --output {here}/out", "--num-samples 0"),
    ("--hf {here}/hf --tasks vt --lengths 256 --backend triton --output {here}/out", "--backend triton"),
    ("--hf {here}/hf --prepared {here}/nowhere.jsonl --output {here}/out", "{here}/nowhere.jsonl"),
    ("--hf {here}/hf --prepared {here}/file --output {here}/out", "{here}/file"),
    ("--hf {here}/hf --tasks vt --lengths 256 --edition 1999 --output {here}/out", "--edition 1999"),
    (f"{_SOUND_EVALUATION} --batch-size 0", "--batch-size 0"),
    ("--hf {here}/hf --tasks vt --lengths 256 --yarn-factor 0.1 --output {here}/out", "--yarn-factor 0.1"),
    ("--hf {here}/hf --tasks vt --lengths 256 --endpoint x --output {here}/out", "--endpoint"),
    ("compare {here}/empty {here}/nowhere", "{here}/empty"),
    ("compare {here}/empty", "NEW"),
    ("report {here}/empty", "{here}/empty"),
    ("report {here}/nowhere", "{here}/nowhere"),
    ("export-harness --prepared {here}/nowhere.jsonl --output {here}/out", "{here}/nowhere.jsonl"),
    ("export-harness --prepared {here}/text.jsonl --output {here}/out", "{here}/text.jsonl"),
    ("doctor --hf {here}/nowhere --colour red", "--colour"),
], "evaluate")  # fmt: skip

_RULER = "--task vt --tokenizer {here}/tokenizer --num-samples 2"
ruler = table("RULER's prompts", [
    ("--all", "--tokenizer"),
    (f"{_RULER} --length 256", "--output"),
    (f"{_RULER} --length 256 --output {{here}}/out.txt", "--output {here}/out.txt"),
    (f"{_RULER} --length 256 --output {{here}}/out.jsonl --task needle", "needle"),
    (f"{_RULER} --length 0 --output {{here}}/out.jsonl", "--length 0"),
    (f"{_RULER} --length -5 --output {{here}}/out.jsonl", "--length -5"),
    (f"{_RULER} --length 3 --output {{here}}/out.jsonl", "3"),
    (f"{_RULER} --length 256 --output {{here}}/out.jsonl --num-samples 0", "--num-samples 0"),
    (f"{_RULER} --length 256 --output {{here}}/out.jsonl --workers 0", "--workers 0"),
    (f"{_RULER} --length 256 --output {{here}}/out.jsonl --depths 50", "--depths --grid"),
    (f"{_RULER} --length 256 --output {{here}}/out.jsonl --grid --depths 120", "--depths 120"),
    (f"{_RULER} --length 256 --output {{here}}/out.jsonl --grid --depths -1", "--depths -1"),
    (f"{_RULER} --length 256 --output {{here}}/out.jsonl --edition 1999", "--edition 1999"),
    (f"{_RULER} --length 256 --output {{here}}/out.jsonl --model-template shout", "--model-template shout"),
    (f"{_RULER} --length 256 --output {{here}}/out.jsonl --tokenizer {{here}}/empty", "--tokenizer {here}/empty"),
    (f"{_RULER} --length 256 --output {{here}}/file/out.jsonl", "{here}/file/out.jsonl"),
    (f"{_RULER} --lengths 256 --output {{here}}/out.jsonl", "--lengths --output"),
    (f"{_RULER} --length 256 --output {{here}}/out.jsonl --data-dir {{here}}/nowhere --task qa_1", "{here}/nowhere"),
    ("fetch-data --output {here}/out --wheel {here}/file", "{here}/file"),
    ("fetch-data --output {here}/out --wheel {here}/nowhere", "{here}/nowhere"),
], "make_ruler")  # fmt: skip


def _array(content) -> Harm:
    def save(path: Path, dice: random.Random) -> None:
        np.save(path, content)

    save.__name__ = f"{np.asarray(content).dtype} {np.asarray(content).shape} {np.asarray(content).max()}"
    return save


_PROBE = "--hf {here}/hf --tokens {here}/tokens.npy --output {here}/out.json"


def probe(dice: random.Random) -> Malformed:
    """A probe of a window that is none, or of a view or layout that does not fit."""
    words, names, harm = dice.choice([
        ("--kind twist --split 4 --shift 2", "--kind twist", None),
        ("--kind skip --split 99 --shift 2", "--split 99", None),
        ("--kind skip --split -1 --shift 2", "--split -1", None),
        ("--kind skip --split 4", "--shift", None),
        ("--kind skip --split 4 --shift -2", "--shift -2", None),
        ("--kind skip --split 4 --shift 99999999", "99999999", None),
        ("--kind cyclic --split 4 --shift 2", "--shift 2", None),
        ("--kind skip --split 4 --shift 2 --tensor-model-parallel-size 3", "--tensor-model-parallel-size 3", None),
        ("--kind skip --split 4 --shift 2 --tensor-model-parallel-size 0", "--tensor-model-parallel-size 0", None),
        ("--kind skip --split 4 --shift 2 --pipeline-model-parallel-size 3", "--pipeline-model-parallel-size 3", None),
        ("--kind skip --split 4 --shift 2 --context-parallel-size 3", "--context-parallel-size 3", None),
        ("--kind skip --split 5 --shift 2 --context-parallel-size 2 --execution shared-prefix", "--split 5", None),
        ("--kind skip --split 4 --shift 2 --tokens {here}/nowhere.npy", "--tokens {here}/nowhere.npy", None),
        ("--kind skip --split 4 --shift 2 --hf {here}/empty", "{here}/empty", None),
        ("--kind skip --split 4 --shift 2", "--tokens {here}/tokens.npy", truncate),
        ("--kind skip --split 4 --shift 2", "--tokens {here}/tokens.npy", _array(np.zeros((4, 4), dtype=int))),
        ("--kind skip --split 4 --shift 2", "--tokens {here}/tokens.npy", _array(np.full(33, 97))),
        ("--kind skip --split 4 --shift 2", "--tokens {here}/tokens.npy", _array(np.zeros(33))),
    ])  # fmt: skip
    prepare = None if harm is None else _with("tokens.npy", harm)
    return Malformed("probe", "probe_views", (*_PROBE.split(), *words.split()), tuple(names.split()), prepare=prepare)


_BOOK = "--data {here}/book --tokenizer {here}/tokenizer --seq-length 16"


def other_tools(dice: random.Random) -> Malformed:
    """The tools that look, compare and plan."""
    program, words, names = dice.choice([
        ("inspect_data", _BOOK, "--output --trace --verify"),
        ("inspect_data", f"{_BOOK} --seq-length 0 --output {{here}}/out", "--seq-length 0"),
        ("inspect_data", f"{_BOOK} --data {{here}}/nowhere --output {{here}}/out", "{here}/nowhere"),
        ("inspect_data", f"{_BOOK} --tokenizer {{here}}/empty --output {{here}}/out", "--tokenizer {here}/empty"),
        ("inspect_data", f"{_BOOK} --trace 9999 0", "9999"),
        ("inspect_data", f"{_BOOK} --data {{here}}/data --verify", "{here}/data"),
        ("inspect_data", f"{_BOOK} --output {{here}}/out --rpsd-max-shift 0", "--rpsd-max-shift 0"),
        ("inspect_data", f"{_BOOK} --output {{here}}/out --split x --train-samples 4", "--split x"),
        ("compare_updates", "--before {here}/nowhere --after {here}/hf --output {here}/out", "{here}/nowhere"),
        ("compare_updates", "--before {here}/hf --after {here}/checkpoint --output {here}/out", "--hf-reference"),
        ("compare_updates", "--before {here}/hf --after {here}/hf --output {here}/out --window 0", "--window 0"),
        ("trace_positions", "--hf {here}/nowhere --output {here}/out", "{here}/nowhere"),
        ("trace_positions", "--hf {here}/hf --output {here}/out --chunk 0", "--chunk 0"),
        ("simulate_splits", "--micro-steps 0 --steps 2 --output {here}/out.json", "--micro-steps 0"),
        ("simulate_splits", "--attention-share 2 --steps 2 --output {here}/out.json", "--attention-share 2"),
        ("simulate_splits", "--steps 0 --output {here}/out.json", "--steps 0"),
        ("attempt", "begin {here}/empty --nodes 0 --ranks-per-node 8", "0 nodes"),
        ("attempt", "begin {here}/out --nodes 1 --ranks-per-node 1 --files {here}/nowhere", "{here}/nowhere"),
        ("attempt", "begin {here}/out --nodes 1 --ranks-per-node 1 --max-fruitless 0", "--max-fruitless 0"),
        ("attempt", "begin {here}/finished --nodes 1 --ranks-per-node 1 -- --num-layers 2", "{here}/finished"),
        ("cache_teacher", "--output {here}/out --device cpu --iterations-per-file 0", "--iterations-per-file 0"),
        ("cache_teacher", "--output {here}/out --device cpu --objective rpsd", "--num-layers"),
        ("attention_mass", "--hf {here}/hf --prepared {here}/nowhere.jsonl --output {here}/o.json", "nowhere.jsonl"),
        ("attention_mass", "--hf {here}/hf --prepared {here}/text.jsonl --output {here}/o.txt", "{here}/o.txt"),
    ])  # fmt: skip
    return Malformed("other tools", program, tuple(words.split()), tuple(names.split()))


TOOLS = {
    convert_words: 5, convert_files: 3, preprocess_words: 5, preprocess_files: 2, recipes: 2, evaluation: 5, ruler: 4,
    probe: 3, other_tools: 3,
}  # fmt: skip
