"""Measured cost of a view pair over one view: same model, same process, repetitions interleaved, medians.

A step is a forward and a backward pass through Megatron's schedule and DDP. The optimizer is left out: it costs the
same in all three and would only bring the ratios nearer to 1.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_rpsd.planning.flops import ModelShape, step_ratio_bound
from megatron_rpsd.positions import View

WAYS = ("clm", "full", "shared-prefix")


@dataclass(frozen=True)
class CostSettings:
    """What is measured.

    `arguments`: Megatron's, in place of those that `shape` and `device` give; they have to describe the same model.
    `count_saved`: whether to run another forward pass that counts what is kept for the backward pass.
    """

    seq_length: int
    shape: ModelShape
    splits: int = 8
    repetitions: int = 1
    device: str = "cpu"
    arguments: tuple[str, ...] | None = None
    count_saved: bool = True

    def split_points(self) -> list[int]:
        """The middles of equal strata, rounded down to 32 tokens."""
        return [int((k + 0.5) / self.splits * self.seq_length) // 32 * 32 for k in range(self.splits)]


def _arguments(settings: CostSettings) -> list[str]:
    shape = settings.shape
    sizes = {
        "--num-layers": shape.num_layers,
        "--hidden-size": shape.hidden_size,
        "--ffn-hidden-size": shape.ffn_hidden_size,
        "--num-attention-heads": shape.num_attention_heads,
        "--num-query-groups": shape.num_query_groups,
        "--kv-channels": shape.head_dim,
        "--vocab-size": shape.vocab_size,
        "--seq-length": settings.seq_length,
        "--max-position-embeddings": settings.seq_length,
        "--attention-dropout": 0,
        "--hidden-dropout": 0,
    }
    words = [str(word) for pair in sizes.items() for word in pair]
    return [
        *words, "--group-query-attention", "--swiglu", "--disable-bias-linear", "--normalization", "RMSNorm",
        "--position-embedding-type", "rope", "--tokenizer-type", "NullTokenizer", "--device", settings.device,
        "--no-check-for-nan-in-loss-and-grad", *([] if settings.device == "cpu" else ["--bf16"]),
    ]  # fmt: skip


class _SavedForBackward:
    """Counts what a forward pass keeps for its backward pass: the bytes of distinct storages, parameters left out.

    A process's resident set cannot tell, since its allocator keeps what was freed.
    """

    def __init__(self, parameters) -> None:
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def __enter__(self) -> _SavedForBackward:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    def __exit__(self, *exception) -> None:
        self._hooks.__exit__(*exception)

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


def step_runner(settings: CostSettings):
    """Functions (way, view) -> seconds of a step, and (way, view) -> bytes saved for backward, over one model.

    They belong to a session, which the caller ends.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_rpsd.training.run import forward_step_from_args
    from megatron_rpsd.training.session import build_stages, start_session

    args, config = start_session(_arguments(settings) if settings.arguments is None else settings.arguments)
    (stage,) = build_stages(config, args, wrap_with_ddp=True)
    ids = torch.randint(0, settings.shape.vocab_size, (1, settings.seq_length + 1))
    sample = {"tokens": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": torch.ones(1, settings.seq_length)}
    forward_step = forward_step_from_args(args, config)

    def forward_pass(way: str, view: View):
        start = {"clm": None, "full": 0, "shared-prefix": view.split}[way]
        return forward_step.run(stage, sample, [view], forward_step.layout(start))

    def saved_bytes(way: str, view: View) -> int:
        with _SavedForBackward(stage.parameters()) as saved:
            forward_pass(way, view)
        return saved.bytes

    def seconds(way: str, view: View) -> float:
        stage.zero_grad_buffer()
        torch.cuda.synchronize()
        started = time.perf_counter()
        get_forward_backward_func()(
            forward_step_func=lambda iterator, model: forward_pass(way, view), data_iterator=None, model=stage,
            num_microbatches=1, seq_length=settings.seq_length, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        torch.cuda.synchronize()
        return time.perf_counter() - started

    return seconds, saved_bytes


def measure_view_costs(settings: CostSettings, progress: Callable[[str], None] = lambda line: None) -> dict:
    """Time every way at every split, interleaved.

    Returns:
        step_ratio and flop_bound per way (means over splits), seconds (medians), activation_bytes (saved for
        backward, means over splits), and every split's row.
    """
    from megatron_rpsd.training.session import end_session

    run, saved_bytes = step_runner(settings)
    try:
        for way in WAYS:  # first calls allocate
            run(way, View(settings.split_points()[0], 7))
        rows = []
        for split in settings.split_points():
            view = View(split, settings.seq_length // 3)
            measured = {way: [] for way in WAYS}
            for _ in range(settings.repetitions):
                for way in WAYS:
                    measured[way].append(run(way, view))
            seconds = {way: statistics.median(values) for way, values in measured.items()}
            saved = {way: saved_bytes(way, view) if settings.count_saved else 0 for way in WAYS}
            bound = step_ratio_bound(settings.shape, settings.seq_length, split)
            row = {"split": split, "seconds": seconds, "activation_bytes": saved}
            rows.append({**row, "shared_prefix_bound": bound})
            progress(
                f"split {split:6d}: clm {seconds['clm']:.2f} s, full {seconds['full'] / seconds['clm']:.3f} x, "
                f"shared-prefix {seconds['shared-prefix'] / seconds['clm']:.3f} x (bound {bound:.3f})"
            )
    finally:
        end_session()
    clm = statistics.median(row["seconds"]["clm"] for row in rows)
    ratio = {way: statistics.mean(row["seconds"][way] for row in rows) / clm for way in WAYS[1:]}
    bounds = {"full": 2.0, "shared-prefix": statistics.mean(row["shared_prefix_bound"] for row in rows)}
    return {
        "seq_length": settings.seq_length,
        "shape": vars(settings.shape),
        "step_ratio": ratio,
        "flop_bound": bounds,
        "ratio_over_bound": {way: ratio[way] / bounds[way] for way in ratio},
        "seconds": {way: statistics.median(row["seconds"][way] for row in rows) for way in WAYS},
        "activation_bytes": {way: statistics.mean(row["activation_bytes"][way] for row in rows) for way in WAYS},
        "splits": rows,
    }
