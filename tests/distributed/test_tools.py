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
    assert all(row["seconds"][way] > 0 for row in result["splits"] for way in ("clm", "full", "shared-prefix"))


REFUSED = {
    "no_folder": (["tools/convert_checkpoint.py", "import", "--hf", "nowhere", "--output", "{tmp}/out"], "nowhere"),
    "no_checkpoint": (
        ["tools/convert_checkpoint.py", "export", "--checkpoint", "{tmp}", "--hf-reference", "{llama}", "--output", "{tmp}/o"],
        "--checkpoint",
    ),
    "unknown_kind": (["tools/probe_views.py", "--hf", "x", "--tokens", "y", "--kind", "twist"], "--kind"),
    "heads": (
        ["tools/probe_views.py", "--hf", "{llama}", "--tokens", "{tokens}", "--kind", "skip", "--split", "4", "--shift",
         "2", "--tensor-model-parallel-size", "4", "--output", "{tmp}/p.json"],
        "--tensor-model-parallel-size 4",
    ),
    "suffix": (
        ["tools/probe_views.py", "--hf", "{llama}", "--tokens", "{tokens}", "--kind", "skip", "--split", "5", "--shift",
         "2", "--context-parallel-size", "2", "--execution", "shared-prefix", "--output", "{tmp}/p.json"],
        "--split 5",
    ),
    "hidden": (["tools/benchmark_views.py", "--seq-length", "512", "--hidden-size", "100", "--output", "{tmp}/b"], "100"),
    "torchrun": (["-m", "megatron_rpsd.training.main", "--device", "cpu", "--num-layers", "2"], "--hidden-size"),
}  # fmt: skip


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
