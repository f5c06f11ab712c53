"""How a run is laid out over GPUs: which layouts there are, which of them are forbidden and by what, and their flags.

World size = TP x CP x PP x DP. Ranks are counted in Megatron's order, TP first, then CP, DP and PP, so that
the ranks of a tensor-parallel group are neighbours in a node, and those of a context-parallel group follow.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_rpsd.checkpoint.families import entries
from megatron_rpsd.checkpoint.layouts import ModelDimensions, Replicated, Vocabulary
from megatron_rpsd.planning.gpus import GPUS_PER_NODE

RECOMPUTATIONS = ("none", "selective", "full")
_RECOMPUTE_ARGUMENTS = {
    "none": [],
    "selective": ["--recompute-granularity", "selective", "--recompute-modules", "core_attn"],
    "full": ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"],
}
_VOCABULARY_MULTIPLE = 128  # Megatron's --make-vocab-size-divisible-by
_LONGCE_WINDOW = 4096 + 1024
_FEWEST_SPLITS = 8


@dataclass(frozen=True)
class Workload:
    """What a step has to do, whatever the layout; one sequence a micro-batch.

    Attributes:
        length: L, tokens of a sequence.
        global_batch_size: sequences of a step.
        objective: rpsd (a view pair) or standard (one view).
        execution: shared-prefix, or full (a whole second view).
        longce: the CLM's tokens are weighed by LongCE, which reads windows first and needs one pipeline stage.
        optimizer_dtype: of Adam's moments, fp32 or bf16 (Megatron's precision-aware optimizer); weights in fp32.
        chunk_bytes: memory of the fused loss for a chunk's logits.
    """

    length: int
    global_batch_size: int
    objective: str = "rpsd"
    execution: str = "shared-prefix"
    longce: bool = False
    optimizer_dtype: str = "fp32"
    chunk_bytes: int = 2**30

    @property
    def paired(self) -> bool:
        """Whether a micro-batch holds two views."""
        return self.objective == "rpsd"

    def arguments(self) -> list[str]:
        """Flags of the training entry."""
        words = ["--seq-length", str(self.length), "--micro-batch-size", "1"]
        words += ["--global-batch-size", str(self.global_batch_size), "--bf16", "--objective", self.objective]
        words += ["--rpsd-execution", self.execution] if self.paired else []
        words += ["--longce"] if self.longce else []
        if self.optimizer_dtype == "bf16":
            words += ["--use-precision-aware-optimizer", "--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16"]
        return words


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism, and what is computed again in the backward pass."""

    tp: int
    cp: int
    pp: int
    dp: int
    recompute: str = "none"

    @property
    def gpus(self) -> int:
        """World size."""
        return self.tp * self.cp * self.pp * self.dp

    @property
    def name(self) -> str:
        """For tables."""
        return f"TP{self.tp} CP{self.cp} PP{self.pp} DP{self.dp} {self.recompute}"

    @property
    def tokens_unit(self) -> int:
        """Tokens by which a sequence and a suffix divide: 2 x CP chunks, each shared out by sequence parallelism."""
        return (2 * self.cp if self.cp > 1 else 1) * self.tp

    def granule(self, length: int) -> int:
        """Splits are multiples of it; the training's default (`training.arms.default_granule`)."""
        unit = 2 * self.cp * self.tp
        return min(max(unit, min(16 * unit, length // 32 // unit * unit)), length)

    def arguments(self) -> list[str]:
        """Flags of the training entry."""
        degrees = {"tensor-model": self.tp, "context": self.cp, "pipeline-model": self.pp}
        words = [word for name, size in degrees.items() for word in (f"--{name}-parallel-size", str(size))]
        words += ["--sequence-parallel"] if self.tp > 1 else []
        return [*words, "--use-distributed-optimizer", *_RECOMPUTE_ARGUMENTS[self.recompute]]


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def every_layout(gpus: int) -> Iterator[Layout]:
    """All products TP x CP x PP x DP of `gpus`, without recomputation; allowed or not."""
    for tp in divisors(gpus):
        for cp in divisors(gpus // tp):
            for pp in divisors(gpus // tp // cp):
                yield Layout(tp, cp, pp, gpus // tp // cp // pp)


def refusal(layout: Layout, dims: ModelDimensions, work: Workload) -> str | None:
    """Why the layout cannot run, with the arithmetic; None where it can."""
    tp, cp, pp, dp = layout.tp, layout.cp, layout.pp, layout.dp
    if tp > GPUS_PER_NODE:
        return f"TP {tp} > {GPUS_PER_NODE} GPUs of a node: tensor parallelism needs NVLink"
    for name, count in (
        ("query heads", dims.num_attention_heads),
        ("key/value heads", dims.num_query_groups),
        ("feed-forward width", dims.ffn_hidden_size),
    ):
        if count % tp:
            return f"TP {tp} does not divide {count} {name}: {count} % {tp} = {count % tp}"
    if dims.num_layers % pp:
        return f"PP {pp} does not divide {dims.num_layers} layers: {dims.num_layers} % {pp} = {dims.num_layers % pp}"
    unit, granule = layout.tokens_unit, layout.granule(work.length)
    factors = f"2 x CP x TP = {unit}" if cp > 1 else f"TP = {unit}"
    if work.length % unit:
        return f"{factors} does not divide {work.length} tokens: {work.length} % {unit} = {work.length % unit}"
    if work.paired and work.execution == "shared-prefix" and work.length // granule < _FEWEST_SPLITS:
        splits = work.length // granule
        return f"{work.length} tokens / a granule of {granule} = {splits} splits, fewer than {_FEWEST_SPLITS}"
    if work.global_batch_size % dp:
        rest = work.global_batch_size % dp
        return f"DP {dp} does not divide the global batch: {work.global_batch_size} % {dp} = {rest}"
    if work.longce and pp > 1:
        return f"LongCE reads windows before each micro-batch, so PP must be 1, not {pp}"
    if work.longce and _LONGCE_WINDOW % unit:
        return f"{factors} does not divide LongCE's windows of {_LONGCE_WINDOW} tokens"
    return None


def padded_vocabulary(dims: ModelDimensions, tp: int) -> int:
    """Rows of embedding and output weight over all ranks, as Megatron pads them."""
    multiple = _VOCABULARY_MULTIPLE * tp
    return -(-dims.vocab_size // multiple) * multiple


def parameters_of_stage(dims: ModelDimensions, layout: Layout, stage: int) -> int:
    """Parameters that a rank of pipeline stage `stage` holds, counted tensor by tensor of the conversion's table."""
    return _parameters(dims, layout.tp, layout.pp, stage)


@functools.lru_cache(maxsize=4096)
def _parameters(dims: ModelDimensions, tp: int, pp: int, stage: int) -> int:
    first, last = stage == 0, stage == pp - 1
    per_stage = dims.num_layers // pp
    total = 0
    for mapped in entries(dims):
        name, size = mapped.megatron_name, sum(map(math.prod, mapped.hf_shapes))
        if name.startswith("decoder.layers."):
            held = int(name.split(".")[2]) // per_stage == stage
        elif name.startswith("embedding."):
            held = first or (last and dims.tied)  # the last stage keeps a copy of a tied embedding
        else:
            held = last
        if isinstance(mapped.layout, Vocabulary):
            size = padded_vocabulary(dims, tp) * dims.hidden_size
        total += held * (size if isinstance(mapped.layout, Replicated) else size // tp)
    return total
