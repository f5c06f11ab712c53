"""One micro-batch through one pipeline stage: draw the views, shard, run the model."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_rpsd.model import RPSDModelConfig, ViewSequence
from megatron_rpsd.parallel import ViewLayout, all_gather_tokens
from megatron_rpsd.positions import (
    Draw,
    MixedLengths,
    RopeConfig,
    View,
    ViewSampler,
    draw_document_views,
    inverse_frequencies,
    rope_tables,
)
from megatron_rpsd.runs.throughput import WORK
from megatron_rpsd.training.batch import TWO_VIEWS, ViewBatch, make_view_batch
from megatron_rpsd.training.objective import Objective
from megatron_rpsd.training.packing import CONCATENATED, Packing, packing_sums
from megatron_rpsd.training.step_work import longce_flops, model_shape, student_flops, teacher_flops

EXECUTIONS = ("shared-prefix", "full")


class ForwardStep:
    """Megatron's `forward_step_func` for every objective. Holds configuration only, nothing of a micro-batch."""

    def __init__(
        self,
        model_config: RPSDModelConfig,
        objective: Objective,
        sampler: ViewSampler,
        length: int,
        execution: str = "full",
        mix: MixedLengths | None = None,
        packing: Packing = CONCATENATED,
        teacher=None,
    ) -> None:
        """`teacher`: a `training.teacher.LiveTeacher` or `training.teacher_cache.TeacherCache`, or None."""
        assert execution in EXECUTIONS
        assert execution == "full" or not packing.perturb_documents or objective.name not in TWO_VIEWS
        self.execution = execution
        self.objective = objective
        self.sampler = sampler
        self.length = length
        self.mix = mix
        self.packing = packing
        self.teacher = teacher
        self.shape = model_shape(model_config)
        self.inv_freq, self.attention_scaling = model_config.inverse_frequencies()

    def __call__(self, data_iterator, model):
        """The stage's output, and the function that makes a loss of it on the last stage."""
        return self.read(next(data_iterator), model)

    def changed(self, rope: RopeConfig, sampler: ViewSampler, length: int) -> ForwardStep:
        """The same step at other frequencies, for views of `sampler` and sequences of `length` tokens."""
        step = copy.copy(self)
        step.inv_freq, step.attention_scaling = inverse_frequencies(rope)
        step.sampler, step.length = sampler, length
        return step

    def read(self, sample: Mapping[str, Tensor], model):
        """As a call, of a given sample with its sample_index."""
        sampler = self.sampler
        if self.mix is not None and model.training:  # evaluation reads whole windows
            sample, sampler = self.mix.read(sample)
        draws = [sampler.draw(int(index)) for index in sample["sample_index"]]
        layout = self.layout(self.suffix_start(draws), sampler.length)
        views = [draw.view for draw in draws]
        if self.packing.perturb_documents:
            documents = self.packing.documents(sample)
            views = [
                draw_document_views(sampler, int(index), documents.lengths(row))
                for row, index in enumerate(sample["sample_index"])
            ]
        return self.run(model, sample, views, layout, [draw.kl_weight for draw in draws])

    def suffix_start(self, draws: Sequence[Draw]) -> int | None:
        """Where a micro-batch's perturbed view starts: its split if the prefix is shared, else 0; None: no view.

        Views of the whole sequence (NoPE, permuted chunks) have split 0.
        """
        if self.objective.name not in TWO_VIEWS or not any(draw.kl_weight for draw in draws):
            return None
        if self.execution == "full":
            return 0
        (split,) = {draw.view.split for draw in draws}  # one split a micro-batch; shifts are per sample
        return split

    def layout(self, suffix_start: int | None, length: int | None = None) -> ViewLayout:
        """This rank's layout of a view pair from `suffix_start` on (0: a whole second view), or of one view (None);
        of sequences of `length` tokens, --seq-length by default.
        """
        return ViewLayout(
            self.length if length is None else length,
            suffix_start,
            parallel_state.get_context_parallel_world_size(),
            parallel_state.get_context_parallel_rank(),
        )

    def run(
        self,
        model,
        sample: Mapping[str, Tensor],
        views: Sequence[View],
        layout: ViewLayout,
        kl_weights: Sequence[float] | None = None,
    ):
        """The same for given views, layout and importance weights."""
        short_loss = self.short_losses(model, sample) if self.objective.longce and model.training else None
        batch = make_view_batch(sample, views, self.objective.name, layout, kl_weights, short_loss, self.packing)
        batch = batch.to(torch.cuda.current_device())
        reading = None if self.teacher is None else self.teacher.read(self, model, sample)
        process = functools.partial(self.objective.output_processor, teacher=reading)
        output = self._forward(model, batch, process)
        logged = {} if batch.documents is None else packing_sums(batch.documents, sample["loss_mask"])
        if model.training:
            logged[WORK] = torch.tensor([self.flops(batch, sample) / 1e9, float(sample["tokens"].numel())])
        return output, functools.partial(self._loss, batch, model.training, logged, reading is not None)

    def flops(self, batch: ViewBatch, sample: Mapping[str, Tensor]) -> int:
        """Model operations of a micro-batch of training: of its whole rows, over all layers and vocabulary."""
        cut, longce = self.packing.attention, self.objective.longce
        count = student_flops(self.shape, batch, cut)
        if batch.short_loss is not None:
            count += longce_flops(self.shape, longce, batch, cut)
        live = getattr(self.teacher, "config", None)  # a cache has none
        if live is not None:
            count += teacher_flops(model_shape(live), sample, cut or self.teacher.document_mask)
        return count

    def _loss(
        self, batch: ViewBatch, training: bool, counted: Mapping[str, Tensor], distilled: bool, sums: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss, tokens, logged = self.objective.loss(batch, training, sums, distilled)
        if training:
            logged |= {name: pair.to(sums.device) for name, pair in counted.items()}
        if self.mix is not None and training:
            logged["mean length"] = sums.new_tensor([batch.layout.length, 1.0])
        return loss, tokens, logged

    def _forward(self, model, batch: ViewBatch, output_processor) -> Tensor:
        return model(
            batch.tokens,
            None,
            None,
            packed_seq_params=self.sequence(batch),
            output_processor=functools.partial(
                output_processor, pg_collection=get_attr_wrapped_model(model, "pg_collection")
            ),
            output_processor_context=batch,
        )

    @torch.no_grad()
    def short_losses(self, model, sample: Mapping[str, Tensor]) -> Tensor:
        """Loss of every token with LongCE's short context, fp32 [b, L], the same on all ranks of a replica; nan where
        the whole context is no longer than that. As many windows go through the model at once as make up
        --seq-length tokens.
        """
        length = sample["tokens"].shape[1]
        if length <= self.objective.longce.context:  # no token has a longer context than its short one
            return torch.full(sample["tokens"].shape, torch.nan)
        tokens, labels = (self.objective.longce.windows(sample[name]) for name in ("tokens", "labels"))
        width = tokens.shape[1]
        cp_group = parallel_state.get_context_parallel_group()
        layout = ViewLayout(width, None, cp_group.size(), cp_group.rank())
        order, losses = layout.gather_order(), []
        packing = dataclasses.replace(self.packing, perturb_documents=False)  # the standard view alone
        if packing.reads_documents:
            ids = self.objective.longce.windows(sample["document_ids"])
        for rows in torch.arange(len(tokens)).split(max(1, self.length // width)):
            window = {"tokens": tokens[rows], "labels": labels[rows], "loss_mask": torch.ones(len(rows), width)}
            if packing.reads_documents:
                window["document_ids"] = ids[rows]
            batch = make_view_batch(window, [View.identity()] * len(rows), "standard", layout, packing=packing)
            batch = batch.to(torch.cuda.current_device())
            local = self._forward(model, batch, self.objective.token_losses)  # [width/cp, rows]
            whole = all_gather_tokens(local, cp_group)
            losses.append((whole if order is None else whole[order.to(whole.device)]).T)
        return self.objective.longce.scored(torch.cat(losses), length)

    def sequence(self, batch: ViewBatch) -> ViewSequence:
        """What the layers need: layout and rotary tables, made on every stage from the same positions."""
        inv_freq = self.inv_freq.to(batch.position_ids.device)
        cos, sin = rope_tables(batch.position_ids, inv_freq, self.attention_scaling)
        cut = self.packing.attention and batch.documents is not None  # a batch without documents is read whole
        borders = batch.documents.borders if cut else None
        return ViewSequence(layout=batch.layout, cos=cos, sin=sin, documents=borders)
