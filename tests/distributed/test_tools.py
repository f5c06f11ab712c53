"""Command lines as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def run(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_the_benchmark_of_views_reports_ratios_beside_the_bound(tmp_path):
    done = run(
        "tools/benchmark_views.py", "--seq-length", 256, "--vocab-size", 128, "--hidden-size", 64, "--num-layers", 1,
        "--splits", 2, "--repetitions", 1, "--output", tmp_path / "views.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "views.json").read_text())
    assert set(result["step_ratio"]) == {"full", "shared-prefix"}
    assert 1 < result["flop_bound"]["shared-prefix"] < result["flop_bound"]["full"] == 2
    saved = result["activation_bytes"]
    assert saved["clm"] < saved["shared-prefix"] < saved["full"] < 2.5 * saved["clm"]
    assert all(row["seconds"][way] > 0 for row in result["splits"] for way in ("clm", "full", "shared-prefix"))


CONVERT, PROBE, BENCHMARK = (f"tools/{name}.py" for name in ("convert_checkpoint", "probe_views", "benchmark_views"))
WINDOW = ["--hf", "{llama}", "--tokens", "{tokens}", "--kind", "skip", "--shift", "2", "--output", "{tmp}/p.json"]
EXPORT = ["--hf-reference", "{llama}", "--output", "{tmp}/out"]

REFUSED = {
    "no_folder": ([CONVERT, "import", "--hf", "nowhere", "--output", "{tmp}/out"], "nowhere"),
    "no_checkpoint": ([CONVERT, "export", "--checkpoint", "{tmp}", *EXPORT], "--checkpoint"),
    "unknown_kind": ([PROBE, "--hf", "x", "--tokens", "y", "--kind", "twist"], "--kind"),
    "heads": ([PROBE, *WINDOW, "--split", "4", "--tensor-model-parallel-size", "4"], "--tensor-model-parallel-size 4"),
    "suffix": (
        [PROBE, *WINDOW, "--split", "5", "--context-parallel-size", "2", "--execution", "shared-prefix"],
        "--split 5",
    ),
    "hidden": ([BENCHMARK, "--seq-length", "512", "--hidden-size", "100", "--output", "{tmp}/b.json"], "100"),
    "torchrun": (["-m", "megatron_rpsd.training.main", "--device", "cpu", "--num-layers", "2"], "--hidden-size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_and_leaves_nothing(case, tmp_path, tiny_llama):
    import numpy as np

    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.arange(33))
    words, part = REFUSED[case]
    done = run(*(word.format(tmp=tmp_path, llama=tiny_llama, tokens=tokens) for word in words))
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and part in lines[0], done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.npy"]
