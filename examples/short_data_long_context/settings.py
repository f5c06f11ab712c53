"""What the miniature runs: sizes, seeds, steps."""

from __future__ import annotations

from dataclasses import dataclass

from examples.lab.language import NOISE, Rates
from examples.lab.settings import Phase

END = NOISE[-1]
"""the token that ends a packed sample: the last of the vocabulary, as Megatron's tokenizer without text has it. Bases
and teachers know it as noise: were it the last token of all their documents, they would learn to count up to it."""

SEEDS = (4, 5, 6)
"""fresh ones: the settings below were chosen on seed 3"""
LENGTHS = (512, 1024)
"""of the exams' documents, in tokens"""

SMALL, MIDDLE, LARGE = 100, 10_000, 500_000
"""RoPE bases (theta): one that the short window turns through, the usual one, and one for the long window"""


def _phase(seq_length: int, steps: int, batch_size: int, learning_rate: float) -> Phase:
    """A stretch of training on one rank, a step in one micro-batch; its theta is the run's."""
    return Phase(seq_length, SMALL, steps, batch_size, batch_size, learning_rate)


@dataclass(frozen=True)
class Settings:
    """Everything that the numbers depend on beside the arms."""

    base: Phase = _phase(seq_length=64, steps=1600, batch_size=32, learning_rate=3e-3)
    teacher: Phase = _phase(seq_length=512, steps=500, batch_size=4, learning_rate=1e-3)
    student: Phase = _phase(seq_length=512, steps=300, batch_size=4, learning_rate=2e-3)
    teacher_rates: Rates = Rates(needle=0.08, query=0.08)
    """of the teacher's long documents; the exams have the same density of needles"""
    sample_rates: Rates = Rates(needle=0.20, query=0.15)
    """of the students' short samples. The denser they are, the more of their keys recur in other samples of the window,
    which is where a teacher reads across borders."""
    shortest_sample: int = 32
    longest_sample: int = 64
    """tokens, BOS and END included"""
    exam_documents: int = 60
    """at every length, with ten queries each"""
    base_exam_documents: int = 200
    """of the bases' own window, with three queries each"""
    trace_sequences: int = 16
    """random chunks that a trace is a mean over"""
