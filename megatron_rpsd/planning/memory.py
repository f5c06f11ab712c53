"""Memory of the fullest rank of a layout, itemised: at the loss, or in the first layer's backward pass.

Two moments can be the peak of a step. At the *loss* (last pipeline stage) all layers' saved tensors are there, beside
the fused loss's chunk, its gradients and the output weight's fp32 gradient. In a *backward* pass all layers' saved
tensors are there (under recomputation: the layers' inputs, and one layer whole), beside what that layer's backward
needs. Stage i of a 1F1B pipeline holds PP - i micro-batches at once; all are taken to have the worst split.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from megatron_rpsd.checkpoint.layouts import ModelDimensions
from megatron_rpsd.loss.chunks import Workspace, plan_chunks
from megatron_rpsd.parallel import VocabularyShard
from megatron_rpsd.planning.activations import (
    TE,
    Software,
    backward_extra,
    core_attention,
    layer,
    selective_layer,
)
from megatron_rpsd.planning.gpus import GPU, Assumptions
from megatron_rpsd.planning.layouts import Layout, Workload, parameters_of_stage
from megatron_rpsd.planning.rank_shapes import RankShape, rank_shape, suffix_starts

_MOMENTS = {"fp32": 8, "bf16": 4}  # both of Adam's, bytes a parameter


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at a step's peak.

    Attributes:
        items: by what holds them; they add up to `total`.
        stage: the pipeline stage of that rank.
        suffix_start: the split at which it is largest; None for one view.
        moment: loss or backward.
        parameters: that the rank holds.
    """

    items: dict[str, int]
    stage: int
    suffix_start: int | None
    moment: str
    parameters: int

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.items.values())


def static_items(dims: ModelDimensions, layout: Layout, work: Workload, stage: int, software: Software = TE) -> dict:
    """Weights, gradients and optimizer states of a rank: those lie there the whole step.

    Gradients are summed in fp32. The optimizer's fp32 weights (beside 16-bit ones) and its moments are shared out over
    DP x CP ranks by the distributed optimizer.
    """
    parameters = parameters_of_stage(dims, layout, stage)
    main = 4 if software.element < 4 else 0
    return {
        "weights": parameters * software.element,
        "gradients": parameters * 4,
        "optimizer states": -(-parameters * (main + _MOMENTS[work.optimizer_dtype]) // (layout.dp * layout.cp)),
    }


def peak_memory(dims: ModelDimensions, layout: Layout, work: Workload, gpu: GPU, assumptions: Assumptions) -> Memory:
    """The fullest rank's, over pipeline stages, splits and moments, with what is kept back on that GPU."""
    found = []
    for stage in {0, layout.pp - 1}:
        static = static_items(dims, layout, work, stage)
        parameters = parameters_of_stage(dims, layout, stage)
        for start in suffix_starts(layout, work):
            for moment, dynamic in dynamic_items(dims, layout, work, stage, start).items():
                lost = {"fragmentation": int(assumptions.fragmentation * sum(dynamic.values()))}
                items = {**static, **dynamic, **lost, "reserved": assumptions.reserved_bytes}
                found.append(Memory(items, stage, start, moment, parameters))
    return max(found, key=lambda memory: memory.total)


def dynamic_items(
    dims: ModelDimensions, layout: Layout, work: Workload, stage: int, start: int | None, software: Software = TE
) -> dict[str, dict[str, int]]:
    """What a micro-batch brings, by moment (`loss` on the last stage, `backward`) and item."""
    rank = rank_shape(dims, layout, work, start)
    micro_batches = work.global_batch_size // layout.dp
    in_flight = min(layout.pp - stage, micro_batches)
    last = stage == layout.pp - 1
    kept, again = _layers(rank, dims, layout, in_flight, software)
    kept["rotary tables"] = 2 * 4 * rank.pair * (dims.head_dim // 2) * in_flight  # cos and sin in fp32
    extra = backward_extra(rank, dims, software) + _weight_gradient(rank, software)
    # When the last layer's backward pass begins, the output weight's gradient has been added and is gone; but where the
    # weight is the embedding, too, autograd keeps a zero in its place until the embedding's gradient comes, at the end.
    waiting = dims.tied and layout.pp == 1
    again["tied weight's gradient"] = waiting * rank.vocabulary * rank.hidden * software.element
    backward = {"backward": {**kept, **again, "backward pass of a layer": extra}}
    return {"loss": {**kept, **_loss(rank, dims, work, software)}, **backward} if last else backward


def _layers(rank: RankShape, dims: ModelDimensions, layout: Layout, in_flight: int, software: Software):
    """Items that all layers of the stage keep, and those that one layer brings back for its backward pass."""
    layers = dims.num_layers // layout.pp * in_flight
    whole = layer(rank, dims, software)
    if layout.recompute == "none":
        kept, again = whole, {}
    elif layout.recompute == "selective":
        kept, again = selective_layer(rank, dims, software), core_attention(rank, dims, software)
    else:
        kept, again = {"layer input": whole["layer input"]}, whole  # its output in place of its input, kept already
    cross_rank = "keys and values over CP"
    items = {
        "layers' activations": layers * sum(size for name, size in kept.items() if name != cross_rank),
        cross_rank: layers * kept.get(cross_rank, 0),
    }
    return items, ({"recomputed layer": sum(again.values())} if again else {})


def _weight_gradient(rank: RankShape, software: Software) -> int:
    """Without Transformer Engine a weight's gradient is formed before it is added to the buffer."""
    return 0 if software.transformer_engine else 2 * rank.ffn * rank.hidden * software.element


def _loss(rank: RankShape, dims: ModelDimensions, work: Workload, software: Software) -> dict[str, int]:
    """The fused loss while it runs (`loss.fused_linear`), and the final norm before it."""
    element, h = software.element, rank.hidden
    norm = (1 if software.transformer_engine else 2) * rank.rows * h * element + rank.rows * h * element
    whole = rank.pair * h * element * (rank.tp > 1)  # readings gathered along tensor parallelism
    exchanged = rank.compared * h * element * (rank.cp > 1 and rank.cut)
    gradients = (rank.standard + rank.compared * work.paired) * h * element
    chunk = _chunk_bytes(
        rank.standard, rank.compared if work.paired else 0, rank.vocabulary, dims.vocab_size, work.chunk_bytes, element
    )
    return {
        "final norm": norm,
        "fused loss: hidden states and their gradients": whole + exchanged + gradients,
        "fused loss: output weight's gradient": 4 * rank.vocabulary * h,
        "fused loss: chunk": chunk,
    }


@functools.lru_cache(maxsize=1024)
def _chunk_bytes(standard: int, compared: int, vocabulary: int, vocab_size: int, budget: int, element: int) -> int:
    """A chunk's logits as the loss itself plans them, and one block more that the divergence forms meanwhile."""
    dtype = torch.float32 if element == 4 else torch.bfloat16
    shard = VocabularyShard(vocab_size, 0, vocabulary)  # the first rank's, which has no padding or least
    chunks = plan_chunks(standard, compared, {"view": 1.0}, shard, dtype, budget)
    workspace = Workspace(chunks, torch.empty(shard.columns, 1, dtype=dtype, device="meta"))
    low = workspace.low.nbytes if workspace.low_precision else 0
    block = max((chunk.tokens for chunk in chunks if chunk.paired), default=0) * shard.columns * 4
    return workspace.memory.nbytes + low + block
