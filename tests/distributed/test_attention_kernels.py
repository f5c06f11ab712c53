"""Attention by Transformer Engine's stand-in equals the ordinary one over ranks and in the model."""

from __future__ import annotations

import pytest
import torch

from megatron_rpsd.positions import View
from tests.distributed import attention_job, jobs, training_job
from tests.distributed.models import LENGTH, samples
from tests.transformer_engine_stand_in import DotProductAttention

SAMPLE = samples(4, masked=False)
VIEWS = [View(16, shift) for shift in (1, 9, 17, 32)]
CP2, TP2 = ["--context-parallel-size", "2"], ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
SELECTIVE = ["--recompute-granularity", "selective", "--recompute-modules", "core_attn"]


@pytest.mark.parametrize("start", [None, 0, 8])
def test_two_ranks_equal_view_attention(start, ranks):
    for worst, calls in ranks.run(2, attention_job.differences, start):
        assert worst < 1e-12
        masks = {mask for _, _, mask, _ in calls}
        if start:
            assert "causal_bottom_right" in masks
        else:
            assert calls == [((8, 2 if start is None else 4),) * 2 + ("causal", True)]


@pytest.mark.parametrize(
    "start, flags, world_size", [(0, CP2 + TP2, 4), (16, CP2 + SELECTIVE, 2)], ids=["full", "prefix"]
)
def test_a_step_of_the_model_is_the_same(start, flags, world_size, ranks, tiny_qwen3):
    given = tiny_qwen3, ["--objective", "rpsd", *flags], SAMPLE, VIEWS, 2, start
    expected_losses, expected = ranks.run(world_size, jobs.step, *given)[0]
    engine = [*given[1], "--attention-kernel", "te"]
    (losses, gradients), calls = ranks.run(
        world_size, attention_job.step_by_transformer_engine, given[0], engine, *given[2:]
    )[0]
    assert calls and all(training for *_, training in calls)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for name, value in expected.items():
        assert (gradients[name] - value).norm() < 1e-5 * value.norm(), name


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--attention-kernel", "flash"], "--attention-kernel flash needs a GPU"),
        (["--fp8-format", "hybrid"], "--fp8-format hybrid needs a GPU"),
    ],
)
def test_the_entry_refuses_with_one_line_and_exit_code_2(flags, said, ranks):
    words = "--device cpu --num-layers 2 --hidden-size 32 --num-attention-heads 4 --vocab-size 97 --mock-data".split()
    words += ["--seq-length", str(LENGTH), "--max-position-embeddings", "64", "--micro-batch-size", "1", *flags]
    code, errors = ranks.run(1, training_job.refused, words)[0]
    assert code == 2 and said in errors and len(errors.splitlines()) == 1


def test_torch_keeps_the_stand_ins_extra_state_out(ranks):
    """What `attention.transformer_engine` avoids: registered, the module would add a key that no checkpoint has."""
    module = torch.nn.Module()
    module.engine = DotProductAttention(4, 8, 2, layer_number=1)
    assert list(module.state_dict()) == ["engine._extra_state"]
