"""Engines whose answers are known beforehand, and answers read from files."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rpsd.evaluation.engines.reference import Blind, Oracle, RandomAnswers
from megatron_rpsd.evaluation.engines.replay import Replay
from megatron_rpsd.evaluation.samples import Evidence, Sample
from tests.unit.evaluation.questions import question


def several(outputs: tuple[str, ...], starts: tuple[int, ...], **changed) -> Sample:
    """A sample of 100 tokens with a reference's evidence at each start."""
    evidence = tuple(Evidence(o, ((0, 1),), ((at, at + 2),)) for o, at in zip(outputs, starts, strict=True))
    return replace(question(), outputs=outputs, evidence=evidence, prompt_tokens=100, **changed)


def texts(engine, *samples: Sample) -> list[str]:
    return [answer.text for _, answer in engine.complete(samples)]


def test_oracle_and_blind() -> None:
    sample = several(("aa", "bb", "cc", "dd"), (0, 33, 66, 67))
    assert texts(Oracle(), sample) == [" aa, bb, cc, dd"]
    blind = Blind.parse("0.33-0.67")
    assert texts(blind, sample) == [" aa, dd"] and blind.describe() == {"name": "blind", "low": 0.33, "high": 0.67}
    assert texts(blind, several(("aa",), (40,))) == [" "]
    assert texts(blind, several(("aa",), (40,), depth=0.9, item=0)) == [" aa"]  # a grid's position is its depth
    assert texts(blind, replace(sample, evidence=(Evidence("aa", (), ()),))) == [" aa"]
    for wrong in ("", "0.5", "0.7-0.3", "0-1.5", "a-b", "-1-0.5"):
        with pytest.raises(ValueError, match=f"--backend blind:{re.escape(wrong)}: give two shares"):
            Blind.parse(wrong)


def test_random_answers_are_of_the_right_kind_and_repeat() -> None:
    identifier = "01234567-89ab-4cde-8f01-23456789abcd"
    kinds = {"1234567": r"\d{7}", "45678": r"\d{5}", identifier: r"[0-9a-f-]{36}", "QWERT": "[A-Z]{5}", "word": r"\S.*"}
    sample = several(tuple(kinds), (0,) * len(kinds))
    (text,) = texts(RandomAnswers(1), sample)
    assert texts(RandomAnswers(1), sample) == [text] != texts(RandomAnswers(2), sample)
    assert texts(RandomAnswers(1), replace(sample, id="another")) != [text]
    drawn = text.strip().split(", ")
    for (known, rule), found in zip(kinds.items(), drawn, strict=True):
        assert re.fullmatch(rule, found) and found != known


def write(path: Path, *lines: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_replay_by_id(tmp_path: Path) -> None:
    samples = [question(number) for number in range(2)]
    lines = [{"id": s.id, "prediction": f"p{s.number}", "tokens": 3, "finish": "length"} for s in samples[::-1]]
    path = write(tmp_path / "run" / "predictions" / "niah_single_1-4096.jsonl", *lines)
    for source in (path, path.parent, path.parent.parent):
        answers = list(Replay(source).complete(samples))
        assert [(a.text, a.tokens, a.finish) for _, a in answers] == [("p0", 3, "length"), ("p1", 3, "length")]
    with pytest.raises(ValueError, match="has no id x/niah_single_1/64/2: it belongs to other prompts"):
        texts(Replay(path), question(2))
    with pytest.raises(ValueError, match="holds no vt-4096.jsonl"):
        texts(Replay(path.parent), question(0, task="vt"))
    with pytest.raises(ValueError, match="--predictions .*absent does not exist"):
        Replay(tmp_path / "absent")


def test_replay_of_rulers_own_files(tmp_path: Path) -> None:
    samples = [question(number) for number in range(2)]
    lines = [{"index": 123, "pred": f"p{s.number}", "outputs": list(s.outputs), "others": {}} for s in samples]
    path = write(tmp_path / "niah_single_1.jsonl", *lines)
    with pytest.raises(ValueError, match="--predictions-order lines says"):
        texts(Replay(path), *samples)
    assert texts(Replay(path, by_line=True), *samples) == ["p0", "p1"]
    with pytest.raises(ValueError, match=r"line 2 answers \['1234568'\], .* asks for \['1234569'\]"):
        texts(Replay(path, by_line=True), replace(question(2), number=1))
    with pytest.raises(ValueError, match="has no line 3"):
        texts(Replay(path, by_line=True), question(2))
    with pytest.raises(ValueError, match="has neither prediction nor pred"):
        texts(Replay(write(tmp_path / "x.jsonl", {"id": samples[0].id})), samples[0])
