"""`--freeze-rope-dims`: rotary frequencies whose queries and keys stay as they are (arXiv 2604.06070's open question).

Frequency i of a head of d channels turns the pair (i, i + d/2). Freezing it freezes, in every layer and head, the rows
i and i + d/2 of W_q and W_k, their biases where the model has them (Qwen2), and the gains i and i + d/2 of the norms on
queries and keys (Qwen3). W_v and all else train on. What is frozen are parameters, not activations: hidden states, and
in Qwen3 the other channels that a norm divides by, still change what a frozen row gives.

How: gradients of frozen rows are zeroed after they were reduced and before they are clipped, so that the gradient's
norm is that of what trains. That alone stops neither weight decay nor the momentum of an earlier run. So the values
that the optimizer itself steps (in bf16 its fp32 main parameters, under the distributed optimizer this rank's shards)
are kept before its step and put back after it, bit by bit; copies and gathers of parameters follow from them.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Sequence

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.utils import unwrap_model
from megatron.training import get_args, training
from torch import Tensor

from megatron_rpsd.training.implied import head_dim_of

_FLAG = "--freeze-rope-dims"
_FREEZES = "_freezes_rope_dims_of_megatron_rpsd"
_OTHER_OPTIMIZERS = ("optimizer_cpu_offload", "use_precision_aware_optimizer", "use_megatron_fsdp", "use_torch_fsdp2")


def add_freezing_arguments(group) -> None:
    """Add the flag to the parser's group."""
    group.add_argument(
        _FLAG, type=str, default=None, metavar="0-3,12",
        help="Keep W_q and W_k (biases and query/key norms too) of these RoPE frequencies as they are: indices 0 "
        "(fastest) to d/2 - 1 (slowest) of the head dimension d.",
    )  # fmt: skip


def parse_dims(text: str, head_dim: int) -> list[int]:
    """Frequency indices, ascending, of a list such as 0-3,12.

    Raises:
        ValueError: one line: not of that form, or out of range.
    """
    dims: set[int] = set()
    for part in text.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f'{_FLAG} {text}: "{part.strip()}" is no index and no range; write for example 0-3,12')
        low, high = int(first), int(last or first)
        if low > high:
            raise ValueError(f"{_FLAG} {text}: the range {part.strip()} runs backwards; write {high}-{low}")
        if high >= head_dim // 2:
            raise ValueError(
                f"{_FLAG} {text}: there is no frequency {high}; a head of {head_dim} channels has head_dim / 2 = "
                f"{head_dim // 2}, 0 to {head_dim // 2 - 1}"
            )
        dims.update(range(low, high + 1))
    return sorted(dims)


def check_frozen_dims(args: argparse.Namespace) -> None:
    """Refuse what cannot run.

    Raises:
        ValueError: one line with the flag, the value and the arithmetic.
    """
    if args.freeze_rope_dims is None:
        return
    parse_dims(args.freeze_rope_dims, head_dim_of(args))
    if args.optimizer not in ("adam", "sgd"):
        raise ValueError(f"--optimizer {args.optimizer} beside {_FLAG}: use adam or sgd, whose steps are per element")
    for name in _OTHER_OPTIMIZERS:
        if getattr(args, name, False):
            raise ValueError(
                f"--{name.replace('_', '-')} beside {_FLAG}: the frozen rows are put back in fp32 main parameters, "
                "which that optimizer keeps elsewhere: leave one of the two out"
            )


def frozen_mask(
    name: str, parameter: Tensor, dims: Sequence[int], head_dim: int, heads_per_group: int
) -> Tensor | None:
    """Which elements of a parameter are frozen, bool of its shape; None where none is.

    Args:
        name: Megatron's, ending in linear_qkv.weight, linear_qkv.bias, q_layernorm.weight or k_layernorm.weight.
        parameter: this tensor-parallel rank's part: whole KV groups, each n/g query heads, a key head, a value head.
        dims: frequencies; each is the channels i and i + d/2.
    """
    module, _, kind = name.rpartition(".")
    module = module.rpartition(".")[2]
    head = torch.zeros(head_dim, dtype=torch.bool)
    for index in dims:
        head[index] = head[index + head_dim // 2] = True
    if module == "linear_qkv" and kind in ("weight", "bias"):
        group = torch.cat([head.repeat(heads_per_group + 1), torch.zeros_like(head)])  # queries and key; no value
        assert parameter.shape[0] % len(group) == 0, (name, tuple(parameter.shape), len(group))
        rows = group.repeat(parameter.shape[0] // len(group))
    elif module in ("q_layernorm", "k_layernorm") and kind == "weight":
        assert parameter.shape == head.shape, (name, tuple(parameter.shape))
        rows = head
    else:
        return None
    return rows.view(-1, *[1] * (parameter.dim() - 1)).expand(parameter.shape)


class FrozenDims:
    """Keeps the frozen elements of a model through its optimizer's steps.

    Args:
        stages: this rank's model stages.
        optimizer: Megatron's optimizer of these stages, chained or not.
    """

    def __init__(self, stages: Sequence[torch.nn.Module], optimizer, dims: Sequence[int]) -> None:
        self._masks: dict[torch.nn.Parameter, Tensor] = {}
        for stage in stages:
            model = unwrap_model(stage)
            config = model.config
            heads_per_group = config.num_attention_heads // config.num_query_groups
            for name, parameter in model.named_parameters():
                mask = frozen_mask(name, parameter, dims, config.kv_channels, heads_per_group)
                if mask is not None:
                    self._masks[parameter] = mask.to(parameter.device)
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            if not part.is_stub_optimizer:
                self._attach(part)

    def _attach(self, optimizer) -> None:
        original, kept = optimizer.prepare_grads, []

        @functools.wraps(original)
        def prepare_grads(*args, **kwargs):
            for parameter, mask in self._masks.items():
                parameter.main_grad.masked_fill_(mask, 0.0)
            return original(*args, **kwargs)

        @torch.no_grad()
        def keep(*_) -> None:
            kept.extend((stepped, mask, stepped[mask]) for stepped, mask in self._stepped(optimizer))

        @torch.no_grad()
        def put_back(*_) -> None:
            for stepped, mask, values in kept:
                stepped[mask] = values
            kept.clear()

        optimizer.prepare_grads = prepare_grads
        optimizer.optimizer.register_step_pre_hook(keep)
        optimizer.optimizer.register_step_post_hook(put_back)

    def _stepped(self, optimizer) -> Iterator[tuple[Tensor, Tensor]]:
        """What an optimizer steps of each parameter, and the mask of it, both flat.

        A shard of an fp32 parameter under the distributed optimizer is a view of the parameter.
        """
        for parameter, mask in self._masks.items():
            main = getattr(parameter, "main_param", None)
            if isinstance(optimizer, DistributedOptimizer):
                if parameter not in optimizer.model_param_gbuf_map:
                    continue  # no part of it is this rank's
                shard = optimizer._get_model_param_range_map(parameter)["param"]
                part = slice(shard.start, shard.end)
                flat = parameter.detach().view(-1)[part] if main is None else main
                yield flat, mask.flatten()[part]
            else:
                yield (parameter if main is None else main).detach().view(-1), mask.flatten()


def install_frozen_dims(args: argparse.Namespace) -> None:
    """Let the optimizer that Megatron builds for this run keep `--freeze-rope-dims`. Idempotent.

    Megatron's `pretrain` builds its optimizer itself and offers no hook behind it, so the function that it calls is
    wrapped. Ends when `pretrain` takes an optimizer provider.
    """
    original = training.get_megatron_optimizer
    if args.freeze_rope_dims is None or hasattr(original, _FREEZES):
        return

    @functools.wraps(original)
    def get_megatron_optimizer(config, model_chunks, *rest, **options):
        optimizer = original(config, model_chunks, *rest, **options)
        run = get_args()
        if run.freeze_rope_dims is not None:
            FrozenDims(model_chunks, optimizer, parse_dims(run.freeze_rope_dims, head_dim_of(run)))
        return optimizer

    setattr(get_megatron_optimizer, _FREEZES, True)
    training.get_megatron_optimizer = get_megatron_optimizer
