"""One micro-batch through one pipeline stage: draw the views, shard, run the model."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_rpsd.model import RPSDModelConfig, ViewSequence
from megatron_rpsd.parallel import ViewLayout
from megatron_rpsd.positions import Draw, View, ViewSampler, rope_tables
from megatron_rpsd.training.batch import ViewBatch, make_view_batch
from megatron_rpsd.training.objective import Objective

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
    ) -> None:
        assert execution in EXECUTIONS
        self.execution = execution
        self.objective = objective
        self.sampler = sampler
        self.length = length
        self.inv_freq, self.attention_scaling = model_config.inverse_frequencies()

    def __call__(self, data_iterator, model):
        """The stage's output, and the function that makes a loss of it on the last stage."""
        sample = next(data_iterator)
        draws = [self.sampler.draw(int(index)) for index in sample["sample_index"]]
        layout = self.layout(self.suffix_start(draws))
        return self.run(model, sample, [draw.view for draw in draws], layout, [draw.kl_weight for draw in draws])

    def suffix_start(self, draws: Sequence[Draw]) -> int | None:
        """Where a micro-batch's perturbed view starts: its split if the prefix is shared, else 0; None: no view."""
        if self.objective.name != "rpsd" or not any(draw.kl_weight for draw in draws):
            return None
        if self.execution == "full":
            return 0
        (split,) = {draw.view.split for draw in draws}  # one split a micro-batch; shifts are per sample
        return split

    def layout(self, suffix_start: int | None) -> ViewLayout:
        """This rank's layout of a view pair from `suffix_start` on (0: a whole second view), or of one view (None)."""
        return ViewLayout(
            self.length,
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
        batch = make_view_batch(sample, views, self.objective.name, layout, kl_weights)
        batch = batch.to(torch.cuda.current_device())
        output = model(
            batch.tokens,
            None,
            None,
            packed_seq_params=self.sequence(batch),
            output_processor=functools.partial(
                self.objective.output_processor, pg_collection=get_attr_wrapped_model(model, "pg_collection")
            ),
            output_processor_context=batch,
        )
        return output, functools.partial(self.objective.loss, batch, model.training)

    def sequence(self, batch: ViewBatch) -> ViewSequence:
        """What the layers need: layout and rotary tables, made on every stage from the same positions."""
        inv_freq = self.inv_freq.to(batch.position_ids.device)
        cos, sin = rope_tables(batch.position_ids, inv_freq, self.attention_scaling)
        return ViewSequence(layout=batch.layout, cos=cos, sin=sin)
