"""Frozen frequencies through real steps: bitwise the same in spite of gradients, momentum and weight decay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_rpsd.checkpoint.convert import import_hf
from megatron_rpsd.checkpoint.hf_folder import HFFolder
from megatron_rpsd.checkpoint.torch_dist_reader import TorchDistModel
from tests.distributed import training_job
from tests.distributed.corpus import run_arguments, write_corpus
from tests.distributed.test_lengths import scalars
from tests.distributed.test_training import DISTRIBUTED_OPTIMIZER, TP2

FROZEN = [0, 2, 3]
RUNS = {  # two ranks each
    "llama": DISTRIBUTED_OPTIMIZER,  # shards of fp32 parameters are views of them
    "qwen2": [*DISTRIBUTED_OPTIMIZER, "--bf16", "--overlap-grad-reduce", "--overlap-param-gather"],  # biases
    "qwen3": [*TP2, *DISTRIBUTED_OPTIMIZER],  # norms
}


def tensors(checkpoint: Path, hf: Path, iteration: int) -> dict[str, torch.Tensor]:
    folder = HFFolder(hf)
    model = TorchDistModel(checkpoint / f"iter_{iteration:07d}", folder.dimensions())
    return {
        name: tensor
        for mapped in model.tensors()
        for name, tensor in zip(mapped.hf_names, model.hf_tensors(mapped), strict=True)
    }


@pytest.mark.parametrize("family", RUNS)
def test_frozen_rows_stay_bitwise_and_all_else_trains(family, ranks, request, tmp_path):
    hf = request.getfixturevalue(f"tiny_{family}")
    ranks.run(1, import_hf, hf, tmp_path / "checkpoint")
    arguments = [*run_arguments(tmp_path / "checkpoint", write_corpus(tmp_path / "random"), 4), *RUNS[family]]
    arguments += ["--weight-decay", "0.5", "--lr", "1e-2", "--save", str(tmp_path / "run"), "--save-interval", "2"]
    arguments += ["--load", str(tmp_path / "run"), "--tensorboard-dir"]
    ranks.run(2, training_job.train, [*arguments, str(tmp_path / "free"), "--exit-interval", "2"])
    freeze = [str(tmp_path / "frozen"), "--freeze-rope-dims", "0,2-3"]  # its optimizer resumes with momentum
    ranks.run(2, training_job.train, [*arguments, *freeze])

    before, after = (tensors(tmp_path / "run", hf, iteration) for iteration in (2, 4))
    head_dim, half = HFFolder(hf).dimensions().head_dim, HFFolder(hf).dimensions().head_dim // 2
    channels = [*FROZEN, *(index + half for index in FROZEN)]
    others = [channel for channel in range(head_dim) if channel not in channels]
    checked = 0
    for name, old in before.items():
        new = after[name]
        assert torch.isfinite(new).all()
        if any(part in name for part in ("q_proj", "k_proj", "q_norm", "k_norm")):
            old, new = (tensor.reshape(-1, head_dim, *tensor.shape[1:]) for tensor in (old, new))
            assert torch.equal(old[:, channels], new[:, channels]), name
            # Every other row of a weight trains, and some of every head's other biases: bf16 rounds small steps away.
            assert (old != new)[:, others].any(dim=-1).all(), name
            checked += 1
        else:
            assert not torch.equal(old, new), name
    assert checked == {"llama": 8, "qwen2": 16, "qwen3": 16}[family]  # 4 layers; weights, biases or norms


def test_the_gradients_norm_is_that_of_what_trains_and_a_frequency_beyond_the_head_is_refused(
    ranks, tiny_llama, tmp_path
):
    ranks.run(1, import_hf, tiny_llama, tmp_path / "checkpoint")
    arguments = [
        *run_arguments(tmp_path / "checkpoint", write_corpus(tmp_path / "random"), 1),
        "--lr-warmup-iters",
        "0",
    ]
    norms, saved = [], ["--save", str(tmp_path / "run"), "--save-interval", "1"]
    for name, flags in (("free", []), ("frozen", ["--freeze-rope-dims", "0-3", *saved])):
        ranks.run(1, training_job.train, [*arguments, *flags, "--tensorboard-dir", str(tmp_path / name)])
        norms += scalars(tmp_path / name, "grad-norm")
    assert norms[0] > norms[1] > 0
    folder, after = HFFolder(tiny_llama), tensors(tmp_path / "run", tiny_llama, 1)
    for name, tensor in after.items():  # all four frequencies, so the whole of W_q and W_k; without sharding
        assert torch.equal(tensor, folder.tensor(name)) == ("q_proj" in name or "k_proj" in name), name
    ((code, text),) = ranks.run(1, training_job.refused, [*arguments, "--freeze-rope-dims", "4"])
    assert code == 2 and len(text.splitlines()) == 1 and "head_dim / 2 = 4, 0 to 3" in text
