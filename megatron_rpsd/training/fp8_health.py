"""FP8's health, measured on the real model before the first step: future leak and the KL of equal views.

Two figures that are 0 in exact arithmetic, in FP8 and, for comparison, with FP8 switched off:

- future leak: tokens from a cut on are exchanged for others; the largest change of a last hidden state before the cut.
  Scales that are measured on the present tensor (tensorwise, MXFP8) see the future, in attention (Transformer Engine
  issue 3248) and in linear layers; delayed scaling takes them from earlier steps.
- view KL: of the perturbed view from the standard one, where both are the same; in nats per token. What FP8 shows here
  is noise on the method's own signal (0.2 nats on SmolLM2-135M at large shifts, 0.007 at a shift of 1).

Eight forward passes of a whole view pair, and two more where delayed scaling has yet to find its scales. No random
number of the run is drawn, and nothing is trained. It has not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from megatron.training import get_args, get_tensorboard_writer, training
from megatron.training.utils.common_utils import print_rank_0
from torch import Tensor

from megatron_rpsd.attention import TransformerEngineAttention
from megatron_rpsd.positions import View
from megatron_rpsd.training.batch import ViewBatch, make_view_batch
from megatron_rpsd.training.forward_step import ForwardStep
from megatron_rpsd.training.objective import OutputLayer

_MEASURES = "_measures_fp8_health_of_megatron_rpsd"


@dataclasses.dataclass(frozen=True)
class Health:
    """The figures of one precision, the same on every rank.

    Attributes:
        future_leak: largest |difference| of a hidden state before a cut, when tokens behind it change.
        hidden: largest |hidden state|, the leak's measure.
        view_kl: KL of equal views, nats per token.
    """

    future_leak: float
    hidden: float
    view_kl: float


def probe_sample(length: int, rows: int, vocab_size: int) -> dict[str, Tensor]:
    """Random tokens, the same on every rank, with the keys of the dataset's samples."""
    ids = torch.randint(0, vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    return {"tokens": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": torch.ones(rows, length)}


def cuts(length: int) -> tuple[int, int]:
    """Where the future begins: behind the middle, within a kernel's tile; and the last token alone."""
    return length // 2 + 1, length - 1


@torch.no_grad()
def measure(model: Sequence[torch.nn.Module], step: ForwardStep, rows: int = 1) -> Health:
    """Both figures of the model as it stands. Every rank of the job calls it at the same time.

    Args:
        model: this rank's stages.
        step: the run's forward step: length, frequencies, loss.
        rows: samples of a micro-batch.
    """
    vocab_size, device = step.objective.vocab_size, torch.cuda.current_device()
    sample = probe_sample(step.length, rows, vocab_size)
    hidden = functools.partial(_standard_hidden, vocab_size)
    base = _read(model, step, sample, hidden)
    figures = torch.zeros(2, device=device)  # leak, largest hidden state
    if base is not None:
        figures[1] = base.float().abs().max()
    for cut in cuts(step.length):
        tokens = sample["tokens"].clone()
        tokens[:, cut:] = (tokens[:, cut:] + 1) % vocab_size
        other = _read(model, step, sample | {"tokens": tokens}, hidden)
        if base is not None:
            before = (step.layout(0).standard_tokens() < cut).to(base.device)
            difference = (other.float() - base.float())[before].abs()
            figures[0] = torch.maximum(figures[0], difference.max()) if difference.numel() else figures[0]
    dist.all_reduce(figures, op=dist.ReduceOp.MAX)
    leak, largest = figures.tolist()
    return Health(leak, largest, _view_kl(model, step, sample))


def _standard_hidden(vocab_size: int, *, hidden_states: Tensor, context: ViewBatch, **given) -> Tensor:
    """GPTModel's `output_processor` hook: last hidden states of the standard view, [L/cp, b, h]."""
    standard, _ = OutputLayer.of_hook(vocab_size, context, **given).readings(hidden_states)
    return standard.unflatten(0, (-1, len(context.labels)))


def _view_kl(model: Sequence[torch.nn.Module], step: ForwardStep, sample: Mapping[str, Tensor]) -> float:
    objective = dataclasses.replace(step.objective, name="rpsd", longce=None, distillation=None)
    sums = _read(model, step, sample, objective.output_processor)
    # Ranks that hold the same tokens count them as often as their divergence.
    device, held = torch.cuda.current_device(), step.layout(0).local_standard * len(sample["tokens"])
    total = torch.zeros(2, device=device) if sums is None else torch.stack([sums[2], sums.new_tensor(held)])
    total = total.double()
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def _read(
    model: Sequence[torch.nn.Module], step: ForwardStep, sample: Mapping[str, Tensor], processor: Callable
) -> Tensor | None:
    """What `processor` makes of both views' hidden states where the views are equal; None away from the last stage."""
    layout, rows = step.layout(0), len(sample["tokens"])

    def forward(iterator, stage):
        batch = make_view_batch(next(iterator), [View.identity()] * rows, "rpsd", layout)
        return step._forward(stage, batch.to(torch.cuda.current_device()), processor), _keep

    stages = parallel_state.get_pipeline_model_parallel_world_size()
    count = stages if len(model) > 1 else 1  # interleaved stages ask for as many
    found = get_forward_backward_func()(
        forward_step_func=forward, data_iterator=[iter([sample] * count) for _ in model], model=list(model),
        num_microbatches=count, seq_length=step.length, micro_batch_size=rows, forward_only=True,
        collect_non_loss_data=True,
    )  # fmt: skip
    return found[0] if found else None


def _keep(output: Tensor, non_loss_data: bool = False) -> Tensor:
    assert non_loss_data
    return output


@contextlib.contextmanager
def without_fp8(model: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Read in bf16: Megatron's blocks ask their configuration for FP8 at every forward pass."""
    configs = {id(part.config): part.config for stage in model for part in stage.modules() if hasattr(part, "config")}
    before = [(config, config.fp8) for config in configs.values() if hasattr(config, "fp8")]
    for config, _ in before:
        config.fp8 = None
    try:
        yield
    finally:
        for config, fp8 in before:
            config.fp8 = fp8


def _delayed_scaling(model: Sequence[torch.nn.Module]) -> Iterator[tuple[Tensor, float]]:
    """Scales and largest values of all modules under delayed scaling, core attention's included, and what each is
    before a first forward pass.
    """
    for stage in model:
        for module in stage.modules():
            engine = getattr(module, "engine", None)
            for part in (module, *(engine.modules if isinstance(engine, TransformerEngineAttention) else ())):
                for state in (getattr(part, "fp8_meta", None) or {}).values():
                    for name, blank in (("scale", 1.0), ("amax_history", 0.0)):
                        if isinstance(tensor := getattr(state, name, None), Tensor):
                            yield tensor, blank


@contextlib.contextmanager
def scaling_kept(model: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Leave delayed scaling as it is: what is read here must not make the scales of the run's next step."""
    before = {id(tensor): tensor.clone() for tensor, _ in _delayed_scaling(model)}
    try:
        yield
    finally:
        for tensor, blank in _delayed_scaling(model):
            kept = before.get(id(tensor))
            tensor.fill_(blank) if kept is None else tensor.copy_(kept)


@torch.no_grad()
def calibrate(model: Sequence[torch.nn.Module], step: ForwardStep, rows: int = 1) -> None:
    """Under delayed scaling let two forward passes make scales, which otherwise are 1 at a run's start: in those,
    weights of a few hundredths are hardly more than 0.
    """
    config = get_model_config(model[0])
    if not config.fp8 or config.fp8_recipe != "delayed":
        return
    manager = importlib.import_module("transformer_engine.pytorch.quantization").FP8GlobalStateManager
    sample = probe_sample(step.length, rows, step.objective.vocab_size)
    for _ in range(2):
        _read(model, step, sample, functools.partial(_standard_hidden, step.objective.vocab_size))
        manager.reduce_and_update_fp8_tensors(forward=True)  # without gradients the end of a pass does not


@contextlib.contextmanager
def _as_in_training(model: Sequence[torch.nn.Module], overlapped: bool) -> Iterator[None]:
    """In training mode, whose kernels are those of the run; parameters are gathered by nobody but the first step."""
    modes = [stage.training for stage in model]
    for stage in model:
        stage.train()
    if overlapped:
        training.disable_forward_pre_hook(model, param_sync=False)
    try:
        yield
    finally:
        if overlapped:
            training.enable_forward_pre_hook(model)
        for stage, mode in zip(model, modes, strict=True):
            stage.train(mode)


def health_of_run(args: argparse.Namespace, model: Sequence[torch.nn.Module], step: ForwardStep) -> dict[str, float]:
    """Both precisions' figures by the names they are logged under; printed on rank 0, with their units."""
    with scaling_kept(model), _as_in_training(model, training.should_disable_forward_pre_hook(args)):
        calibrate(model, step, args.micro_batch_size)
        fp8 = measure(model, step, args.micro_batch_size)
        with without_fp8(model):
            bf16 = measure(model, step, args.micro_batch_size)
    values = {}
    for name, health in (("fp8", fp8), ("bf16", bf16)):
        values |= {f"{name} future leak": health.future_leak, f"{name} view kl": health.view_kl}
        print_rank_0(
            f"{name} health at {step.length} tokens: changed future tokens change earlier hidden states by "
            f"{health.future_leak:.3e} at most (the largest is {health.hidden:.3e}); KL of equal views "
            f"{health.view_kl:.3e} nats per token; both should be 0"
        )
    return values


def install_fp8_health(args: argparse.Namespace, step_of: Callable[[], ForwardStep]) -> None:
    """Where the run is in FP8, let Megatron's loop begin with `health_of_run`. Idempotent.

    `pretrain` builds the model and offers no hook between that and its loop, so the loop is wrapped.
    """
    original = training.train
    if not args.fp8 or hasattr(original, _MEASURES):
        return

    @functools.wraps(original)
    def train(forward_step_func, model, *rest, **options):
        run = get_args()
        values, writer = health_of_run(run, model, step_of()), get_tensorboard_writer()
        if writer:
            for name, value in values.items():
                writer.add_scalar(name, value, run.iteration)
        return original(forward_step_func, model, *rest, **options)

    setattr(train, _MEASURES, True)
    training.train = train
