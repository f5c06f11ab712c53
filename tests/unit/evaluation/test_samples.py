"""Prepared files are read whole and as they were written, or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from megatron_rpsd.evaluation.samples import load_prepared
from tests.unit.evaluation.made_samples import Made, write_prepared

TWO = [Made(["1111111", "2222222"], [100, 700]), Made(["3333333", "4444444"], [20, 990])]


def test_a_sample_holds_prompt_references_and_places(tmp_path: Path) -> None:
    file = load_prepared(write_prepared(tmp_path, "niah_multivalue", TWO, 8192))
    assert (file.task, file.length, file.name, len(file.samples)) == (
        "niah_multivalue",
        8192,
        "niah_multivalue-8192",
        2,
    )
    sample = file.samples[1]
    assert sample.id == "niah_multivalue/8192/1" and sample.number == 1 and sample.metric == "all"
    assert sample.prompt.startswith("Read. One of") and sample.prompt.endswith(" A:") and sample.answer_prefix == " A:"
    assert sample.outputs == ("3333333", "4444444") and sample.generated_tokens == 128 and sample.prompt_tokens == 1000
    second = sample.evidence[1]
    start, stop = second.characters[0]
    assert second.reference == "4444444" and second.tokens == ((990, 995),)
    assert sample.prompt[start:stop] == "One of the special magic numbers for key is: 4444444."
    assert sample.item is None and sample.depth is None


def test_a_grid_s_sample_knows_its_item_and_depth(tmp_path: Path) -> None:
    made = [Made(["1111111"], [250], item=3, depth=0.25)]
    sample = load_prepared(write_prepared(tmp_path, "niah_single_1@grid", made)).samples[0]
    assert (sample.item, sample.depth) == (3, 0.25)


def test_the_early_edition_has_the_answer_s_beginning_in_its_input(tmp_path: Path) -> None:
    path = write_prepared(tmp_path, "niah_single_1", [Made(["1111111"], [5])], edition="2024-12")
    record = json.loads(path.read_bytes())
    record["input"] += record.pop("answer_prefix")
    path.write_text(json.dumps(record) + "\n")
    manifest = path.with_name(path.stem + ".manifest.json")
    changed = json.loads(manifest.read_text()) | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    manifest.write_text(json.dumps(changed))
    sample = load_prepared(path).samples[0]
    assert sample.prompt.endswith(" A:") and sample.prompt.count(" A:") == 1 and sample.answer_prefix == ""


def _drop_last_line(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def _swap_lines(path: Path) -> None:
    path.write_bytes(b"".join(reversed(path.read_bytes().splitlines(keepends=True))))


def _same_id(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"4096/1", b"4096/0"))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _no_seed(path: Path) -> None:
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "seed"}))


def _no_prompt_tokens(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"prompt_tokens", b"tokens_of_prompt"))


DAMAGES = {
    "a changed prompt": (".jsonl", lambda p: p.write_bytes(p.read_bytes().replace(b"Read", b"Read!")), "sha256"),
    "a lost prompt": (".jsonl", _drop_last_line, "sha256"),
    "a torn prompt": (".jsonl", _cut, "line 2 is no JSON object"),
    "no prompts": (".jsonl", Path.unlink, "does not exist"),
    "lost evidence": (".evidence.jsonl", _drop_last_line, "counts 2 samples"),
    "more evidence": (".evidence.jsonl", lambda p: p.write_bytes(p.read_bytes() + b"{}\n"), "counts 2 samples"),
    "evidence in another order": (".evidence.jsonl", _swap_lines, "belongs to another sample"),
    "torn evidence": (".evidence.jsonl", _cut, "line 2 is no JSON object"),
    "no evidence": (".evidence.jsonl", Path.unlink, "does not exist"),
    "evidence without counts": (".evidence.jsonl", _no_prompt_tokens, "lacks 'prompt_tokens'"),
    "two samples of one id": (".evidence.jsonl", _same_id, "two samples have one id"),
    "no manifest": (".manifest.json", Path.unlink, "beside it"),
    "a torn manifest": (".manifest.json", _cut, "is no JSON"),
    "a manifest without its seed": (".manifest.json", _no_seed, "lacks seed"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_clear_line(tmp_path: Path, damage: str) -> None:
    path = write_prepared(tmp_path, "niah_multivalue", TWO)
    ending, change, message = DAMAGES[damage]
    change(path.with_name(path.stem + ending))
    with pytest.raises(ValueError) as caught:
        load_prepared(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
