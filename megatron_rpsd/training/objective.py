"""The paper's objective on this rank's share of a micro-batch.

    L = L_CLM(standard view) + weight x KL(perturbed || standard, detached), mean over the suffix      arXiv 2604.14339

Each rank returns sums over its own tokens; Megatron's per-token loss adds them over context- and data-parallel ranks
and micro-batches and divides once by the number of kept tokens. The KL's own mean over the M kept suffix tokens of a
sequence is therefore written as the factor weight x N / M on its sum, with N and M counted over the whole sequence: a
rank's local counts (Megatron-LM issue 7452, finding 9) never enter. `loss.definitions.objective` is the definition.

Logits are never whole: the loss takes hidden states and the output layer's weight (`loss.fused_linear`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_rpsd.loss import DEFAULT_CHUNK_BYTES, Divergence, fused_linear_loss, unfused_linear_loss
from megatron_rpsd.parallel import ViewLayout, VocabularyShard, exchange_suffix
from megatron_rpsd.training.batch import TWO_VIEWS, ViewBatch
from megatron_rpsd.training.distillation import Distillation, KeptReading, TeacherReading
from megatron_rpsd.training.longce import LongCE

LOSS_IMPLEMENTATIONS = ("fused", "unfused")


@dataclass(frozen=True)
class LossOptions:
    """How the loss is computed.

    Attributes:
        implementation: fused with the output layer, a chunk of tokens at a time, or unfused from whole logits.
        chunk_bytes: memory for a chunk's logits (fused).
        divergence: the perturbed view's from the standard view; unfused knows the reverse KL at temperature 1.
    """

    implementation: str = "fused"
    chunk_bytes: int = DEFAULT_CHUNK_BYTES["cpu"]
    divergence: Divergence = Divergence()


@dataclass(frozen=True)
class Objective:
    """What a run optimises.

    Attributes:
        name: standard, pose, rpsd or hard-label.
        kl_weight: weight of the KL (rpsd), or of the second view's CLM (hard-label).
        vocab_size: real vocabulary; columns beyond it are padding.
        options: how it is computed.
        longce: weighs the CLM's tokens, where the batch knows their short losses.
        distillation: weighs the CLM and a teacher's divergence on the standard view, where there is a teacher.
    """

    name: str
    kl_weight: float
    vocab_size: int
    options: LossOptions = LossOptions()
    longce: LongCE | None = None
    distillation: Distillation | None = None

    def sums(
        self,
        hidden_states: Tensor,
        output_weight: Tensor,
        batch: ViewBatch,
        readings: Callable[[Tensor], tuple[Tensor, Tensor]],
        shard: VocabularyShard,
        logit_scale: float,
        teacher: TeacherReading | KeptReading | None = None,
    ) -> Tensor:
        """Local sums of a micro-batch, fp32 [5]: the objective (differentiable), and for the log CLM, the second
        view's plain loss, LongCE's weights, and the plain divergence from the teacher.

        Args:
            hidden_states: this rank's hidden states as the last layer leaves them.
            output_weight: [v/tp, h].
            readings: hidden states -> standard [L/cp x b, h] and perturbed [m x b, h]; see `fused_linear_loss`.
            teacher: its reading of the same standard tokens.
        """
        labels, mask = batch.labels.T.flatten(), batch.loss_mask.T.flatten()
        repeated = batch.repeated()
        view_mask = batch.suffix_mask.T[repeated]  # [m, b]
        view_weights = batch.view_weights(self.kl_weight).flatten()
        reweigh = None if batch.short_loss is None else functools.partial(self._longce_weights, batch)
        if self.name == "hard-label":  # a second CLM: the perturbed tokens queue up behind the standard ones
            again = batch.labels.T[repeated].flatten()

            def one_queue(hidden: Tensor) -> tuple[Tensor, Tensor]:
                queue = torch.cat(readings(hidden))
                return queue, queue[:0]

            loss = self._compute()(
                hidden_states, output_weight, torch.cat([labels, again]), torch.cat([mask, view_weights]), shard,
                split_readings=one_queue, logit_scale=logit_scale,
            )  # fmt: skip
            clm, view = loss.clm.split([len(labels), len(again)])
        else:
            loss = self._compute()(
                hidden_states, output_weight, labels, mask * self._clm_weight(), shard,
                split_readings=readings, view_weights=view_weights, reweigh=reweigh, logit_scale=logit_scale,
                **self._compared(teacher, mask),
            )  # fmt: skip
            clm, view = loss.clm, loss.view
        weights = mask if reweigh is None else mask * reweigh(clm, slice(None))
        distilled = clm.new_zeros(()) if teacher is None else (loss.teacher * mask).sum()
        plain = (clm * mask).sum(), (view * view_mask.flatten()).sum()
        return torch.stack([loss.total, *plain, weights.sum(), distilled])

    def _clm_weight(self) -> float:
        return 1.0 if self.distillation is None else self.distillation.ce_weight

    def _compared(self, teacher: TeacherReading | KeptReading | None, mask: Tensor) -> dict:
        if teacher is None:
            return {}
        return {"teacher": teacher.compared(self.distillation.divergence, self.distillation.kl_weight * mask)}

    def _longce_weights(self, batch: ViewBatch, clm: Tensor, rows: slice) -> Tensor:
        return self.longce.weights(batch.short_loss.T.flatten()[rows], clm)

    def _compute(self) -> Callable:
        if self.options.implementation == "unfused":
            return unfused_linear_loss
        return functools.partial(
            fused_linear_loss, divergence=self.options.divergence, chunk_bytes=self.options.chunk_bytes
        )

    def output_processor(
        self,
        *,
        hidden_states: Tensor,
        context: ViewBatch,
        teacher: TeacherReading | KeptReading | None = None,
        **given,
    ) -> Tensor:
        """GPTModel's `output_processor` hook on the last pipeline stage: hidden states in, `sums` out."""
        layer = OutputLayer.of_hook(self.vocab_size, context, **given)
        return self.sums(hidden_states, layer.weight, context, layer.readings, layer.shard, layer.logit_scale, teacher)

    def token_losses(self, *, hidden_states: Tensor, context: ViewBatch, **given) -> Tensor:
        """The same hook for a single view's losses, token by token, [L/cp, b] in fp32."""
        layer = OutputLayer.of_hook(self.vocab_size, context, **given)
        loss = self._compute()(
            hidden_states, layer.weight, context.labels.T.flatten(), context.loss_mask.T.flatten(), layer.shard,
            split_readings=layer.readings, logit_scale=layer.logit_scale,
        )  # fmt: skip
        return loss.clm.view(-1, len(context.labels))

    def loss(
        self, batch: ViewBatch, training: bool, sums: Tensor, distilled: bool = False
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Megatron's loss function: local sum, local count of kept tokens, and what is logged as [sum, count] pairs.

        `distilled`: a teacher read this micro-batch.
        """
        tokens = batch.loss_mask.sum()
        logged = {"lm loss": torch.stack([sums[1].detach(), tokens])}
        if distilled:
            logged["teacher kl"] = torch.stack([sums[4].detach(), tokens])
        if batch.short_loss is not None:
            logged["longce weight"] = torch.stack([sums[3].detach(), tokens])
        if self.name in TWO_VIEWS:
            suffix_tokens = batch.suffix_mask.sum() * (batch.layout.suffix_start is not None)
            # A positive count keeps a step without any kept suffix token at 0 rather than 0 / 0.
            logged["view kl" if self.name == "rpsd" else "view lm loss"] = torch.stack(
                [sums[2].detach(), suffix_tokens.clamp(min=1e-20)]
            )
        if self.name != "standard" and training:  # Megatron's evaluation would print their perplexity
            samples = torch.tensor(float(len(batch.splits)), device=sums.device)
            logged["mean split"] = torch.stack([batch.splits.sum().float(), samples])
            logged["mean shift"] = torch.stack([batch.shifts.abs().sum().float(), samples])
        return sums[0].clone(), tokens.to(torch.int), logged  # the pipeline schedule refuses a view of `sums`


@dataclass(frozen=True)
class OutputLayer:
    """What turns the last layer's hidden states into a loss: this rank's rows, and how both readings are got."""

    weight: Tensor
    shard: VocabularyShard
    readings: Callable[[Tensor], tuple[Tensor, Tensor]]
    logit_scale: float

    @classmethod
    def of_hook(
        cls, vocab_size: int, batch: ViewBatch, *, output_layer, output_weight, scale_logits, config, pg_collection, **_
    ) -> OutputLayer:
        """Out of what GPTModel hands to its hook; `output_weight` is the tied embedding's, or None."""
        weight = output_layer.weight if output_weight is None else output_weight
        readings = functools.partial(
            _readings,
            layout=batch.layout,
            tp_group=pg_collection.tp,
            cp_group=pg_collection.cp,
            sequence_parallel=config.sequence_parallel,
        )
        shard = VocabularyShard.of_rank(vocab_size, weight.shape[0], pg_collection.tp)
        return cls(weight, shard, readings, float(scale_logits(torch.ones(()))))


def _readings(
    hidden_states: Tensor,
    layout: ViewLayout,
    tp_group: dist.ProcessGroup,
    cp_group: dist.ProcessGroup,
    sequence_parallel: bool,
) -> tuple[Tensor, Tensor]:
    """Hidden states of the last layer -> both readings of this rank's standard tokens, [L/cp x b, h] and [m x b, h].

    Args:
        hidden_states: [(2L-t)/cp, b, h], or its tensor-parallel share of tokens under sequence parallelism.
    """
    if sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=True, group=tp_group
        )
    else:
        hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=tp_group)
    standard, suffix = hidden_states.split([layout.local_standard, layout.local_suffix])
    if layout.local_suffix:
        suffix = exchange_suffix(suffix, layout, cp_group)  # hidden states: far fewer bytes than logits
    return standard.flatten(0, 1), suffix.flatten(0, 1)
