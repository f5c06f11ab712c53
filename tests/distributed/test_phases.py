"""Runs in phases: what each phase reads, resuming over a border, and the base that a checkpoint exports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_rpsd.checkpoint.convert import export_hf, import_hf
from megatron_rpsd.training.saved_checkpoint import saved_arguments
from tests.distributed import test_packed_runs, training_job
from tests.distributed.corpus import run_arguments, write_corpus
from tests.distributed.test_frozen_dims import tensors
from tests.distributed.test_lengths import NAMES, scalars
from tests.distributed.test_training import DISTRIBUTED_OPTIMIZER, TP2

SHORT, LONG = "short:theta=100,seq=8,samples=12", "long:theta=50000,seq=32"  # 12 samples are three steps
prefix = test_packed_runs.prefix  # short documents, each closed by EOD
FIGURES = [name for name in NAMES if name != "mean length"]


@pytest.fixture(scope="module")
def place(ranks, tiny_llama, tmp_path_factory) -> Path:
    """A folder with the model's checkpoint and two corpora."""
    folder = tmp_path_factory.mktemp("phases")
    ranks.run(1, import_hf, tiny_llama, folder / "checkpoint")
    write_corpus(folder / "random")
    write_corpus(folder / "other", documents=7, tokens=190)
    return folder


def arguments(place: Path, steps: int = 6) -> list[str]:
    whole = run_arguments(place / "checkpoint", place / "random", steps)
    at = whole.index("--seq-length")
    return whole[:at] + whole[at + 2 :]  # the longest phase gives it


def train(ranks, world_size: int, folder: Path, flags: list[str]) -> dict[str, list[float]]:
    ranks.run(world_size, training_job.train, [*flags, "--tensorboard-dir", str(folder)])
    return {name: scalars(folder, name) for name in FIGURES}


def test_a_run_resumed_before_and_behind_a_border_repeats_the_uninterrupted_one(ranks, place, tiny_llama, tmp_path):
    flags = [*arguments(place), *DISTRIBUTED_OPTIMIZER]
    phases = ["--rope-phases", f"{SHORT};{LONG}"]
    once = ["--save", str(tmp_path / "once"), "--save-interval", "6"]
    whole = train(ranks, 2, tmp_path / "whole", [*flags, *phases, *once])
    saved = ["--save", str(tmp_path / "run"), "--save-interval", "1", "--load", str(tmp_path / "run")]
    parts = [train(ranks, 2, tmp_path / "to 2", [*flags, *phases, *saved, "--exit-interval", "2"])]
    parts.append(train(ranks, 2, tmp_path / "to 4", [*flags, *saved, "--exit-interval", "4"]))  # over the border
    parts.append(train(ranks, 2, tmp_path / "to 6", [*flags, *saved]))
    for name, expected in whole.items():
        assert [len(part[name]) for part in parts] == [2, 2, 2]
        assert parts[0][name] + parts[1][name] + parts[2][name] == expected, name
    bases = {step: saved_arguments(tmp_path / "run" / f"iter_{step:07d}").rotary_base for step in range(1, 7)}
    assert list(bases.values()) == [100] * 3 + [50000] * 3  # at the border: of the phase that has just ended
    ranks.run(1, export_at, tmp_path / "run", tiny_llama, tmp_path / "at 3", 3)
    assert json.loads((tmp_path / "at 3" / "config.json").read_text())["rope_theta"] == 100
    resumed, uninterrupted = (tensors(tmp_path / run, tiny_llama, 6) for run in ("run", "once"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted.items())

    # What the first phase is, said in other flags.
    mix = ["--seq-length", "32", "--length-mix", "1:8", "--rotary-base", "100"]
    by_hand = train(ranks, 2, tmp_path / "by hand", [*flags, *mix, "--exit-interval", "3"])
    for name in FIGURES:
        assert by_hand[name] == whole[name][:3], name

    another_past = ["--rope-phases", f"{SHORT.replace('100', '200')};{LONG}"]
    ((code, text), _) = ranks.run(2, training_job.refused, [*flags, *another_past, *saved])
    assert code == 2 and len(text.splitlines()) == 1
    for part in ("--rope-phases", "24 samples", "theta=100"):
        assert part in text


def export_at(checkpoint: Path, reference: Path, output: Path, iteration: int) -> None:
    export_hf(checkpoint, reference, output, iteration=iteration)


def test_a_phase_reads_its_own_data_at_its_own_base(ranks, place, tmp_path):
    still = ["--lr", "0", "--min-lr", "0"]
    phases = ["--rope-phases", f"{SHORT};{LONG},data={place / 'other'}"]
    run = train(ranks, 2, tmp_path / "phases", [*arguments(place), *still, *phases, *TP2])
    alone = run_arguments(place / "checkpoint", place / "other", 3)
    at_base = train(ranks, 2, tmp_path / "alone", [*alone, *still, "--rotary-base", "50000", *TP2])
    assert run["lm loss"][3:] == at_base["lm loss"]
    assert run["mean shift"][3:] != at_base["mean shift"]  # views go by the sample's index in the run
    assert run["lm loss"][:3] != at_base["lm loss"]


def test_phases_meet_a_teacher_and_cut_documents(ranks, place, prefix, tmp_path):
    """The teacher is the student at its own base: it teaches where a phase has another base, and nothing else."""
    packed = ["--packing", "document-mask", "--data-path", str(prefix), "--lr", "0", "--min-lr", "0", *TP2]
    taught = ["--objective", "distill", "--teacher-checkpoint", str(place / "checkpoint")]
    names = ("lm loss", "teacher kl", "documents per sequence", "masked border share")
    runs = {}
    for name, steps, flags in (
        ("phases", 5, ["--rope-phases", f"{SHORT};long:theta=10000,seq=32"]),
        ("first", 3, ["--seq-length", "32", "--length-mix", "1:8", "--rotary-base", "100"]),
    ):
        log = ["--tensorboard-dir", str(tmp_path / name)]
        ranks.run(2, training_job.train, [*arguments(place, 5), *packed, *taught, *flags, *log,
                                          "--exit-interval", str(steps)])  # fmt: skip
        runs[name] = {key: scalars(tmp_path / name, key) for key in names}
    for key in names:
        assert runs["phases"][key][:3] == runs["first"][key], key
    taught_by = runs["phases"]["teacher kl"]
    assert min(taught_by[:3]) > 0.01 and taught_by[3:] == [0, 0]
    borders = runs["phases"]["masked border share"]
    assert min(borders) > 0 and len(set(borders)) > 2


REFUSED = {
    "border": (f"{SHORT.replace('12', '10')};{LONG}", ["samples=10", "10 % --global-batch-size 4 = 2", "8", "12"]),
    "data": (f"{SHORT};{LONG},data=/nowhere/corpus", ["long", "/nowhere/corpus.bin"]),
    "key": (f"{SHORT},steps=3;{LONG}", ["short", "no key steps", "theta, seq, samples, data"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_phases_that_cannot_run_are_one_line_and_exit_code_2(case, ranks, place):
    phases, parts = REFUSED[case]
    ((code, text),) = ranks.run(1, training_job.refused, [*arguments(place), "--rope-phases", phases])
    assert code == 2 and len(text.splitlines()) == 1, text
    for part in ("--rope-phases", *parts):
        assert part in text, text


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--seq-length", "64"], "--seq-length 64"),
        (["--length-mix", "1:8"], "--length-mix"),
        (["--rotary-base", "7"], "--rotary-base 7"),
        (["--dataloader-type", "cyclic"], "--dataloader-type cyclic"),
        (["--rampup-batch-size", "2", "2", "8"], "--rampup-batch-size"),
    ],
)
def test_flags_that_contradict_phases_are_refused(flags, part, ranks, place):
    given = [*arguments(place), "--rope-phases", f"{SHORT};{LONG}", *flags]
    ((code, text),) = ranks.run(1, training_job.refused, given)
    assert code == 2 and len(text.splitlines()) == 1 and part in text, text
