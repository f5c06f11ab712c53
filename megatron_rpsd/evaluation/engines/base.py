"""What every engine offers: answers to samples, and where it can, scores of the gold answers without generation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_rpsd.evaluation.engines.names import FORCING
from megatron_rpsd.evaluation.samples import Sample


@dataclass(frozen=True)
class Completion:
    """What an engine wrote behind one prompt.

    Attributes:
        text: without the prompt and without special tokens.
        tokens: generated, the one that ended the answer not counted; 0 where there was no tokenizer.
        finish: `stop` where the answer ended by itself, `length` where it was cut at the sample's `generated_tokens`.
    """

    text: str
    tokens: int
    finish: str


@dataclass(frozen=True)
class Forced:
    """The gold answer read by the model, every token given all gold tokens before it.

    Attributes:
        nll: nats per answer token, mean.
        greedy_exact: whether greedy decoding would have written exactly this answer.
        tokens: of the answer.
        references: the same of every reference's own tokens: {"reference", "nll", "greedy_exact", "tokens"}.
    """

    nll: float
    greedy_exact: bool
    tokens: int
    references: tuple[dict, ...] = ()


class Engine(ABC):
    """Answers samples. Made cheaply; `load` brings what costs time and memory, after all checks have passed."""

    name: str
    batch_size = 1
    """Samples handed over at a time."""
    fixed_batches = False
    """Whether a resumed run hands over the same batches, answered samples among them, as companions in a batch change
    the last digits of a model's numbers. False where nothing can be promised, or an answer costs money."""

    parallel = 1
    """Requests under way at once."""
    warm_up_tokens = 512
    """Length of the prompt that a run's time is estimated from."""

    @abstractmethod
    def describe(self) -> dict:
        """What the answers depend on, as JSON, for provenance; a resumed run must give the same."""

    def load(self) -> None:  # noqa: B027  (most engines have nothing to bring)
        """Bring the model."""

    @abstractmethod
    def complete(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Completion]]:
        """Answers to all samples, in any order, each as soon as it is there."""

    def force(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Forced]]:
        """Teacher-forced scores of all samples, in any order."""
        raise ValueError(
            f"--teacher-forced: --backend {self.name} gives no probabilities of a given answer; "
            f"{' and '.join(FORCING)} do"
        )

    def close(self) -> None:  # noqa: B027  (most engines hold nothing)
        """Let go of memory, threads and connections."""
