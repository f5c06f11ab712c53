"""The comparison's further arms through the real model: against transformers in fp64 with the same position_ids."""

from __future__ import annotations

import re

import pytest

from examples.arms.run import ARMS, read_flags
from examples.arms.run import FOLDER as ARM_FOLDER
from megatron_rpsd.checkpoint.convert import import_hf
from megatron_rpsd.positions import POSE_CHUNKS, View, ViewSampler, nope_view
from tests.chat_tokenizer import assistant, save_chat_tokenizer, user, write_chats
from tests.distributed import jobs, training_job
from tests.distributed.corpus import run_arguments, write_corpus
from tests.distributed.models import LENGTH, reference, samples, split_in_every_chunk
from tests.distributed.test_gradients import CP2, TP2, largest_error

WEIGHT = ["--rpsd-kl-weight", "0.7"]


def drawn(kind: str, **options) -> list[View]:
    sampler = ViewSampler(11, kind, LENGTH, **options)
    return [sampler.view(index) for index in range(4)]


CASES = {
    "nope": ("rpsd", [nope_view()] * 4, WEIGHT),
    "chunk_permutation": ("rpsd", drawn("chunk-permutation", permutation_chunks=5), WEIGHT),
    "pose_chunks": ("pose", drawn(POSE_CHUNKS, pose_chunks=3), []),
    "hard_label": ("hard-label", split_in_every_chunk(), WEIGHT),
}
LAYOUTS = {"one": (1, []), "tp2_cp2": (4, TP2 + CP2)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_an_arm_equals_transformers(case, layout, ranks, tiny_llama):
    (objective, views, weight), (world_size, flags) = CASES[case], LAYOUTS[layout]
    sample = samples(len(views), masked=True)
    arguments = ["--objective", objective, *weight, *flags]
    losses, gradients = ranks.run(world_size, jobs.step, tiny_llama, arguments, sample, views)[0]
    expected_losses, expected = reference(tiny_llama, sample, views, objective, 0.7)
    assert losses["clm"] == pytest.approx(expected_losses["clm"], rel=1e-5)
    if objective == "rpsd":
        assert expected_losses["kl"] > 0.01  # the views differ, so the comparison means something
        assert losses["kl"] == pytest.approx(expected_losses["kl"], rel=1e-5)
    _, standard = reference(tiny_llama, sample, views, "standard", 0.7)
    assert largest_error(standard, expected) > 0.05  # what the arm adds is no rounding error
    # fp32 against fp64: an error of a few 1e-6 is what transformers itself shows in fp32.
    assert largest_error(gradients, expected) < 2e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hard_labels_share_the_prefix_too(layout, ranks, tiny_llama):
    world_size, flags = LAYOUTS[layout]
    views, sample = [View(16, shift) for shift in (1, 9, 17, 32)], samples(4, masked=True)
    arguments = ["--objective", "hard-label", *WEIGHT, *flags]
    _, gradients = ranks.run(world_size, jobs.step, tiny_llama, arguments, sample, views, 2, 16)[0]
    _, expected = reference(tiny_llama, sample, views, "hard-label", 0.7)
    assert largest_error(gradients, expected) < 2e-5


@pytest.fixture(scope="module")
def run_of(ranks, tiny_llama, tmp_path_factory):
    """Two steps of an arm through the training entry: the last line that it logs."""
    folder = tmp_path_factory.mktemp("arms")
    ranks.run(1, import_hf, tiny_llama, folder / "checkpoint")
    prefix = write_corpus(folder / "random")
    chats = write_chats(folder / "chats.jsonl", [[user("hi"), assistant("you")]] * 4)
    tokenizer = save_chat_tokenizer(folder / "tokenizer")

    def run(arm: str) -> dict[str, float]:
        arguments = [*run_arguments(folder / "checkpoint", prefix, 2), *CP2, *read_flags(ARM_FOLDER / arm / "args.txt")]
        if "longce" in arm:  # the paper's windows are longer than these sequences
            arguments += ["--longce-context", "10", "--longce-stride", "6"]
        if "sft" in arm:
            arguments += ["--data-path", str(chats), "--tokenizer-type", "HuggingFaceTokenizer"]
            arguments += ["--tokenizer-model", str(tokenizer)]
        output = ranks.run(2, training_job.train, arguments)
        line = next(line for text in output for line in text.splitlines() if re.search(r"iteration +2/ +2", line))
        fields = [part.split(":", 1) for part in line.split("|")]
        return {part[0].strip(): float(part[1]) for part in fields if re.search(r": +[-+\d.E]+ *$", ":".join(part))}

    return run


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_from_its_folder(arm, run_of):
    logged = run_of(arm)
    assert logged["lm loss"] > 0
    assert ("view kl" in logged) == arm.startswith("rpsd")
    assert ("longce weight" in logged) == ("longce" in arm) and logged.get("longce weight", 1) > 0
    assert ("view lm loss" in logged) == (arm == "hard-label")
    if arm in ("rpsd-nope", "rpsd-chunk-permutation"):
        assert logged["mean split"] == 0 and logged["mean shift"] > 0 and logged["view kl"] > 0
    if arm == "rpsd-nope":
        assert logged["mean shift"] == (LENGTH - 1) / 2
