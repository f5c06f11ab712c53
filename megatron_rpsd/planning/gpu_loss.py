"""The fused loss on a GPU: right at a small size, and its time and memory at a large one beside others' losses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rpsd.loss import fused_linear_loss, objective
from megatron_rpsd.parallel import VocabularyShard
from megatron_rpsd.planning.gpu_rows import Row, guarded, release
from megatron_rpsd.planning.loss_costs import OURS, LossSizes, measure_loss_costs
from megatron_rpsd.planning.loss_peers import available_peers
from megatron_rpsd.runs.throughput import known_peak

_KL_WEIGHT = 0.7


@dataclass(frozen=True)
class SmallLoss:
    """Sizes that do not divide; `suffix` of the `tokens` are read twice."""

    tokens: int = 203
    suffix: int = 77
    hidden: int = 256
    vocab_size: int = 5003
    padded: int = 5120
    chunk_bytes: int = 2**20


@dataclass(frozen=True)
class LossCheckSizes:
    """What is compared with the definition, what is measured alone, and what beside losses that keep whole logits."""

    small: SmallLoss
    alone: LossSizes
    together: LossSizes
    large_peers: tuple[str, ...] = ("torch-compiled-chunks", "liger")


def _large(tokens: int, repetitions: int) -> LossSizes:
    return LossSizes(
        tokens, tokens // 2, 4096, 151936, 1, repetitions, 2**30, "bfloat16", "cuda", peers=(), bare_products=False
    )


GPU_SIZES = LossCheckSizes(SmallLoss(), _large(131072, 3), LossSizes(
    4096, 2048, 4096, 151936, 1, 3, 2**30, "bfloat16", "cuda"
))  # fmt: skip
TINY_SIZES = LossCheckSizes(
    SmallLoss(29, 11, 16, 61, 64, 4000),
    LossSizes(64, 32, 16, 64, 1, 1, 4000, peers=(), bare_products=False),
    LossSizes(32, 16, 16, 64, 1, 1, 4000, peers=("megatron+dense-kl",)),
    (),
)


def _tensors(sizes: SmallLoss, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(sizes.tokens + sizes.suffix, sizes.hidden, generator=generator)
    weight = torch.randn(sizes.padded, sizes.hidden, generator=generator) * 2 * sizes.hidden**-0.5
    mask = (torch.rand(sizes.tokens, generator=generator) > 0.2).float()
    labels = torch.randint(sizes.vocab_size, (sizes.tokens,), generator=generator)
    given = {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in given.items()}


def _weights(sizes: SmallLoss, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token weights that make `fused_linear_loss` the definition's means."""
    suffix = mask[sizes.tokens - sizes.suffix :]
    return mask / mask.sum(), _KL_WEIGHT * suffix / suffix.sum()


def _fused(sizes: SmallLoss, given: dict[str, Tensor]) -> dict[str, Tensor]:
    hidden, weight = (given[name].clone().requires_grad_() for name in ("hidden", "weight"))
    clm_weights, view_weights = _weights(sizes, given["mask"])
    loss = fused_linear_loss(
        hidden, weight, given["labels"], clm_weights, VocabularyShard(sizes.vocab_size, 0, sizes.padded),
        split_readings=lambda whole: whole.split([sizes.tokens, sizes.suffix]), view_weights=view_weights,
        chunk_bytes=sizes.chunk_bytes,
    )  # fmt: skip
    loss.total.backward()
    return {"objective": loss.total.detach(), "d hidden": hidden.grad, "d weight": weight.grad}


def _from_logits(sizes: SmallLoss, given: dict[str, Tensor], dtype: torch.dtype, total: Callable) -> dict[str, Tensor]:
    """Whole logits of `dtype`, and `total(standard, perturbed)` of them."""
    hidden, weight = (given[name].detach().to(dtype).requires_grad_() for name in ("hidden", "weight"))
    standard, again = F.linear(hidden, weight)[:, : sizes.vocab_size].split([sizes.tokens, sizes.suffix])
    value = total(standard, again)
    value.backward()
    return {"objective": value.detach(), "d hidden": hidden.grad, "d weight": weight.grad}


def loss_errors(sizes: SmallLoss, device: str, dtype: torch.dtype) -> tuple[dict[str, float], dict[str, float]]:
    """Relative errors (2-norm) of our loss and of torch's own in `dtype`, against `loss.definitions` in fp64."""
    given = _tensors(sizes, device, dtype)
    start = sizes.tokens - sizes.suffix

    def definition(standard: Tensor, again: Tensor) -> Tensor:
        perturbed = torch.cat([standard[:start].detach(), again])
        splits = torch.tensor([start], device=device)
        return objective(standard[None], perturbed[None], given["labels"][None], given["mask"][None], splits,
                         _KL_WEIGHT)[0]  # fmt: skip

    def plain(standard: Tensor, again: Tensor) -> Tensor:
        clm_weights, view_weights = _weights(sizes, given["mask"])
        log_p, log_q = again.float().log_softmax(-1), standard[start:].detach().float().log_softmax(-1)
        kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        clm = F.cross_entropy(standard.float(), given["labels"], reduction="none")
        return (clm * clm_weights).sum() + (kl * view_weights).sum()

    truth = _from_logits(sizes, given, torch.float64, definition)

    def errors(found: dict[str, Tensor]) -> dict[str, float]:
        return {name: ((found[name].double() - true).norm() / true.norm()).item() for name, true in truth.items()}

    return errors(_fused(sizes, given)), errors(_from_logits(sizes, given, dtype, plain))


def allowed_loss_error(name: str, torchs: float, dtype: torch.dtype) -> float:
    """Twice torch's own; or four roundings of fp32 or of a gradient, or half of one of bf16 in the value."""
    roundings = 0.5 if dtype == torch.bfloat16 and name == "objective" else 4
    return max(2 * torchs, roundings * torch.finfo(dtype).eps)


def loss_rows(
    device: str, sizes: LossCheckSizes, measure: Callable[[LossSizes], dict] = measure_loss_costs
) -> Iterator[Row]:
    """Against the definition in fp32 and bf16; then alone, beside peers that chunk, and (fewer tokens) beside all."""
    for dtype in (torch.float32, torch.bfloat16):
        what = f"fused loss, {str(dtype).removeprefix('torch.')}, small"
        yield from guarded("loss", what, functools.partial(_error_rows, what, sizes.small, device, dtype))
    release(device)
    what = f"fused loss, {_size(sizes.alone)}, hidden {sizes.alone.hidden}"
    yield from guarded("loss", what, lambda: _cost_rows(what, measure(sizes.alone), device))
    available, missing = available_peers(device, 1)
    for name, reason in missing.items():
        yield Row("loss", f"{name} beside the fused loss", reason=reason)
    cases = [(peer, sizes.alone) for peer in available if peer in sizes.large_peers]
    cases += [(peer, sizes.together) for peer in available]
    for number, (peer, case) in enumerate(cases):  # each in a process of its own: one may run out of memory
        case = dataclasses.replace(case, peers=(peer,), bare_products=case.bare_products and number + 1 == len(cases))
        yield from guarded("loss", f"{peer}, {_size(case)}", functools.partial(_together_rows, case, measure))


def _size(sizes: LossSizes) -> str:
    return f"{sizes.tokens} + {sizes.suffix_tokens} tokens x {sizes.vocab_size}"


def _error_rows(what: str, sizes: SmallLoss, device: str, dtype: torch.dtype) -> Iterator[Row]:
    ours, torchs = loss_errors(sizes, device, dtype)
    for name, error in ours.items():
        bound = allowed_loss_error(name, torchs[name], dtype)
        said = f"2 x torch's own, at least 4 roundings; torch {torchs[name]:.1e}"
        yield Row("loss", f"{what}: error of {name}", error, "relative", said, (0.0, bound))


def product_flops(sizes: LossSizes) -> float:
    """Operations of the six matrix products of every reading's rows with the weight."""
    return 6.0 * (sizes.tokens + sizes.suffix_tokens) * sizes.hidden * sizes.vocab_size


def _cost_rows(what: str, measured: dict, device: str) -> Iterator[Row]:
    row, sizes = measured["implementations"][OURS], LossSizes(**measured["sizes"])
    rate = product_flops(sizes) / row["seconds"] / 1e12
    peak = known_peak(torch.cuda.get_device_name()) if device == "cuda" else None
    share = f"; {rate / peak:.2f} of the peak" if peak else ""
    yield Row("loss", what, row["seconds"], "s", f"{rate:.4g} TFLOP/s in its products{share}")
    logits = (sizes.tokens + sizes.suffix_tokens) * sizes.vocab_size * getattr(torch, sizes.dtype).itemsize
    said = f"beyond inputs and gradients; whole logits: {logits / 2**30:.3g} GiB"
    yield Row("loss", f"{what}: peak memory", row["peak_bytes"] / 2**30, "GiB", said)


def _together_rows(case: LossSizes, measure: Callable[[LossSizes], dict]) -> Iterator[Row]:
    """Seconds and memory of the other implementations, and ours of the same run."""
    rows = measure(case)["implementations"]
    ours = rows.pop(OURS)
    for name, row in rows.items():
        what = f"{name}, {_size(case)}"
        said = f"ours {ours['seconds']:.4g} s, {ours['peak_bytes'] / 2**30:.3g} GiB"
        yield Row("loss", what, row["seconds"], "s", said)
        yield Row("loss", f"{what}: peak memory", row["peak_bytes"] / 2**30, "GiB", said)
        if "gradient_difference" in row:
            # A bf16 gradient is rounded to 2^-9; peers also round logits, to which the KL's gradient is sensitive.
            yield Row("loss", f"{what}: its gradients' difference from ours", row["gradient_difference"],
                      "relative", "two bf16 computations", (0.0, 0.05))  # fmt: skip
