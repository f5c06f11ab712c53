"""Time of a step by a roofline: operations, memory traffic and bytes over links, each at an assumed share of the peak.

    step = (micro-batches + PP - 1) x slowest stage's micro-batch + gradients and weights over DP x CP

A stage's micro-batch is the sum of its parts: nothing here overlaps unless `Assumptions.overlap` says so. Operations
are those of the mean split; waiting caused by splits that differ between micro-batches of a pipeline is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rpsd.planning.gpus import DEFAULTS, GPU, GPUS_PER_NODE, Assumptions
from megatron_rpsd.planning.known_models import PlannedModel
from megatron_rpsd.planning.layouts import Layout, Workload, padded_vocabulary, parameters_of_stage
from megatron_rpsd.planning.rank_shapes import mean_suffix

_ELEMENT = 2  # bf16
# Passes over memory, forward and backward together, in elements read or written per token. Norm: read and write each
# way twice over, residual added (h); unfused fp32 rotation of queries and keys; the activation of the feed-forward
# network; the losses' passes over a chunk's logits in fp32.
_NORM_PASSES, _ROTATION_PASSES, _ACTIVATION_PASSES, _LOSS_PASSES = 24, 24, 12, 12
_LONGCE_READS = 5.0  # forward passes over windows of 4,096 + 1,024 tokens every 1,024, over the sequence's tokens


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step and what they consist of.

    Attributes:
        parts: seconds of one rank, by cause; they add up to `total`.
        micro_batches: of a step on a rank.
        model_flops: operations that the step needs, recomputation and LongCE's windows not counted.
        link_bytes: sent by a rank in a step, by link (`nvlink`, `network`).
        mfu: model_flops over what the GPUs could do in the time.
        tokens_per_gpu: of the standard view, a second.
    """

    parts: dict[str, float]
    micro_batches: int
    model_flops: float
    link_bytes: dict[str, float]
    mfu: float
    tokens_per_gpu: float

    @property
    def total(self) -> float:
        """Seconds."""
        return sum(self.parts.values())


def link_of(group: int, stride: int) -> tuple[str, int]:
    """The slowest link of a group of `group` ranks that lie `stride` apart, and how many of them share a node."""
    if group * stride <= GPUS_PER_NODE:
        return "nvlink", group
    return "network", max(1, GPUS_PER_NODE // stride)


class _Links:
    """Counts bytes and seconds of collectives."""

    def __init__(self, gpu: GPU, assumptions: Assumptions) -> None:
        self.gpu, self.assumptions, self.bytes = gpu, assumptions, {"nvlink": 0.0, "network": 0.0}

    def seconds(self, sent: float, group: int, stride: int, times: float = 1.0) -> float:
        """Of `times` collectives in each of which a rank sends `sent` bytes; 0 in a group of one.

        A ring over nodes leaves each node by as many network cards as members of the group stand in it.
        """
        if group == 1 or not times:
            return 0.0
        link, members = link_of(group, stride)
        if link == "nvlink":
            rate, latency = self.gpu.nvlink, self.assumptions.nvlink_latency
        else:
            rate = min(self.gpu.network * members, self.gpu.nvlink)
            latency = self.assumptions.network_latency
        self.bytes[link] += sent * times
        shown = 1.0 - self.assumptions.overlap
        return shown * times * (sent / (rate * self.assumptions.link_efficiency) + latency)


def step_time(
    model: PlannedModel, layout: Layout, work: Workload, gpu: GPU, assumptions: Assumptions = DEFAULTS
) -> StepTime:
    """The step's time on its slowest pipeline stage."""
    micro_batches = work.global_batch_size // layout.dp
    turns = micro_batches + layout.pp - 1
    links = _Links(gpu, assumptions)
    found = []
    for stage in {0, layout.pp - 1}:
        links.bytes = dict.fromkeys(links.bytes, 0.0)
        parts = _micro_batch(model, layout, work, gpu, assumptions, links, stage)
        per_micro_batch = sum(parts.values())
        seconds = {name: value * micro_batches for name, value in parts.items()}
        seconds["pipeline bubble"] = per_micro_batch * (turns - micro_batches)
        moved = {name: size * micro_batches for name, size in links.bytes.items()}
        links.bytes = dict.fromkeys(links.bytes, 0.0)
        seconds["gradients and weights over DP"] = _data_parallel(model, layout, links, stage)
        seconds["optimizer"] = _optimizer(model, layout, gpu, assumptions, stage)
        found.append((sum(seconds.values()), seconds, {name: moved[name] + links.bytes[name] for name in moved}))
    total, parts, moved = max(found, key=lambda entry: entry[0])
    needed = model_flops(model, work) * work.global_batch_size
    tokens = work.global_batch_size * work.length / layout.gpus / total
    return StepTime(parts, micro_batches, needed, moved, needed / (total * layout.gpus * gpu.flops), tokens)


def model_flops(model: PlannedModel, work: Workload) -> float:
    """Forward and backward operations that one sequence needs, at the mean split."""
    linear, attention = mean_suffix(work)
    pairs = work.length * (work.length + 1) / 2
    shape = model.shape
    per_view = 2 * shape.weights_per_token * work.length, shape.flops_per_pair * pairs
    return 3 * (per_view[0] * (1 + linear) + per_view[1] * (1 + attention))


def _micro_batch(
    model: PlannedModel, layout: Layout, work: Workload, gpu: GPU, assumptions: Assumptions, links: _Links, stage: int
) -> dict[str, float]:
    """Seconds of one micro-batch on a rank of `stage`, forward and backward."""
    dims, shape = model.dims, model.shape
    linear, attention = mean_suffix(work)
    tokens, pairs = work.length * (1 + linear), work.length * (work.length + 1) / 2 * (1 + attention)
    shards, share = layout.tp * layout.cp, 1 / layout.pp  # of all layers
    head = dims.hidden_size * dims.vocab_size * (stage == layout.pp - 1)
    layers = (shape.weights_per_token - dims.hidden_size * dims.vocab_size) * share
    again = {"none": (0, 0), "selective": (0, 1), "full": (1, 1)}[layout.recompute]  # forward passes run twice
    windows = _LONGCE_READS * work.length * work.longce
    products = 2 * (tokens * ((3 + again[0]) * layers + 3 * head) + windows * (layers + head)) / shards
    scores = shape.flops_per_pair * share * (pairs * (3 + again[1]) + windows * 5120 / 2) / shards
    per_token = dims.hidden_size * _NORM_PASSES / layout.tp
    per_token += (dims.num_attention_heads + dims.num_query_groups) * dims.head_dim * _ROTATION_PASSES * 2 / layout.tp
    per_token += dims.ffn_hidden_size * _ACTIVATION_PASSES / layout.tp
    traffic = per_token * dims.num_layers * share * tokens / layout.cp * _ELEMENT * (1 + again[0] / 3)
    if head:
        traffic += _LOSS_PASSES * 4 * padded_vocabulary(dims, layout.tp) / layout.tp * tokens / layout.cp
    rate = gpu.flops * assumptions.linear_efficiency
    attention_rate = gpu.flops * (assumptions.attention_efficiency or gpu.attention_efficiency)
    return {
        "matrix products": products / rate,
        "attention": scores / attention_rate,
        "memory-bound": traffic / (gpu.memory_bandwidth * assumptions.memory_efficiency),
        **_communication(model, layout, tokens, links, again),
    }


def _communication(
    model: PlannedModel, layout: Layout, tokens: float, links: _Links, again: tuple[int, int]
) -> dict[str, float]:
    """Of a micro-batch: hidden states over TP, keys and values over CP, hidden states between stages."""
    dims, tp, cp = model.dims, layout.tp, layout.cp
    layers = dims.num_layers / layout.pp
    local = tokens / cp
    # Sequence parallelism, a layer: all-gather and reduce-scatter around both blocks, forward (4) and backward, where
    # the inputs are gathered once more for the weights' gradients (6).
    hidden = local * dims.hidden_size * _ELEMENT * (tp - 1) / tp
    over_tp = links.seconds(hidden, tp, 1, layers * (10 + 4 * again[0]) + 2)
    keys = tokens * 2 * dims.num_query_groups * dims.head_dim / tp * _ELEMENT * (cp - 1) / cp
    over_cp = links.seconds(keys, cp, tp, layers * (2 + again[1]))
    over_pp = links.seconds(local / tp * dims.hidden_size * _ELEMENT, layout.pp, tp * cp * layout.dp, 2)
    return {"TP": over_tp, "CP": over_cp, "PP": over_pp}


def _data_parallel(model: PlannedModel, layout: Layout, links: _Links, stage: int) -> float:
    """Seconds of the distributed optimizer's reduce-scatter of fp32 gradients and all-gather of bf16 weights."""
    group = layout.dp * layout.cp
    parameters = parameters_of_stage(model.dims, layout, stage)
    return links.seconds(parameters * (4 + _ELEMENT) * (group - 1) / group, group, layout.tp)


def _optimizer(model: PlannedModel, layout: Layout, gpu: GPU, assumptions: Assumptions, stage: int) -> float:
    """Seconds of Adam over this rank's share: about 34 bytes a parameter are read or written."""
    share = parameters_of_stage(model.dims, layout, stage) / (layout.dp * layout.cp)
    return 34 * share / (gpu.memory_bandwidth * assumptions.memory_efficiency)
