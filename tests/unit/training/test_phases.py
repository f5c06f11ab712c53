"""Which phase's forward step reads a micro-batch, in training and in evaluation, and what is written down of it."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest
import torch

from megatron_rpsd.positions import parse_phases
from megatron_rpsd.training.phases import PhasedForwardStep, describe_phases, follow_checkpoint_phases

SCHEDULE = parse_phases("short:theta=100,seq=4,samples=8;long:theta=5000,seq=8")


class Reader:
    """Stands for a phase's forward step: keeps what it is given."""

    def __init__(self) -> None:
        self.read_samples = []

    def read(self, sample, model):
        self.read_samples.append(sample)
        return self


def phased(trained: int) -> tuple[PhasedForwardStep, list]:
    entered = []
    return PhasedForwardStep(
        SCHEDULE, [Reader(), Reader()], lambda phase: entered.append(phase.name), lambda: trained
    ), entered


def batch(*indices: int) -> dict[str, torch.Tensor]:
    return {"tokens": torch.arange(8 * len(indices)).view(-1, 8), "sample_index": torch.tensor(indices)}


def test_a_training_micro_batch_goes_to_the_phase_of_its_samples():
    step, entered = phased(0)
    model = SimpleNamespace(training=True)
    for indices, phase in (((0, 1), 0), ((6, 7), 0), ((8, 9), 1), ((500,), 1)):
        assert step(iter([batch(*indices)]), model) is step.steps[phase]
    assert entered == ["short", "short", "long", "long"]
    short, long = step.steps[0].read_samples[1], step.steps[1].read_samples[0]
    assert short["tokens"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert short["sample_index"].tolist() == [12, 13, 14, 15]  # 6 and 7, two sequences each
    assert torch.equal(long["tokens"], batch(8, 9)["tokens"]) and long["sample_index"].tolist() == [8, 9]


@pytest.mark.parametrize("trained, phase", [(0, 0), (4, 0), (8, 0), (9, 1), (100, 1)])
def test_evaluation_reads_as_the_last_trained_sample_was_read(trained, phase):
    step, entered = phased(trained)
    assert step(iter([batch(0)]), SimpleNamespace(training=False)) is step.steps[phase]
    assert entered == []  # what a checkpoint says stays that of training
    assert step.steps[phase].read_samples[0]["tokens"].shape == ((2, 4) if phase == 0 else (1, 8))


def test_the_log_names_every_phase_with_its_first_step():
    line = describe_phases(SCHEDULE, 4)
    assert line == (
        "rope phases: short from step 1: base 100, windows of 4 tokens, 2 of them a sample; "
        "long from step 3: base 5000, windows of 8 tokens"
    )


def test_a_resumed_run_goes_on_with_its_checkpoints_phases():
    saved = argparse.Namespace(rope_phases=SCHEDULE.describe(), consumed_train_samples=9)
    args = argparse.Namespace(rope_phases=None)
    follow_checkpoint_phases(args, saved)
    assert args.rope_phases == SCHEDULE.describe()
    args.rope_phases = "short:theta=100,seq=4,samples=4;long:theta=5000,seq=8"
    with pytest.raises(ValueError, match="has read 9 samples as short:theta=100"):
        follow_checkpoint_phases(args, saved)
    with pytest.raises(ValueError, match="has read 9 samples without phases.*--pretrained-checkpoint"):
        follow_checkpoint_phases(args, argparse.Namespace(consumed_train_samples=9))
    follow_checkpoint_phases(args, argparse.Namespace(consumed_train_samples=0))  # an imported model
