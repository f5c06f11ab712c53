"""What the lab runs: sizes, seeds, steps, and where its files lie."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

RANKS = 2
"""data-parallel ranks of every run, one a core"""
SEEDS = (3, 4, 5)
"""fresh ones: the settings below were chosen on seeds 0, 1 and 2"""
LENGTHS = (512, 1024, 2048)
"""of the exams' documents, in tokens"""


@dataclass(frozen=True)
class Phase:
    """A stretch of training."""

    seq_length: int
    rotary_base: int
    steps: int
    global_batch_size: int
    micro_batch_size: int
    learning_rate: float
    """at its peak; a tenth of it at the end (cosine)"""
    warmup_steps: int = 20
    log_interval: int = 10
    """steps between the points of the curves; the arms' numbers of steps are multiples of it"""


@dataclass(frozen=True)
class Settings:
    """Everything that the numbers depend on beside the arms."""

    base: Phase = Phase(
        seq_length=64, rotary_base=10_000, steps=1600, global_batch_size=32, micro_batch_size=16, learning_rate=3e-3
    )
    # Micro-batches of one window: a step then has two splits rather than one, which gives RPSD .04 at 512.
    adapt: Phase = Phase(
        seq_length=512, rotary_base=500_000, steps=300, global_batch_size=4, micro_batch_size=1, learning_rate=1e-3
    )
    furthest_evidence: int = 64
    """tokens; every query of the adaptation stream asks about evidence at most this far back"""
    exam_documents: int = 60
    """at every length, with ten queries each"""
    base_exam_documents: int = 200
    """of the base's own window, with three queries each"""
    most_steps_factor: int = 3
    """how many times an arm's steps the stream holds, for the arms that get more steps in equal time"""


MODEL_FLAGS: dict[str, object] = {
    "--num-layers": 2,
    "--hidden-size": 64,
    "--ffn-hidden-size": 128,
    "--num-attention-heads": 2,
    "--kv-channels": 32,
    "--position-embedding-type": "rope",
    "--normalization": "RMSNorm",
    "--attention-dropout": 0.0,
    "--hidden-dropout": 0.0,
    "--vocab-size": 226,
    # At Megatron's default of 0.02 so narrow a model does not learn retrieval within the steps given here.
    "--init-method-std": 0.1,
}
MODEL_SWITCHES = ("--swiglu", "--disable-bias-linear")


@dataclass(frozen=True)
class Paths:
    """Files and folders under the output folder."""

    output: Path

    def seed(self, seed: int) -> Path:
        return self.output / f"seed{seed}"

    def data(self, seed: int) -> Path:
        return self.seed(seed) / "data"

    def run(self, seed: int, name: str) -> Path:
        """Folder of the base or of an arm."""
        return self.seed(seed) / name

    def log(self, seed: int, name: str) -> Path:
        return self.seed(seed) / "logs" / f"{name}.log"


def fingerprint(*parts: object) -> str:
    """A short hash of settings: what a finished part was made from."""
    plain = [dataclasses.asdict(part) if dataclasses.is_dataclass(part) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]
