"""Probed losses against transformers with explicit position_ids and an explicit 4D mask in the sequence's order."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rpsd.data.documents import python_sources
from megatron_rpsd.evaluation.probe import ParallelLayout, probe_on_this_rank
from megatron_rpsd.loss.definitions import objective
from megatron_rpsd.positions import View, cyclic_view, skip_view
from tests.distributed.models import LENGTH, VOCABULARY, causal_mask


def reference_losses(folder, window: np.ndarray, view: View) -> tuple[float, float]:
    """clm and kl by transformers, its own positions and mask given explicitly; fp64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    ids = torch.as_tensor(window)[None]
    length = ids.shape[1] - 1
    mask = causal_mask(length)
    # transformers knows no negative positions' meaning either, but RoPE is relative: bring the smallest to 0.
    perturbed = view.position_ids(length)
    perturbed = perturbed - perturbed.min().clamp(max=0)
    with torch.no_grad():
        standard, other = (
            model(input_ids=ids[:, :-1], position_ids=positions[None], attention_mask=mask).logits
            for positions in (torch.arange(length), perturbed)
        )
    _, clm, kl = objective(standard, other, ids[:, 1:], torch.ones(1, length), torch.tensor([view.split]), 1.0)
    return clm.item(), kl.item()


@pytest.mark.parametrize("execution", ["full", "shared-prefix"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_tiny_models_at_tp2_cp2_pp2(family, execution, ranks, request):
    folder = request.getfixturevalue(f"tiny_{family}")
    windows = np.random.default_rng(0).integers(0, VOCABULARY, (1, LENGTH + 1))
    views = [skip_view(12, 9, LENGTH), cyclic_view(8, LENGTH)]
    layout = ParallelLayout(tensor=2, context=2, pipeline=2)
    results = ranks.run(8, probe_on_this_rank, str(folder), windows, views, layout, execution)
    for view, result in zip(views, results[0][0], strict=True):
        clm, kl = reference_losses(folder, windows[0], view)
        assert kl > 0.01
        assert result.clm_loss == pytest.approx(clm, abs=1e-4)
        assert result.kl_loss == pytest.approx(kl, abs=1e-4)
    assert all(other == results[0] for other in results[1:])  # every rank knows the result


@pytest.fixture(scope="module")
def python_window(smollm2) -> np.ndarray:
    """192 + 1 tokens of a long real document."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    source = next(path for path in python_sources() if path.name == "argparse.py")
    return np.array(tokenizer(source.read_text()[:4000])["input_ids"][:193])


LAYOUTS = {
    "tp3": ParallelLayout(tensor=3),
    "cp2": ParallelLayout(context=2),
    "tp3_cp2": ParallelLayout(tensor=3, context=2),
}


@pytest.fixture(scope="module")
def smollm2_reference(smollm2, python_window):
    views = [skip_view(96, 64, 192), cyclic_view(72, 192)]
    return [(view, *reference_losses(smollm2, python_window, view)) for view in views]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_smollm2_agrees_with_transformers(layout, ranks, smollm2, python_window, smollm2_reference):
    degrees = LAYOUTS[layout]
    views = [view for view, _, _ in smollm2_reference]
    window = python_window[None]
    results = ranks.run(degrees.world_size, probe_on_this_rank, str(smollm2), window, views, degrees, "full")[0][0]
    for result, (_, clm, kl) in zip(results, smollm2_reference, strict=True):
        assert kl > 0.05
        assert result.clm_loss == pytest.approx(clm, abs=1e-4)
        assert result.kl_loss == pytest.approx(kl, abs=1e-4)


def test_the_tool_starts_its_own_ranks_and_writes_json(tiny_llama, tmp_path):
    window = np.random.default_rng(1).integers(0, VOCABULARY, LENGTH + 1)
    np.save(tmp_path / "window.npy", window)
    command = [
        sys.executable, "tools/probe_views.py", "--hf", tiny_llama, "--tokens", tmp_path / "window.npy",
        "--kind", "skip", "--split", "12", "--shift", "6", "--tensor-model-parallel-size", "2",
        "--output", tmp_path / "out" / "probe.json",
    ]  # fmt: skip
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "probe.json").read_text())
    clm, kl = reference_losses(tiny_llama, window, View(12, 6))
    assert result["split"] == 12 and result["length"] == LENGTH
    assert result["clm_loss"] == pytest.approx(clm, abs=1e-4)
    assert result["kl_loss"] == pytest.approx(kl, abs=1e-4)
