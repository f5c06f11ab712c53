"""The doctor's lines: what is here, what is missing, and the command that brings it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from megatron_rpsd.evaluation import doctor
from megatron_rpsd.evaluation.doctor import Finding, findings, report
from tests.ruler_prompts import tiny_reader


@pytest.fixture(autouse=True)
def no_network(monkeypatch) -> None:
    def refuse(*_, **__):
        raise AssertionError("the doctor fetches nothing")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def by_name(found: list[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in found}


def test_here_and_missing(tmp_path: Path) -> None:
    (tmp_path / "squad.json").write_text("{}")
    found = by_name(findings(tmp_path, tiny_reader(tmp_path / "model")))
    assert all(found[name].here for name in ("torch", "transformers", "tokenizers", "model", "tokenizer", "disk"))
    assert "window 1024 tokens" in found["model"].here and "adds no BOS" in found["tokenizer"].here
    assert "SHA-256" in found["squad.json"].line() and found["squad.json"].line().startswith("absent")
    assert found["hotpotqa.json"].here == "" and "make_ruler.py fetch-data" in found["hotpotqa.json"].line()
    assert "--words-dictionary" in found["english_words.json"].line()
    text, code = report(list(found.values()))
    assert code == 0 and text.endswith("\nready")


def test_essentials(tmp_path: Path, monkeypatch) -> None:
    def other_words() -> dict:
        raise ValueError("other words give other samples: pip install wonderwords==3.0.1")

    monkeypatch.setattr(doctor, "word_lists", other_words)
    text, code = report(findings(None, tmp_path))
    assert code == 1
    lines = text.splitlines()
    assert lines[-1] == "cannot evaluate without wonderwords 3.0.1, model, tokenizer"
    assert any(line.startswith("MISSING  wonderwords 3.0.1") and "pip install" in line for line in lines)
    assert any(line.startswith("MISSING  model") and "holds no config.json" in line for line in lines)
    assert any(line.startswith("MISSING  tokenizer") and "holds no tokenizer.json" in line for line in lines)


def test_packages_are_not_imported(monkeypatch) -> None:
    assert doctor._package("pip", "x", "y").here and not doctor._package("no-such-package", "x", "pip install y").here
    line = doctor._package("no-such-package", "a purpose", "pip install y").line()
    assert line == "absent   no-such-package (a purpose): pip install y"
