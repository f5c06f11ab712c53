"""Attention kernels on a GPU: error beside that of torch's own bf16 attention, time, and FP8 against bf16."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_rpsd.attention import BLOCK_KERNELS, KERNELS, PACKAGES, TransformerEngineAttention
from megatron_rpsd.planning.gpu_rows import Row, guarded, release, seconds_of
from megatron_rpsd.runs.throughput import known_peak

Kernel = Callable[[Tensor, Tensor, Tensor, float], Tensor]
_NAMES = ("output", "d query", "d key", "d value")
# Half a rounding of bf16's 8 bits, twice: what a result that was only rounded may be off by, at its largest value.
_ROUNDING = 2.0**-8
_FP8_ROUNDING = 2.0**-4


@dataclass(frozen=True)
class Shape:
    """`queries` end where the `keys` end; heads n, key groups g, head dimension d."""

    queries: int
    keys: int
    heads: int
    groups: int
    head_dim: int

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.queries} of {self.keys}, heads {self.heads}/{self.groups}, d {self.head_dim}"

    @property
    def pairs(self) -> int:
        """Query-key pairs."""
        before = self.keys - self.queries
        return self.queries * before + self.queries * (self.queries + 1) // 2


@dataclass(frozen=True)
class AttentionSizes:
    """Shapes whose error is looked at, and those that are timed."""

    exact: tuple[Shape, ...]
    timed: tuple[Shape, ...]
    repetitions: int = 5


GPU_SIZES = AttentionSizes(
    tuple(
        Shape(queries, 2048, heads, groups, d)
        for d in (64, 128)
        for queries in (2048, 1024, 96)
        for heads, groups in ((8, 8), (8, 2))
    ),
    (Shape(32768, 32768, 32, 8, 128), Shape(16384, 32768, 32, 8, 128)),
)
TINY_SIZES = AttentionSizes((Shape(16, 16, 4, 2, 8), Shape(6, 16, 2, 2, 8)), (Shape(8, 16, 2, 1, 8),), 1)


def kernel_missing(name: str, device: str) -> str | None:
    """Why one of `attention.KERNELS` cannot run here; None where it can."""
    if name == "sdpa":
        return None
    if device == "cpu":
        return f"device {device}: {name} needs a GPU"
    return package_missing(PACKAGES[name]) if name in PACKAGES else None


def package_missing(package: str) -> str | None:
    """Why a package cannot be used here; None where it can."""
    try:
        importlib.import_module({"transformer_engine": "transformer_engine.pytorch"}.get(package, package))
    except Exception as error:  # loaders of compiled libraries raise whatever they find, not ImportError alone
        return f"{package} does not load: {type(error).__name__}: {str(error)[:200]}"
    return None


def kernel_for(name: str, shape: Shape) -> Kernel:
    """One of `attention.KERNELS` as a function like `causal_attention`; Transformer Engine's has heads of its own."""
    if name in BLOCK_KERNELS:
        return BLOCK_KERNELS[name]
    return TransformerEngineAttention(shape.heads, shape.groups, shape.head_dim, shape.head_dim**-0.5, 1).block


def fp8_kernel(shape: Shape) -> Kernel:
    """Transformer Engine's attention of whole sequences in FP8 with delayed scaling; no rectangle has an FP8 kernel."""
    te = importlib.import_module("transformer_engine.pytorch")
    recipes = importlib.import_module("transformer_engine.common.recipe")
    recipe = recipes.DelayedScaling(fp8_format=recipes.Format.HYBRID, amax_history_len=4, fp8_dpa=True)
    attention = TransformerEngineAttention(shape.heads, shape.groups, shape.head_dim, shape.head_dim**-0.5, 1)

    def kernel(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        assert scale == attention.scale
        with te.autocast(enabled=True, recipe=recipe):
            return attention.whole(query, key, value)

    return kernel


def _inputs(shape: Shape, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Query [sq, 1, n, d], key and value [sk, 1, g, d], and the output's gradient."""
    generator = torch.Generator().manual_seed(shape.queries + shape.heads + shape.head_dim)
    sizes = [(shape.queries, shape.heads), (shape.keys, shape.groups), (shape.keys, shape.groups)]
    sizes.append(sizes[0])
    made = [torch.randn(length, 1, heads, shape.head_dim, generator=generator) for length, heads in sizes]
    return [tensor.to(device, dtype) for tensor in made]


def _run(kernel: Kernel, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients."""
    *leaves, upstream = (tensor.detach().to(dtype) for tensor in inputs)
    for leaf in leaves:
        leaf.requires_grad_()
    output = kernel(*leaves, leaves[0].shape[-1] ** -0.5)
    output.backward(upstream)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def masked_sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """torch's attention with an explicit bottom-right mask and repeated key heads."""
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    rows = torch.arange(query.shape[2], device=query.device)[:, None] + key.shape[2] - query.shape[2]
    mask = torch.arange(key.shape[2], device=query.device)[None] <= rows
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return context.permute(2, 0, 1, 3)


def in_fp32(inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients of the bf16 inputs, computed in fp32 by torch's written-out ("math") attention."""
    with sdpa_kernel(SDPBackend.MATH):
        return _run(masked_sdpa, inputs, torch.float32)


def relative_errors(found: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    """Largest difference over the largest true value, of output and gradients."""
    return {
        name: ((got.float() - true.float()).abs().max() / true.float().abs().max()).item()
        for name, got, true in zip(_NAMES, found, truth, strict=True)
    }


def kernel_errors(kernel: Kernel, shape: Shape, device: str) -> tuple[dict[str, float], dict[str, float]]:
    """Errors of a bf16 kernel and of torch's own bf16 attention on the same numbers, against fp32."""
    inputs = _inputs(shape, device, torch.bfloat16)
    truth = in_fp32(inputs)
    ours = relative_errors(_run(kernel, inputs, torch.bfloat16), truth)
    return ours, relative_errors(_run(masked_sdpa, inputs, torch.bfloat16), truth)


def allowed_error(torchs: float) -> float:
    """Twice torch's own, or a rounding where torch is nearly exact."""
    return max(2 * torchs, _ROUNDING)


def attention_rows(device: str, sizes: AttentionSizes) -> Iterator[Row]:
    """Every kernel: error at each shape, then time forward and backward."""
    for name in KERNELS:
        reason = kernel_missing(name, device)
        if reason is not None:
            yield Row("attention", f"kernel {name}", reason=reason)
            continue
        make = functools.partial(kernel_for, name)
        for shape in sizes.exact:
            what = f"{name}: {shape.name}"
            yield from guarded("attention", what, functools.partial(_error_rows, what, make, shape, device))
        for shape in sizes.timed:
            what = f"{name}: {shape.name}, forward and backward"
            work = functools.partial(_time_rows, "attention", what, make, shape, device, sizes.repetitions)
            yield from guarded("attention", what, work)


def _error_rows(what: str, make: Callable[[Shape], Kernel], shape: Shape, device: str) -> Iterator[Row]:
    ours, torchs = kernel_errors(make(shape), shape, device)
    worst = max(ours, key=lambda name: ours[name] / allowed_error(torchs[name]))
    yield Row(
        "attention", f"{what}: error of {worst}", ours[worst], "relative",
        f"2 x torch's bf16 attention, at least a rounding; torch {torchs[worst]:.2e}",
        (0.0, allowed_error(torchs[worst])),
    )  # fmt: skip
    release(device)


def _time_rows(
    check: str, what: str, make: Callable[[Shape], Kernel], shape: Shape, device: str, repetitions: int
) -> Iterator[Row]:
    kernel = make(shape)
    inputs = _inputs(shape, device, torch.bfloat16)
    seconds = seconds_of(lambda: _run(kernel, inputs, torch.bfloat16), device, repetitions)
    rate = 12 * shape.heads * shape.head_dim * shape.pairs / seconds / 1e12
    peak = known_peak(torch.cuda.get_device_name()) if device == "cuda" else None
    share = f"; {rate / peak:.2f} of the peak (plans assume 0.30 on an H100)" if peak else ""
    yield Row(check, what, 1e3 * seconds, "ms", f"{rate:.4g} TFLOP/s{share}")
    release(device)


def fp8_rows(device: str, sizes: AttentionSizes) -> Iterator[Row]:
    """Attention of whole sequences in FP8 beside bf16: error against fp32, time, whether a query sees a later key."""
    reason = kernel_missing("te", device)
    if reason is not None:
        yield Row("fp8", "attention in FP8 against bf16", reason=reason)
        return
    makes = {"te bf16": functools.partial(kernel_for, "te"), "te FP8": fp8_kernel}
    for name, make in makes.items():
        for shape in (shape for shape in sizes.exact if shape.head_dim == 128 and shape.queries == shape.keys):
            what = f"{name}: {shape.name}"
            yield from guarded("fp8", what, functools.partial(_fp8_error_rows, what, make, shape, device))
        for shape in (shape for shape in sizes.timed if shape.queries == shape.keys):
            what = f"{name}: {shape.name}, forward and backward"
            work = functools.partial(_time_rows, "fp8", what, make, shape, device, sizes.repetitions)
            yield from guarded("fp8", what, work)


def _fp8_error_rows(what: str, make: Callable[[Shape], Kernel], shape: Shape, device: str) -> Iterator[Row]:
    kernel, fp8 = make(shape), make is fp8_kernel
    for _ in range(4):  # delayed scaling takes its scales from steps before
        _run(kernel, _inputs(shape, device, torch.bfloat16), torch.bfloat16)
    ours, torchs = kernel_errors(kernel, shape, device)
    worst = max(ours, key=lambda name: ours[name] / allowed_error(torchs[name]))
    bound = None if fp8 else (0.0, allowed_error(torchs[worst]))
    yield Row("fp8", f"{what}: error of {worst}", ours[worst], "relative", f"torch bf16 {torchs[worst]:.2e}", bound)
    change, again = sees_ahead(kernel, shape, device)
    yield Row(
        "fp8", f"{what}: change of early outputs when late keys are permuted", change, "relative",
        f"no query sees a later key; a repeated run differs by {again:.1e}", (0.0, 2 * again + _FP8_ROUNDING * fp8),
    )  # fmt: skip
    release(device)


@torch.no_grad()
def sees_ahead(kernel: Kernel, shape: Shape, device: str) -> tuple[float, float]:
    """Largest change of the first half of the queries' outputs when the last quarter of keys and values is permuted,
    and when the same is run again.

    The permutation keeps every largest value, so FP8's scales of keys and values are the same. 0 where attention is
    causal, and for FP8 a rounding at most, since the scale of the probabilities may move.
    """
    query, key, value, _ = _inputs(shape, device, torch.bfloat16)
    half, last = shape.queries // 2, min(shape.keys // 4, shape.queries // 2)
    scale = shape.head_dim**-0.5
    other = [torch.cat([tensor[:-last], tensor[-last:].flip(0)]) for tensor in (key, value)]
    first, second, changed = (
        kernel(query, *pair, scale)[:half].float() for pair in ((key, value), (key, value), other)
    )
    return tuple(((found - second).abs().max() / second.abs().max()).item() for found in (changed, first))
