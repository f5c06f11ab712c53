"""The tools over data preparation, as they are typed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "unit" / "data"))
from tiny_tiktoken import PATTERN, save_tiktoken  # noqa: E402

from tests.unit.data.tools import called, typed  # noqa: E402


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
    made = typed(
        "preprocess_data.py", "--mode", "mix", "--recipe", folder / "mix.toml", "--tokenizer", tokenizer,
        "--tiktoken-pattern", PATTERN, "--output-prefix", folder / "mix", "--seq-length", 64,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert f"--data-path 0.6 {folder / 'mix'}-long 0.4 {folder / 'mix'}-short" in made.stderr
    assert "share of tokens" in made.stdout and "padding: " in made.stdout
    assert Path(f"{folder / 'mix'}-short.lengths.png").read_bytes().startswith(b"\x89PNG")
    return folder / "mix"


def test_inspection_writes_a_page_and_traces_a_token(prepared: Path, capsys: pytest.CaptureFixture) -> None:
    common = ["--tokenizer", prepared.parent / "bytes.tiktoken", "--tiktoken-pattern", PATTERN, "--seq-length", 64]
    flags = ["--verify", "--samples", 2, "--eod-mask-loss", "--trace", 0, 3, "--output", prepared.parent / "page"]
    shown = typed("inspect_data.py", "--data", f"{prepared}-short", *common, *flags)
    assert shown.returncode == 0, shown.stderr
    facts = dict(line.split(": ", 1) for line in shown.stdout.splitlines() if ": " in line)
    assert facts["path"] == repr(str(prepared.parent / "a.jsonl")) and int(facts["line"]) >= 1
    page = (prepared.parent / "page" / "index.html").read_text()
    assert page.count("data:image/png") == 2 and "words and words." in page
    assert (prepared.parent / "page" / "sample1.png").read_bytes().startswith(b"\x89PNG")
    blend = ["--data", f"{prepared}.data_args", "--verify", "--split", "100,0,0"]
    through = called(capsys, "inspect_data.py", *blend, *common, "--train-samples", 10, "--trace", 1, 3)
    assert through.returncode == 0, through.stderr
    facts = dict(line.split(": ", 1) for line in through.stdout.splitlines() if ": " in line)
    assert facts["prefix"] == repr(f"{prepared}-short") and facts["path"] == repr(str(prepared.parent / "a.jsonl"))
    unordered = called(capsys, "inspect_data.py", *blend, *common, "--trace", 1, 3)
    assert unordered.returncode == 2 and "give its --train-samples N" in unordered.stderr
    raw = Path(f"{prepared}-short.bin")
    raw.write_bytes(b"\0" + raw.read_bytes()[1:])
    refused = called(capsys, "inspect_data.py", "--data", f"{prepared}-short", *common, "--verify")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "is damaged" in refused.stderr


def test_modes_that_lack_their_input_are_refused(prepared: Path, capsys: pytest.CaptureFixture) -> None:
    common = ["--tokenizer", "x", "--output-prefix", prepared.parent / "q", "--seq-length", 8]
    for words, flags in {
        "--mode mix and --recipe FILE go together": ["--mode", "mix"],
        "--mode repo joins the files of a folder": ["--mode", "repo", "--input", prepared.parent / "a.jsonl"],
    }.items():
        refused = called(capsys, "preprocess_data.py", *common, *flags)
        assert refused.returncode == 2 and words in refused.stderr and refused.stderr.count("\n") == 1
