"""Steps of a view pair on one GPU: ratio to one view's, share of the peak, and what the plan predicts of both."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_rpsd.checkpoint.megatron_arguments import megatron_arguments
from megatron_rpsd.planning.activations import LOCAL, TE, Software
from megatron_rpsd.planning.gpu_attention import kernel_missing
from megatron_rpsd.planning.gpu_rows import Row, guarded, release
from megatron_rpsd.planning.gpus import DEFAULTS, GPU, GPUS
from megatron_rpsd.planning.known_models import KNOWN_MODELS, PlannedModel, of_config
from megatron_rpsd.planning.layouts import Layout, Workload
from megatron_rpsd.planning.memory import dynamic_items, static_items
from megatron_rpsd.planning.roofline import step_time
from megatron_rpsd.planning.view_costs import WAYS, CostSettings, measure_view_costs, step_runner
from megatron_rpsd.positions import View
from megatron_rpsd.runs.flops import step_flops
from megatron_rpsd.runs.throughput import known_peak
from megatron_rpsd.training.session import end_session

_ONE_GPU = Layout(1, 1, 1, 1)
_LOCAL_ON_GPU = Software("local", 2, False, True)
_WITHOUT_APEX = "--no-gradient-accumulation-fusion"  # Megatron stops where that kernel of Apex is absent
# Megatron's layers without Transformer Engine and Apex, nothing compiled.
WITHOUT_TE = (
    "--transformer-impl", "local", "--no-persist-layer-norm", "--no-masked-softmax-fusion", "--no-rope-fusion",
    "--no-bias-swiglu-fusion", "--no-bias-gelu-fusion", "--no-bias-dropout-fusion", _WITHOUT_APEX,
)  # fmt: skip
_ROOM = 0.80  # of the GPU's memory, for a step whose prediction is what is being checked
_ABOVE_BOUND, _MEMORY_OFF, _TIME_OFF = 1.10, 0.10, 0.25


@dataclass(frozen=True)
class StepSizes:
    """Llama-3-8B's layers, the most of `layers` that fit, at `lengths`; `planned_length` is held against the plan."""

    config: dict
    layers: tuple[int, ...] = (4, 3, 2, 1)
    lengths: tuple[int, ...] = (16384, 32768, 65536)
    planned_length: int = 32768
    splits: int = 4
    repetitions: int = 3
    chunk_bytes: int = 2**30


GPU_SIZES = StepSizes(KNOWN_MODELS["llama3-8b"])
TINY_SIZES = StepSizes(
    KNOWN_MODELS["llama3-8b"] | {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "vocab_size": 128,
    }, (2, 1), (128,), 128, 2, 1, 2**20,
)  # fmt: skip


def software_here(device: str) -> tuple[Software, tuple[str, ...]]:
    """The implementation of the layers on this machine, and Megatron's flags for it."""
    if device == "cpu":
        return LOCAL, WITHOUT_TE
    if kernel_missing("te", device) is None:
        return TE, (_WITHOUT_APEX,)
    return _LOCAL_ON_GPU, WITHOUT_TE


def planned_gpu(device_name: str) -> GPU | None:
    """What plans assume of the GPU that torch calls so; None where they know none like it."""
    patterns = {"a100-80gb": "A100.*80", "h100-80gb": "H100.*80", "h200-141gb": "H200", "b200": r"\bB200"}
    return next((GPUS[name] for name, pattern in patterns.items() if re.search(pattern, device_name)), None)


def _work(length: int, way: str, chunk_bytes: int) -> Workload:
    objective = "standard" if way == "clm" else "rpsd"
    execution = "full" if way == "full" else "shared-prefix"
    return Workload(length, 1, objective, execution, chunk_bytes=chunk_bytes)


def predicted_bytes(model: PlannedModel, length: int, way: str, split: int, software: Software, chunk: int) -> int:
    """The plan's peak of a forward and backward pass on one GPU, without the optimizer and what it keeps back."""
    work = _work(length, way, chunk)
    start = {"clm": None, "full": 0, "shared-prefix": split}[way]
    static = static_items(model.dims, _ONE_GPU, work, 0, software)
    dynamic = dynamic_items(model.dims, _ONE_GPU, work, 0, start, software)
    return static["weights"] + static["gradients"] + max(sum(items.values()) for items in dynamic.values())


def with_layers(sizes: StepSizes, length: int, device: str, software: Software) -> PlannedModel:
    """The model with as many layers as fit beside a whole second view of `length` tokens.

    Raises:
        ValueError: not even one.
    """
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 2**40
    for layers in sizes.layers:
        model = of_config(f"{layers} layers", sizes.config | {"num_hidden_layers": layers})
        needed = predicted_bytes(model, length, "full", 0, software, sizes.chunk_bytes)
        if needed <= _ROOM * memory:
            return model
    raise ValueError(f"{layers} layers at {length} tokens need {needed / 2**30:.1f} GiB of {memory / 2**30:.1f}")


def _settings(model: PlannedModel, length: int, sizes: StepSizes, device: str, flags: tuple[str, ...]) -> CostSettings:
    words = [
        *megatron_arguments(model), "--seq-length", str(length), "--tokenizer-type", "NullTokenizer",
        "--device", device, "--loss-chunk-bytes", str(sizes.chunk_bytes), "--no-check-for-nan-in-loss-and-grad",
        *(["--bf16"] if device == "cuda" else []), *flags,
    ]  # fmt: skip
    return CostSettings(length, model.shape, sizes.splits, sizes.repetitions, device, tuple(words), False)


def step_rows(device: str, sizes: StepSizes) -> Iterator[Row]:
    """Seconds of one view, ratios of both executions beside their FLOP bounds, shares of the peak."""
    software, flags = software_here(device)
    for length in sizes.lengths:
        what = f"step of {length} tokens"
        work = functools.partial(_ratio_rows, length, sizes, device, software, flags)
        yield from guarded("steps", what, work)
        release(device)


def _ratio_rows(
    length: int, sizes: StepSizes, device: str, software: Software, flags: tuple[str, ...]
) -> Iterator[Row]:
    model = with_layers(sizes, length, device, software)
    found = measure_view_costs(_settings(model, length, sizes, device, flags), lambda line: print(line, flush=True))
    peak = known_peak(torch.cuda.get_device_name()) if device == "cuda" else None
    what = f"{length} tokens, {model.name}, {software.name}"
    for way in WAYS:
        shares = [
            step_flops(model.shape, length, {"clm": None, "full": 0, "shared-prefix": row["split"]}[way])
            / row["seconds"][way] / 1e12
            for row in found["splits"]
        ]  # fmt: skip
        rate = sum(shares) / len(shares)
        said = f"{rate:.4g} model TFLOP/s" + (f", MFU {100 * rate / peak:.1f}%" if peak else "")
        yield Row("steps", f"{what}: {way} step", found["seconds"][way], "s", said)
    for way, ratio in found["step_ratio"].items():
        bound = found["flop_bound"][way]
        yield Row(
            "steps", f"{what}: {way} over clm", ratio, "x", f"{_ABOVE_BOUND} x its FLOP bound {bound:.3f}",
            (0.0, _ABOVE_BOUND * bound),
        )  # fmt: skip


def plan_rows(device: str, sizes: StepSizes) -> Iterator[Row]:
    """Peak memory and seconds of a step beside the plan's, for one view and both executions."""
    software, flags = software_here(device)
    length = sizes.planned_length
    yield from guarded("plan", f"plan at {length} tokens", lambda: _plan_rows(length, sizes, device, software, flags))


def _plan_rows(length: int, sizes: StepSizes, device: str, software: Software, flags: tuple[str, ...]) -> Iterator[Row]:
    model = with_layers(sizes, length, device, software)
    run, _ = step_runner(_settings(model, length, sizes, device, flags))
    split = length // 4 // 32 * 32
    view = View(split, length // 3)
    gpu = planned_gpu(torch.cuda.get_device_name())
    try:
        for way in WAYS:
            run(way, view)  # allocates and compiles
            release(device)
            seconds = sorted(run(way, view) for _ in range(sizes.repetitions))[sizes.repetitions // 2]
            peak = torch.cuda.max_memory_allocated()
            predicted = predicted_bytes(model, length, way, split, software, sizes.chunk_bytes)
            what = f"{length} tokens, {model.name}, {software.name}: {way}"
            said = f"measured {peak / 2**30:.2f} GiB, planned {predicted / 2**30:.2f} GiB"
            yield Row("plan", f"{what}, peak memory over the plan's", peak / predicted, "x", said,
                      (1 - _MEMORY_OFF, 1 + _MEMORY_OFF))  # fmt: skip
            if way != "shared-prefix":  # the plan's time is of the mean split
                yield _time_row(what, model, _work(length, way, sizes.chunk_bytes), gpu, seconds)
    finally:
        end_session()


def _time_row(what: str, model: PlannedModel, work: Workload, gpu: GPU | None, seconds: float) -> Row:
    what = f"{what}, seconds over the roofline's"
    if gpu is None:
        return Row("plan", what, reason=f"plans know no GPU called {torch.cuda.get_device_name()}")
    parts = {name: part for name, part in step_time(model, _ONE_GPU, work, gpu, DEFAULTS).parts.items()
             if name != "optimizer"}  # fmt: skip
    planned = sum(parts.values())
    largest = ", ".join(f"{name} {part:.3g}" for name, part in parts.items() if part > 0)
    said = f"measured {seconds:.3g} s, planned {planned:.3g} s ({largest})"
    return Row("plan", what, seconds / planned, "x", said, (1 - _TIME_OFF, 1 + _TIME_OFF))
