"""tools/make_ruler.py: its three files, and its refusals in one line that leave nothing behind."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[3] / "tools" / "make_ruler.py"


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True)


def test_three_files(ws_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "vt.jsonl"
    done = run("--task", "vt", "--tokenizer", ws_folder, "--length", 4096, "--num-samples", 10, "--output", output)
    assert done.returncode == 0, done.stderr
    written = {path.name for path in output.parent.iterdir()}
    assert written == {"vt.evidence.jsonl", "vt.jsonl", "vt.manifest.json"}
    manifest = json.loads(output.with_name("vt.manifest.json").read_text())
    assert manifest["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert manifest["sha256"] == "b0ffaabde127ac8fe3c11dc723cf672fa3879c3ec0aa3d5f711311f1ddb6f63b"
    assert (manifest["dialect"], manifest["edition"], manifest["metric"]) == ("RULER", "2025-07", "all")
    ids = [json.loads(line)["id"] for line in output.with_name("vt.evidence.jsonl").read_text().splitlines()]
    assert len(set(ids)) == 10


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"--edition": "2023-01"}, "--edition 2023-01: the editions are 2025-07 and 2024-12"),
        ({"--edition": "2024-12", "--task": "cwe@shuffle"}, "--edition 2024-12 has no cwe@shuffle"),
        ({"--edition": "2024-12", "--model-template": "chat"}, "--model-template base alone"),
        ({"--model-template": "chatty"}, "--model-template chatty: the choices are base and chat"),
        ({"--depths": "50"}, "--depths belongs to --grid"),
        ({"--workers": 0}, "--workers 0 must be at least 1"),
        ({"--task": "niah"}, "--task niah: the tasks are"),
        ({"--length": 200}, "--length 200 cannot hold"),
        ({"--num-samples": 0}, "--num-samples 0"),
        ({"--tokenizer": "absent"}, "holds no tokenizer.json"),
        ({"--output": "x.json"}, "must end in .jsonl"),
        ({"--task": "qa_1", "--data-dir": "."}, "--data-dir . lacks squad.json"),
    ],
)
def test_refusals(changed: dict, reason: str, ws_folder: Path, tmp_path: Path) -> None:
    typed = {"--task": "niah_single_1", "--tokenizer": ws_folder, "--length": 4096, "--num-samples": 2}
    typed |= {"--output": tmp_path / "out" / "x.jsonl"} | changed
    done = run(*(part for pair in typed.items() for part in pair))
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and reason in done.stderr
    assert not (tmp_path / "out").exists()


def test_needs_neither_torch_nor_megatron() -> None:
    code = (
        "import sys, megatron_rpsd.ruler.prepare; assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=TOOL.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--all", "--length", "4096"], ["--task", "vt", "--lengths", "4096"], ["--task", "vt", "fwe", "--length", "4096"]],
)
def test_options_of_the_other_way(arguments: list[str], ws_folder: Path) -> None:
    done = run(*arguments, "--tokenizer", ws_folder, "--num-samples", 1)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "goes with" in done.stderr
