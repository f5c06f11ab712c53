"""The two instruments as command lines, on Hugging Face folders and on Megatron checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from megatron_rpsd.analysis.trace import TraceSettings, load_traced_model, trace_positions, trace_record
from megatron_rpsd.checkpoint.convert import import_hf

TRACE = ["--chunk", "4", "--repeats", "4", "--shift-repeat", "2", "--shifts", "1", "9", "--sequences", "1"]


def run(tool: str, *words) -> subprocess.CompletedProcess:
    command = [sys.executable, f"tools/{tool}.py", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def checkpoint(ranks, tiny_qwen3, tmp_path_factory):
    output = tmp_path_factory.mktemp("instruments") / "checkpoint"
    ranks.run(1, import_hf, tiny_qwen3, output)
    return output


def test_a_checkpoint_and_its_folder_have_the_same_trace(checkpoint, tiny_qwen3, tmp_path):
    folder = trace_record(
        trace_positions(load_traced_model(str(tiny_qwen3)), TraceSettings(4, 4, 2, (1, 9), sequences=1))
    )
    done = run(
        "trace_positions", "--checkpoint", checkpoint, "--hf-reference", tiny_qwen3, *TRACE, "--output", tmp_path / "c"
    )
    assert done.returncode == 0, done.stderr
    assert "largest change before the shift: 0" in done.stdout
    trace = json.loads((tmp_path / "c" / "trace.json").read_text())
    assert trace.pop("model") == str(checkpoint)
    assert trace == folder
    kl = trace["shifts"]["9"]["kl_per_repeat"]
    assert kl[:2] == [0, 0] and min(kl[2:]) > 0
    written = {path.name for path in (tmp_path / "c").iterdir()}
    assert written == {"trace.json", "shift-1.png", "shift-9.png", "divergence.png"}


def test_a_checkpoint_and_its_folder_do_not_differ(checkpoint, tiny_qwen3, tmp_path):
    models = ["--before", tiny_qwen3, "--after", checkpoint, "--hf-reference", tiny_qwen3]
    done = run("compare_updates", *models, "--output", tmp_path / "updates")
    assert done.returncode == 0, done.stderr
    updates = json.loads((tmp_path / "updates" / "updates.json").read_text())
    for name, heads in (("W_q", 4), ("W_k", 2), ("W_v", 2)):
        assert not np.any(updates["by_layer_and_head"][name])
        assert np.shape(updates["by_layer_and_head"][name]) == (4, heads, 8)
    assert updates["window"] == 64 and len(updates["wavelengths"]) == 8
    assert {path.name for path in (tmp_path / "updates").iterdir()} == {"updates.json", "layers.png", "curve.png"}


@pytest.mark.parametrize(
    "tool, words, part",
    [
        ("trace_positions", ["--hf", "nowhere", "--shift-repeat", "8"], "--shift-repeat 8"),
        ("compare_updates", ["--before", "nowhere", "--after", "nowhere"], "--hf-reference"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tool, words, part, tmp_path):
    done = run(tool, *words, "--output", tmp_path / "out")
    assert done.returncode == 2 and part in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert list(tmp_path.iterdir()) == []
