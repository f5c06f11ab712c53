"""LongCE's weights, loss and gradients against transformers in fp64, reading every token's window by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rpsd.checkpoint.convert import hf_session_arguments
from megatron_rpsd.checkpoint.hf_folder import HFFolder
from megatron_rpsd.checkpoint.model_loading import load_hf_weights
from megatron_rpsd.positions import View
from megatron_rpsd.training.run import forward_step_from_args
from megatron_rpsd.training.session import build_stages, end_session, start_session
from tests.distributed import jobs
from tests.distributed.models import LENGTH, causal_mask, reference, samples
from tests.distributed.test_gradients import CP2, SP, TP2, largest_error

CONTEXT, STRIDE, LARGEST = 10, 6, 2.5  # (32 - 10) / 6 is no whole number of windows
FLAGS = [
    "--longce", "--longce-context", str(CONTEXT), "--longce-stride", str(STRIDE), "--longce-max-weight", str(LARGEST),
]  # fmt: skip
VIEWS = [View(4 * row + 3, 9) for row in range(4)]
LAYOUTS = {"one": (1, []), "tp2_cp2": (4, TP2 + CP2), "tp2_cp2_sp": (4, TP2 + CP2 + SP)}


def token_losses(model, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    logits = model(
        input_ids=tokens,
        position_ids=positions,
        attention_mask=causal_mask(tokens.shape[1]).expand(len(tokens), -1, -1, -1),
    ).logits
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def short_losses(model, sample: dict) -> torch.Tensor:
    """A token at a time: its own window from its first token to itself, and nothing else."""
    tokens, labels = sample["tokens"], sample["labels"]
    losses = torch.full(tokens.shape, torch.nan, dtype=torch.float64)
    with torch.no_grad():
        for token in range(CONTEXT, LENGTH):
            start = (token - CONTEXT) // STRIDE * STRIDE
            losses[:, token] = token_losses(model, tokens[:, start : token + 1], labels[:, start : token + 1])[:, -1]
    return losses


@pytest.fixture(scope="module")
def written_out(tiny_llama):
    """(weights, CLM gradients) of the weighed loss, by the definition."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager").double()
    sample = samples(4, masked=True)
    long = token_losses(model, sample["tokens"], sample["labels"])
    short = short_losses(model, sample)
    weights = (short - long.detach()).exp().clamp(max=LARGEST)
    weights[:, :CONTEXT] = 1
    ((weights * long * sample["loss_mask"]).sum() / sample["loss_mask"].sum()).backward()
    return sample, short, weights, {name: value.grad for name, value in model.named_parameters()}


def _short_job(hf: Path, flags: list[str], sample: dict) -> torch.Tensor:
    folder = HFFolder(hf)
    arguments = [*hf_session_arguments(folder, None), "--device", "cpu", "--seq-length", str(LENGTH), *flags]
    try:
        args, config = start_session(
            [*arguments, "--no-check-for-nan-in-loss-and-grad", "--objective", "standard", *FLAGS]
        )
        (stage,) = build_stages(config, args, wrap_with_ddp=False)
        load_hf_weights([stage], folder, args.tensor_model_parallel_size, _tp_rank(), args.padded_vocab_size)
        return forward_step_from_args(args, config).short_losses(stage, sample)
    finally:
        end_session()


def _tp_rank() -> int:
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_rank()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_equal_the_definition(layout, written_out, ranks, tiny_llama):
    world_size, flags = LAYOUTS[layout]
    sample, short, weights, _ = written_out
    assert (weights == LARGEST).sum() > 3 and (weights < 0.9).sum() > 3 and weights.std() > 0.1
    for found in ranks.run(world_size, _short_job, tiny_llama, flags, sample):
        assert torch.equal(found.isnan(), short.isnan())
        torch.testing.assert_close(found.double(), short, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_equal_the_definition(layout, written_out, ranks, tiny_llama):
    world_size, flags = LAYOUTS[layout]
    sample, _, _, expected = written_out
    losses, gradients = ranks.run(
        world_size, jobs.step, tiny_llama, ["--objective", "standard", *FLAGS, *flags], sample, VIEWS
    )[0]
    plain_losses, plain = reference(tiny_llama, sample, VIEWS, "standard", 0.0)
    assert losses["clm"] == pytest.approx(plain_losses["clm"], rel=1e-5)  # what is logged stays the plain mean
    assert largest_error(plain, expected) > 0.05
    assert largest_error(gradients, expected) < 2e-5


def test_beside_the_views_kl(written_out, ranks, tiny_llama):
    sample, _, _, expected = written_out
    arguments = ["--objective", "rpsd", "--rpsd-kl-weight", "0.7", *FLAGS, *TP2, *CP2]
    _, gradients = ranks.run(4, jobs.step, tiny_llama, arguments, sample, VIEWS)[0]
    _, both = reference(tiny_llama, sample, VIEWS, "rpsd", 0.7)
    _, clm = reference(tiny_llama, sample, VIEWS, "standard", 0.0)
    # LongCE replaces the CLM and leaves the KL as it is.
    assert largest_error(gradients, {name: expected[name] + both[name] - clm[name] for name in both}) < 2e-5
