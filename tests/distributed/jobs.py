"""What ranks of the pool run: one training step through Megatron's own schedule, DDP and gradient reduction."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from megatron_rpsd.checkpoint.convert import hf_session_arguments
from megatron_rpsd.checkpoint.families import hf_tensors
from megatron_rpsd.checkpoint.hf_folder import HFFolder
from megatron_rpsd.checkpoint.model_loading import load_hf_weights, named_parameters, table_by_name
from megatron_rpsd.positions import View
from megatron_rpsd.training.batch import TWO_VIEWS
from megatron_rpsd.training.run import forward_step_from_args
from megatron_rpsd.training.session import all_ranks, build_stages, end_session, start_session


def step(
    hf: Path, flags: list[str], sample: dict, views: list[View] | None, micro_batch: int = 1, suffix_start: int = 0
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Losses and Hugging Face gradients of one global batch at the layout that `flags` describe.

    Samples are dealt to data-parallel ranks in consecutive blocks of a micro-batch, as Megatron's sampler does. Without
    `views` the run reads each sample as its own flags say, by its sample_index.
    """
    folder = HFFolder(hf)
    length = sample["tokens"].shape[1]
    dtype = torch.bfloat16 if "--bf16" in flags else None
    arguments = [*hf_session_arguments(folder, dtype), "--device", "cpu", "--seq-length", str(length), *flags]
    arguments.append("--no-check-for-nan-in-loss-and-grad")  # that check needs the training loop around it
    try:
        args, config = start_session(arguments)
        stages = build_stages(config, args, wrap_with_ddp=True)
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        load_hf_weights(stages, folder, args.tensor_model_parallel_size, tp_rank, args.padded_vocab_size)
        forward_step = forward_step_from_args(args, config)
        logged = _forward_backward(stages, forward_step, sample, views, micro_batch, suffix_start)
        return _losses(logged), _gradients(stages, folder)
    finally:
        end_session()


def _forward_backward(stages, forward_step, sample, views, micro_batch, suffix_start) -> list[dict]:
    for stage in stages:
        stage.zero_grad_buffer()
        get_model_config(stage).finalize_model_grads_func = finalize_model_grads
    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    steps = len(sample["tokens"]) // (micro_batch * dp_size)

    def batches():
        for index in range(steps):
            start = (index * dp_size + dp_rank) * micro_batch
            rows = slice(start, start + micro_batch)
            micro = {name: value[rows] for name, value in sample.items()}
            yield micro if views is None else (micro, views[rows])

    def forward(iterator, model):
        if views is None:
            return forward_step(iterator, model)
        rows, drawn = next(iterator)
        start = suffix_start if forward_step.objective.name in TWO_VIEWS else None
        return forward_step.run(model, rows, drawn, forward_step.layout(start))

    iterators = [batches() for _ in stages]
    return get_forward_backward_func()(
        forward_step_func=forward, data_iterator=iterators if len(stages) > 1 else iterators[0],
        model=stages if len(stages) > 1 else stages[0], num_microbatches=steps,
        seq_length=forward_step.length, micro_batch_size=micro_batch, forward_only=False,
    )  # fmt: skip


def _losses(logged: list[dict]) -> dict[str, float]:
    names = {"clm": "lm loss", "kl": "view kl", "teacher": "teacher kl"}
    sums = torch.zeros(len(names), 2, dtype=torch.float64)
    if logged and parallel_state.get_tensor_model_parallel_rank() == 0:
        for micro in logged:
            sums += torch.stack([micro.get(name, torch.zeros(2)).double() for name in names.values()])
    total = torch.stack(all_ranks(sums)).sum(dim=0)
    return dict(zip(names, (total[:, 0] / total[:, 1].clamp(min=1e-20)).tolist(), strict=True))


def _gradients(stages, folder: HFFolder) -> dict[str, torch.Tensor]:
    """Reduced gradients of the whole model by Hugging Face name (on rank 0; elsewhere empty)."""
    dims = folder.dimensions()
    table = table_by_name(dims)
    mine = {name: parameter.main_grad.clone() for name, parameter in named_parameters(stages)}
    first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    gathered = all_ranks((parallel_state.get_tensor_model_parallel_rank(), mine if first else {}))
    if torch.distributed.get_rank():
        return {}
    shards: dict[str, list] = {}
    for tp_rank, tensors in gathered:
        for name, tensor in tensors.items():
            shards.setdefault(name, []).append((tp_rank, tensor))
    full = {
        name: table[name].layout.merge([tensor for _, tensor in sorted(parts, key=lambda part: part[0])], dims)
        for name, parts in shards.items()
    }
    if dims.tied and "output_layer.weight" in full:
        copy = full.pop("output_layer.weight")
        assert torch.equal(copy, full["embedding.word_embeddings.weight"]), "the tied weight's copies drift apart"
    return dict(hf_tensors(full.items(), dims))
