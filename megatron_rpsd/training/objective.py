"""The paper's objective on this rank's share of a micro-batch.

    L = L_CLM(standard view) + weight x KL(perturbed || standard, detached), mean over the suffix      arXiv 2604.14339

Each rank returns sums over its own tokens; Megatron's per-token loss adds them over context- and data-parallel ranks
and micro-batches and divides once by the number of kept tokens. The KL's own mean over the M kept suffix tokens of a
sequence is therefore written as the factor weight x N / M on its sum, with N and M counted over the whole sequence: a
rank's local counts (Megatron-LM issue 7452, finding 9) never enter. `loss.definitions.objective` is the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_rpsd.loss import vocab_parallel_cross_entropy, vocab_parallel_reverse_kl
from megatron_rpsd.parallel import VocabularyShard, exchange_suffix
from megatron_rpsd.training.batch import ViewBatch


@dataclass(frozen=True)
class Objective:
    """What a run optimises.

    Attributes:
        name: standard, pose or rpsd.
        kl_weight: weight of the KL (rpsd).
        vocab_size: real vocabulary; columns beyond it are padding.
    """

    name: str
    kl_weight: float
    vocab_size: int

    def sums(
        self,
        hidden_states: Tensor,
        output_weight: Tensor,
        batch: ViewBatch,
        tp_group: dist.ProcessGroup,
        cp_group: dist.ProcessGroup,
        scale_logits: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Local sums of a micro-batch, fp32 [3]: CLM, weighed KL, and plain KL (for the log).

        Args:
            hidden_states: [(2L-t)/cp, b, h], this rank's tokens, whole along tensor parallelism.
            output_weight: [v/tp, h].
        """
        layout = batch.layout
        standard, suffix = hidden_states.split([layout.local_standard, layout.local_suffix])
        if layout.local_suffix:
            suffix = exchange_suffix(suffix, layout, cp_group)  # hidden states: far fewer bytes than logits
        logits = scale_logits(torch.nn.functional.linear(torch.cat([standard, suffix]), output_weight))
        shard = VocabularyShard.of_rank(self.vocab_size, output_weight.shape[0], tp_group)
        standard, suffix = logits.split([len(standard), len(suffix)])  # [L/cp, b, v/tp], [m, b, v/tp]
        clm = (vocab_parallel_cross_entropy(standard, batch.labels.T, shard) * batch.loss_mask.T).sum()
        if layout.suffix_start is None:
            return torch.stack([clm, torch.zeros_like(clm), torch.zeros_like(clm)])
        repeated = (layout.standard_tokens() >= layout.suffix_start).to(logits.device)  # tokens with a second reading
        kl_per_token = vocab_parallel_reverse_kl(suffix, standard.detach()[repeated], shard)
        kl_per_sample = (kl_per_token * batch.suffix_mask.T[repeated]).sum(dim=0)
        factor = self.kl_weight * batch.kl_weights * batch.kept / batch.kept_suffix.clamp(min=1)
        return torch.stack([clm, (factor * kl_per_sample).sum(), kl_per_sample.sum().detach()])

    def output_processor(
        self,
        *,
        hidden_states,
        output_layer,
        output_weight,
        context: ViewBatch,
        scale_logits,
        config,
        pg_collection,
        **_,
    ) -> Tensor:
        """GPTModel's `output_processor` hook on the last pipeline stage: hidden states in, the three sums out."""
        tp_group = pg_collection.tp
        if config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=tp_group
            )
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=tp_group)
        weight = output_layer.weight if output_weight is None else output_weight
        return self.sums(hidden_states, weight, context, tp_group, pg_collection.cp, scale_logits)

    def loss(self, batch: ViewBatch, training: bool, sums: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Megatron's loss function: local sum, local count of kept tokens, and what is logged as [sum, count] pairs."""
        tokens = batch.loss_mask.sum()
        logged = {"lm loss": torch.stack([sums[0].detach(), tokens])}
        if self.name == "rpsd":
            suffix_tokens = batch.suffix_mask.sum() * (batch.layout.suffix_start is not None)
            # A positive count keeps a step without any kept suffix token at 0 rather than 0 / 0.
            logged["view kl"] = torch.stack([sums[2].detach(), suffix_tokens.clamp(min=1e-20)])
        if self.name != "standard" and training:  # Megatron's evaluation would print their perplexity
            samples = torch.tensor(float(len(batch.splits)), device=sums.device)
            logged["mean split"] = torch.stack([batch.splits.sum().float(), samples])
            logged["mean shift"] = torch.stack([batch.shifts.abs().sum().float(), samples])
        return sums[0] + sums[1], tokens.to(torch.int), logged
