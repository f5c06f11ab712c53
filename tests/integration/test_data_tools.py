"""The tools over data preparation, as they are typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "unit" / "data"))
from tiny_tiktoken import PATTERN, save_tiktoken  # noqa: E402


def run(tool: str, *words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """P of a mixture of two sources, made by the tool."""
    folder = tmp_path_factory.mktemp("tools")
    texts = [f"{number}: " + "words and words. " * (number % 7) for number in range(60)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "mix.toml").write_text(
        '[[source]]\nname = "long"\nmode = "whole"\nshare = 0.6\ninputs = ["a.jsonl"]\n'
        '[[source]]\nname = "short"\nshare = 0.4\nmax_tokens = 63\ninputs = ["a.jsonl"]\n'
    )
    tokenizer = save_tiktoken(folder / "bytes.tiktoken")
    made = run(
        "preprocess_data.py", "--mode", "mix", "--recipe", folder / "mix.toml", "--tokenizer", tokenizer,
        "--tiktoken-pattern", PATTERN, "--output-prefix", folder / "mix", "--seq-length", 64,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert f"--data-path 0.600000 {folder / 'mix'}-long 0.400000 {folder / 'mix'}-short" in made.stderr
    assert "share of tokens" in made.stdout and "padding: " in made.stdout
    assert Path(f"{folder / 'mix'}-short.lengths.png").read_bytes().startswith(b"\x89PNG")
    return folder / "mix"


def test_inspection_writes_a_page_and_traces_a_token(prepared: Path) -> None:
    common = ["--tokenizer", prepared.parent / "bytes.tiktoken", "--tiktoken-pattern", PATTERN, "--seq-length", 64]
    flags = ["--verify", "--samples", 2, "--eod-mask-loss", "--trace", 0, 3, "--output", prepared.parent / "page"]
    shown = run("inspect_data.py", "--data", f"{prepared}-short", *common, *flags)
    assert shown.returncode == 0, shown.stderr
    facts = dict(line.split(": ", 1) for line in shown.stdout.splitlines() if ": " in line)
    assert facts["path"] == repr(str(prepared.parent / "a.jsonl")) and int(facts["line"]) >= 1
    page = (prepared.parent / "page" / "index.html").read_text()
    assert page.count("data:image/png") == 2 and "words and words." in page
    assert (prepared.parent / "page" / "sample1.png").read_bytes().startswith(b"\x89PNG")
    raw = Path(f"{prepared}-short.bin")
    raw.write_bytes(b"\0" + raw.read_bytes()[1:])
    refused = run("inspect_data.py", "--data", f"{prepared}-short", *common, "--verify")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "is damaged" in refused.stderr


def test_modes_that_lack_their_input_are_refused(prepared: Path) -> None:
    common = ["--tokenizer", "x", "--output-prefix", prepared.parent / "q", "--seq-length", 8]
    for words, flags in {
        "--mode mix and --recipe FILE go together": ["--mode", "mix"],
        "--mode repo joins the files of a folder": ["--mode", "repo", "--input", prepared.parent / "a.jsonl"],
    }.items():
        refused = run("preprocess_data.py", *common, *flags)
        assert refused.returncode == 2 and words in refused.stderr and refused.stderr.count("\n") == 1
