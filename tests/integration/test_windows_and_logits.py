"""What a report says of a model, against transformers on the same folder: logits of a checkpoint, losses of windows."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_rpsd.evaluation.logits import compare_logits, megatron_logits, transformers_logits
from megatron_rpsd.evaluation.windows import probe_windows
from megatron_rpsd.positions import View, skip_view

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY, LENGTH = 93, 24


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama whose vocabulary needs padding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama") / "hf"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, size=(3, LENGTH + 1))


def test_a_checkpoints_logits_equal_transformers(llama: Path, windows: np.ndarray, tmp_path: Path) -> None:
    command = [sys.executable, "tools/convert_checkpoint.py", "import", "--hf", str(llama), "--output"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, str(tmp_path / "checkpoint")], cwd=ROOT, env=environment, check=True, capture_output=True)
    tokens = windows[0, :-1]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        ours = pool.submit(megatron_logits, str(tmp_path / "checkpoint"), str(llama), tokens).result()
    theirs = transformers_logits(llama, tokens)
    assert ours.shape == theirs.shape == (LENGTH, VOCABULARY) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert compare_logits(ours, theirs).agreement == 1.0


def test_windows_keep_their_order_and_equal_transformers(llama: Path, windows: np.ndarray) -> None:
    views = [skip_view(10, 7, LENGTH), View.identity()]
    results = list(probe_windows(str(llama), windows, views, processes=2, execution="full"))
    model = LlamaForCausalLM.from_pretrained(llama).double()
    for window, result in zip(windows, results, strict=True):
        ids = torch.as_tensor(window)[None]
        with torch.no_grad():
            standard = model(ids[:, :-1]).logits[0].log_softmax(-1)
            shifted = model(ids[:, :-1], position_ids=views[0].position_ids(LENGTH)[None]).logits[0].log_softmax(-1)
        clm = -standard.gather(1, ids[0, 1:, None]).mean().item()
        kl = (shifted.exp() * (shifted - standard)).sum(-1)[10:].mean().item()
        assert [view.clm_loss for view in result] == pytest.approx([clm, clm], rel=1e-4)
        assert result[0].kl_loss == pytest.approx(kl, rel=1e-3)
        assert kl > 1e-3 and abs(result[1].kl_loss) < 1e-6


def test_comparing_logits_by_hand() -> None:
    ours = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], dtype=np.float32)
    theirs = np.array([[1.0, 2.5, 3.0], [1.0, 2.0, -4.0]], dtype=np.float32)
    compared = compare_logits(ours, theirs)
    assert (compared.max_difference, compared.largest_logit, compared.agreement) == (5.0, 4.0, 0.5)
    assert np.isnan(compare_logits(ours * np.nan, theirs).max_difference)
