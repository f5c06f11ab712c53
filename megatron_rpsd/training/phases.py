"""`--rope-phases`: RoPE base, window and data change at given samples of one run; see `positions.phases`.

A phase is an ordinary forward step with its own frequencies, length and sampler, chosen by the sample's index. The
arms of the paper's comparison (arXiv 2604.06070) differ in theta alone:

    phase-wise        short:theta=10000,seq=2048,samples=20000;long:theta=500000,seq=8192
    constant small    short:theta=10000,seq=2048,samples=20000;long:theta=10000,seq=8192
    constant large    short:theta=500000,seq=2048,samples=20000;long:theta=500000,seq=8192
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
from megatron.core.datasets.utils import Split
from megatron.training import get_args
from megatron.training.utils.common_utils import get_blend_and_blend_per_split, print_rank_0

from megatron_rpsd.data.manifest import check_prefix
from megatron_rpsd.model import RPSDModelConfig
from megatron_rpsd.positions import (
    Phase,
    PhaseSchedule,
    RopeConfig,
    StepShape,
    ViewSampler,
    cut_rows,
    parse_phases,
    scaled_step,
)
from megatron_rpsd.training.arms import sampler_from_args, suffix_unit
from megatron_rpsd.training.dataset import dataset_config, indexed
from megatron_rpsd.training.forward_step import ForwardStep
from megatron_rpsd.training.implied import global_batch, head_dim_of
from megatron_rpsd.training.resuming import step_shape

_DATA_ARGUMENTS = ("data_args_path", "train_data_path", "valid_data_path", "test_data_path", "per_split_data_args_path")


def add_phase_arguments(group) -> None:
    """Add the flag to the parser's group."""
    group.add_argument(
        "--rope-phases", type=str, default=None, metavar="NAME:theta=...,seq=...,samples=...;...",
        help="Phases of the run: RoPE base theta, tokens of a sequence seq, how many samples (windows of --seq-length, "
        "the longest seq) the phase lasts, and optionally data=PREFIX in place of --data-path. The last phase takes "
        "what is left. With --use-checkpoint-args a resumed run goes on with its checkpoint's phases.",
    )  # fmt: skip


def settle_phases(args: argparse.Namespace) -> None:
    """Set what follows from the phases before other defaults do: --seq-length, and the first phase's base.

    Raises:
        ValueError: malformed phases, or a --rotary-base of another kind.
    """
    if args.rope_phases is None:
        return
    schedule = parse_phases(args.rope_phases)
    first = schedule.phases[0]
    typed = {word.split("=")[0] for word in sys.argv}
    if "--rotary-base" in typed and args.rotary_base != first.base:
        raise ValueError(
            f"--rotary-base {args.rotary_base} beside --rope-phases: every phase's theta is its base (the first one's "
            f"is {first.base}): leave --rotary-base out"
        )
    args.rotary_base = first.base
    args.seq_length = args.seq_length or schedule.window
    args.max_position_embeddings_before_phases = args.max_position_embeddings


def follow_checkpoint_phases(args: argparse.Namespace, saved: argparse.Namespace) -> None:
    """Let a resumed run go on with its checkpoint's phases.

    Raises:
        ValueError: phases were typed under which the checkpoint's past would have been another one.
    """
    before, consumed = getattr(saved, "rope_phases", None), getattr(saved, "consumed_train_samples", 0)
    if args.rope_phases is None:
        args.rope_phases = before
    elif before is not None:
        parse_phases(args.rope_phases).check_continues(parse_phases(before), consumed)
    elif consumed:
        raise ValueError(
            f"--rope-phases {args.rope_phases}: the checkpoint in --load has read {consumed} samples without phases; "
            "start a new run from it with --pretrained-checkpoint"
        )


def check_phases(args: argparse.Namespace) -> None:
    """Refuse what cannot run, before any process group or file is touched.

    Raises:
        ValueError: one line with the flag, the value and the arithmetic.
    """
    if args.rope_phases is None:
        return
    for name in ("length_mix", "rampup_batch_size", "step_batch_size_schedule", "phase_transition_iterations"):
        if getattr(args, name, None):
            raise ValueError(
                f"--rope-phases and --{name.replace('_', '-')} both say what a step reads: leave one of the two out"
            )
    if args.conversations:
        raise ValueError(
            "--rope-phases reads windows of documents; --sft reads conversations: leave one of the two out"
        )
    if args.dataloader_type not in (None, "single"):
        raise ValueError(
            f"--dataloader-type {args.dataloader_type}: --rope-phases needs samples in their order: use single"
        )
    schedule = parse_phases(args.rope_phases)
    global_batch_size = global_batch(args)
    steps = args.train_iters
    total = args.train_samples or (steps * global_batch_size if steps else None)
    schedule.check(args.seq_length, suffix_unit(args), global_batch_size, total)
    _check_rope(args, schedule)
    _check_data(args, schedule)
    for phase in schedule.phases:
        try:
            phase_sampler(args, phase, StepShape())
        except ValueError as refused:
            raise ValueError(f"--rope-phases {phase.name}: at seq={phase.length}, {refused}") from refused


def _check_rope(args: argparse.Namespace, schedule: PhaseSchedule) -> None:
    scaling = json.loads(args.rope_parameters) if args.rope_parameters else None
    head_dim = head_dim_of(args)
    for phase in schedule.phases:
        try:
            RopeConfig(head_dim, float(phase.base), scaling, args.max_position_embeddings)
        except ValueError as refused:
            raise ValueError(f"--rope-phases {phase.name}: theta={phase.base} with {refused}") from refused


def _check_data(args: argparse.Namespace, schedule: PhaseSchedule) -> None:
    for phase in schedule.phases:
        if phase.data is None:
            if not _has_data(args):
                raise ValueError(f"--rope-phases {phase.name}: give data=PREFIX, or --data-path for the whole run")
            continue
        try:
            check_prefix(phase.data, args.vocab_size)
        except ValueError as refused:
            raise ValueError(f"--rope-phases {phase.name}: {refused}") from refused


def _has_data(args: argparse.Namespace) -> bool:
    return args.mock_data or any(get_blend_and_blend_per_split(args))


def phase_prefixes(args: argparse.Namespace) -> list[str]:
    """The data that phases name, each once."""
    if args.rope_phases is None:
        return []
    return sorted({phase.data for phase in parse_phases(args.rope_phases).phases if phase.data is not None})


def phase_sampler(args: argparse.Namespace, phase: Phase, step: StepShape) -> ViewSampler:
    """The sampler of a phase's views. Ranges that were typed stay; default ones follow the phase's length."""
    return sampler_from_args(args, scaled_step(step, args.seq_length // phase.length), phase.length)


class PhasedForwardStep:
    """Megatron's `forward_step_func` of a run in phases: each micro-batch by the forward step of its own phase.

    Borders lie between global steps, so the micro-batches in flight are all of one phase. Evaluation reads as the
    phase of the last trained sample does: at a border, as the phase that has just ended.

    Args:
        steps: each phase's forward step.
        enter: called with the phase of every training micro-batch.
        trained: samples that the run has read so far.
    """

    def __init__(
        self,
        schedule: PhaseSchedule,
        steps: Sequence[ForwardStep],
        enter: Callable[[Phase], None],
        trained: Callable[[], int],
    ) -> None:
        self.schedule, self.steps, self.enter, self.trained = schedule, tuple(steps), enter, trained

    def __call__(self, data_iterator, model):
        """The stage's output, and the function that makes a loss of it on the last stage."""
        sample = next(data_iterator)
        if model.training:
            (index,) = {self.schedule.at(int(sample_index)) for sample_index in sample["sample_index"]}
            self.enter(self.schedule.phases[index])
        else:
            index = self.current_phase()
        return self.steps[index].read(cut_rows(sample, self.schedule.phases[index].length), model)

    def current_phase(self) -> int:
        """The phase that trained last, or the first one."""
        return self.schedule.at(max(self.trained() - 1, 0))


def phased_forward_step(
    args: argparse.Namespace, model_config: RPSDModelConfig, whole: ForwardStep
) -> PhasedForwardStep:
    """The forward step of `--rope-phases`; `whole` is the run's without phases."""
    schedule = parse_phases(args.rope_phases)
    step = step_shape(args)
    steps = []
    for phase in schedule.phases:
        rope = dataclasses.replace(model_config.rope, base=float(phase.base))
        steps.append(whole.changed(rope, phase_sampler(args, phase, step), phase.length))

    def enter(phase: Phase) -> None:
        # Checkpoints carry the arguments, and export reads base and window from them: of the phase that was trained.
        args.rotary_base = phase.base
        args.max_position_embeddings = max(args.max_position_embeddings_before_phases or 0, phase.length)

    print_rank_0(describe_phases(schedule, args.global_batch_size))
    return PhasedForwardStep(schedule, steps, enter, lambda: get_args().consumed_train_samples)


class PhasedSamples(torch.utils.data.Dataset):
    """The training samples of a run in phases, by their index in the run; `sample_index` is that index."""

    def __init__(
        self, schedule: PhaseSchedule, streams: dict[str | None, torch.utils.data.Dataset], total: int
    ) -> None:
        self.schedule, self.streams, self.total = schedule, streams, total
        self.index_split = Split.train

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> dict:
        data, place = self.schedule.place(index)
        return {**self.streams[data][place], "sample_index": index}


def phased_datasets_provider(num_samples: list[int | None], vp_stage: int | None = None) -> tuple:
    """Train, validation and test datasets on every rank, as `training.dataset.datasets_provider`.

    Validation and test data are those of the run's own data arguments; without any, the last phase's.
    """
    args = get_args()
    schedule = parse_phases(args.rope_phases)
    total, *evaluated = num_samples
    counts = schedule.streams(total)
    if _has_data(args):
        counts.setdefault(None, 1)  # Megatron builds validation and test data together with training data
    built = {data: _build(args, data, [count, *evaluated]) for data, count in counts.items()}
    held_out = built[None] if None in built else built[schedule.phases[-1].data]
    train = PhasedSamples(schedule, {data: splits[0] for data, splits in built.items()}, total)
    return train, *held_out[1:]


phased_datasets_provider.is_distributed = True


def _build(args: argparse.Namespace, data: str | None, sizes: list[int | None]) -> tuple:
    """The three splits of a phase's data, or of the run's where it names none."""
    if data is not None:
        args = copy.copy(args)
        args.data_path, args.mock_data = [data], False
        for name in _DATA_ARGUMENTS:
            setattr(args, name, None)
    kind = MockGPTDataset if args.mock_data else GPTDataset
    built = BlendedMegatronDatasetBuilder(kind, sizes, lambda: True, dataset_config(args)).build()
    return indexed(built, args)


def describe_phases(schedule: PhaseSchedule, global_batch_size: int) -> str:
    """One line for the log."""
    parts = []
    for phase, start in zip(schedule.phases, schedule.starts, strict=True):
        count = schedule.window // phase.length
        read = f"windows of {phase.length} tokens" + (f", {count} of them a sample" if count > 1 else "")
        data = f", data {phase.data}" if phase.data else ""
        parts.append(f"{phase.name} from step {start // global_batch_size + 1}: base {phase.base}, {read}{data}")
    return f"rope phases: {'; '.join(parts)}"
