"""The arms: one table of what each adds to the common command line, and the command lines themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from examples.lab.settings import MODEL_FLAGS, MODEL_SWITCHES, Phase


@dataclass(frozen=True)
class Arm:
    """One way to adapt.

    Attributes:
        title: in figures and tables.
        flags: what it adds to the common command line.
        time_of: the arm whose training time it gets, in as many steps as fit; None: the common number of steps.
        same_as: the arm with the same flags and the common number of steps, by which its own steps are counted.
    """

    title: str
    flags: tuple[str, ...]
    time_of: str | None = None
    same_as: str | None = None


def _objective(name: str, perturbation: str | None = None, *more: str) -> tuple[str, ...]:
    return ("--objective", name, *(("--rpsd-perturbation", perturbation) if perturbation else ()), *more)


# The short context is an eighth of the window and its stride a quarter of that, as 4,096 and 1,024 are at 32,768.
LONGCE = ("--longce", "--longce-context", "64", "--longce-stride", "16")

ARMS: dict[str, Arm] = {
    "standard": Arm("Standard", _objective("standard")),
    "pose": Arm("PoSE", _objective("pose", "skip")),
    "rpsd-skip": Arm("RPSD skip", _objective("rpsd", "skip")),
    "rpsd-cyclic": Arm("RPSD cyclic", _objective("rpsd", "cyclic")),
    "hard-label": Arm("Hard label", _objective("hard-label", "skip")),
    "standard-equal-time": Arm("Standard, equal time", _objective("standard"), "rpsd-skip", "standard"),
    "pose-equal-time": Arm("PoSE, equal time", _objective("pose", "skip"), "rpsd-skip", "pose"),
    "rpsd-nope": Arm("RPSD NoPE", _objective("rpsd", "nope")),
    "rpsd-chunk-permutation": Arm("RPSD chunk permutation", _objective("rpsd", "chunk-permutation")),
    "longce": Arm("LongCE", _objective("standard", None, *LONGCE)),
    "rpsd-longce": Arm("RPSD skip + LongCE", _objective("rpsd", "skip", *LONGCE)),
}
MAIN_ARMS = (
    "standard",
    "pose",
    "rpsd-skip",
    "rpsd-cyclic",
    "hard-label",
    "standard-equal-time",
    "pose-equal-time",
)


def needed_arms(names: tuple[str, ...]) -> tuple[str, ...]:
    """The named arms with those that they are measured by, in the table's order."""
    wanted = set(names)
    for name in names:
        wanted |= {other for other in (ARMS[name].time_of, ARMS[name].same_as) if other}
    return tuple(name for name in ARMS if name in wanted)


def equal_time_steps(phase: Phase, seconds_a_step: float, own_seconds_a_step: float, most_factor: int) -> int:
    """Steps that fit the time of another arm's `phase.steps` steps, in whole log intervals.

    At least `phase.steps` (no arm gets fewer) and at most `most_factor` times that (what the stream holds).
    """
    fitting = int(phase.steps * seconds_a_step / own_seconds_a_step) // phase.log_interval * phase.log_interval
    return max(phase.steps, min(most_factor * phase.steps, fitting))


def common_flags(phase: Phase, steps: int, seed: int, prefix: Path, cache: Path, save: Path) -> dict[str, object]:
    """What every run of a lab says of its data, schedule and checkpoint."""
    return {
        "--tokenizer-type": "NullTokenizer",
        "--make-vocab-size-divisible-by": 1,
        "--data-path": prefix,
        "--data-cache-path": cache,
        "--split": "100,0,0",
        "--seq-length": phase.seq_length,
        "--rotary-base": phase.rotary_base,
        "--micro-batch-size": phase.micro_batch_size,
        "--global-batch-size": phase.global_batch_size,
        "--train-iters": steps,
        "--seed": 1 + seed,
        "--lr": phase.learning_rate,
        "--min-lr": f"{phase.learning_rate / 10:g}",
        "--lr-decay-style": "cosine",
        "--lr-warmup-iters": phase.warmup_steps,
        "--weight-decay": 0.01,
        "--adam-beta1": 0.9,
        "--adam-beta2": 0.95,
        "--clip-grad": 1.0,
        "--eval-iters": 0,
        "--log-interval": phase.log_interval,
        "--num-workers": 0,
        "--save": save,
        "--save-interval": steps,
        # torch_dist starts an interpreter of its own for every save, which takes longer than a third of an arm.
        "--ckpt-format": "torch",
    }


def words(flags: Mapping[str, object]) -> list[str]:
    """Flags and values as a command line."""
    return [str(word) for pair in flags.items() for word in pair]


LOOP_SWITCHES = ("--no-save-optim", "--no-save-rng")
"""what the loop leaves out: nothing resumes from the middle of a run of seconds"""


def base_arguments(phase: Phase, seed: int, data: Path, save: Path) -> list[str]:
    """Command line of a base model's pre-training."""
    return [
        "--device", "cpu", *words(MODEL_FLAGS), *MODEL_SWITCHES, "--max-position-embeddings", str(phase.seq_length),
        *words(common_flags(phase, phase.steps, seed, data / "base", data / "cache", save)), *LOOP_SWITCHES,
        "--objective", "standard",
    ]  # fmt: skip


def arm_arguments(arm: Arm, phase: Phase, steps: int, seed: int, base: Path, data: Path, save: Path) -> list[str]:
    """Command line of an arm's adaptation."""
    return [
        "--device", "cpu", "--use-checkpoint-args", "--pretrained-checkpoint", str(base),
        *words(common_flags(phase, steps, seed, data / "adapt", data / "cache", save)), *LOOP_SWITCHES,
        "--rpsd-split-granule", "1", *arm.flags,
    ]  # fmt: skip
