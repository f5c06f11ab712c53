"""What befell a run is on the disk when its process is gone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rpsd.runs.events import json_lines, record_event

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("last_words", "text", "crashed"),
    [
        ("raise RuntimeError('out of memory\\nand more')", "RuntimeError: out of memory", True),
        ("sys.exit(0)", "the process left by itself", False),
        ("pass", "the process left by itself", False),
    ],
)
def test_an_end_is_recorded_with_its_reason(last_words, text, crashed, tmp_path):
    code = (
        "import sys; from pathlib import Path; from megatron_rpsd.runs.events import record_end\n"
        f"record_end(Path(sys.argv[1]))\n{last_words}\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "events.jsonl")], cwd=ROOT, capture_output=True)
    (event,) = json_lines(tmp_path / "events.jsonl")
    assert (event["event"], event["text"], event["crashed"]) == ("ended", text, crashed)


def test_only_the_end_of_a_long_file_is_read(tmp_path):
    path = tmp_path / "events.jsonl"
    for number in range(100):
        record_event(path, "skipped", f"step {number}")
    assert [event["text"] for event in json_lines(path)] == [f"step {number}" for number in range(100)]
    tail = json_lines(path, tail_bytes=300)
    assert 1 < len(tail) < 10 and tail[-1]["text"] == "step 99"
    assert json_lines(tmp_path / "absent") == []
