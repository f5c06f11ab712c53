"""Measured time and memory of the fused loss beside other implementations: same inputs, same processes, interleaved.

Memory is what a rank takes at its peak beyond inputs and the gradients it returns: the process's high-water mark of
resident memory on CPU (which counts libraries' buffers too), the allocator's on a GPU. Beside the implementations stand
the bare matrix products that none of them avoids: logits, d hidden and d weight of both readings.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rpsd.evaluation.launch import run_on_local_ranks
from megatron_rpsd.loss import DEFAULT_CHUNK_BYTES
from megatron_rpsd.planning.peak_memory import PeakMemory

OURS = "fused"


@dataclass(frozen=True)
class LossSizes:
    """What is measured; `suffix_tokens` of the standard view's `tokens` are read twice. `peers` None: all there are."""

    tokens: int
    suffix_tokens: int
    hidden: int
    vocab_size: int
    tensor_model_parallel_size: int = 1
    repetitions: int = 3
    chunk_bytes: int = DEFAULT_CHUNK_BYTES["cpu"]
    dtype: str = "float32"
    device: str = "cpu"
    peers: tuple[str, ...] | None = None
    bare_products: bool = True


class _Inputs:
    """Both readings' hidden states, this rank's weight and the labels."""

    def __init__(self, sizes: LossSizes, group: dist.ProcessGroup) -> None:
        from megatron_rpsd.parallel import VocabularyShard

        dtype = getattr(torch, sizes.dtype)
        torch.manual_seed(1)  # hidden states are the same on every rank
        self.hidden = torch.randn(sizes.tokens + sizes.suffix_tokens, 1, sizes.hidden, device=sizes.device, dtype=dtype)
        self.labels = torch.randint(sizes.vocab_size, (sizes.tokens,), device=sizes.device)
        columns = -(-sizes.vocab_size // group.size())
        torch.manual_seed(2 + group.rank())
        self.weight = torch.randn(columns, sizes.hidden, device=sizes.device, dtype=dtype) * 2 * sizes.hidden**-0.5
        self.shard = VocabularyShard.of_rank(sizes.vocab_size, columns, group)
        self.hidden.requires_grad_()
        self.weight.requires_grad_()

    def take_gradients(self) -> list[Tensor]:
        taken = [self.hidden.grad, self.weight.grad]
        self.hidden.grad = self.weight.grad = None
        return taken


def _ours(sizes: LossSizes, inputs: _Inputs, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

    from megatron_rpsd.loss import fused_linear_loss

    def readings(hidden: Tensor):
        whole = copy_to_tensor_model_parallel_region(hidden, group=group).squeeze(1)
        return whole.split([sizes.tokens, sizes.suffix_tokens])

    ones = inputs.hidden.new_ones(sizes.tokens, dtype=torch.float32)
    loss = fused_linear_loss(
        inputs.hidden, inputs.weight, inputs.labels, ones, inputs.shard, split_readings=readings,
        view_weights=ones[: sizes.suffix_tokens], chunk_bytes=sizes.chunk_bytes,
    )  # fmt: skip
    return loss.total, loss.clm.sum(), loss.view.sum()


def _bare_products(inputs: _Inputs) -> None:
    hidden, weight = inputs.hidden.detach().squeeze(1), inputs.weight.detach()
    logits = hidden @ weight.T
    inputs.hidden.grad = (logits @ weight).unsqueeze(1)
    inputs.weight.grad = logits.T @ hidden


def _implementations(sizes: LossSizes, inputs: _Inputs, group: dist.ProcessGroup):
    """Functions that run forward and backward and return (CLM, KL), by name, and what is missing."""
    from megatron_rpsd.planning.loss_peers import available_peers

    peers, missing = available_peers(sizes.device, group.size())
    if sizes.peers is not None:
        peers, missing = {name: peers[name] for name in sizes.peers}, {}

    def ours() -> tuple[float, float]:
        total, clm, kl = _ours(sizes, inputs, group)
        total.backward()
        return clm.item(), kl.item()

    def run(peer) -> tuple[float, float]:
        clm, kl = peer(inputs.hidden, inputs.weight, inputs.labels, sizes.suffix_tokens, group)
        (clm + kl).backward()
        return clm.item(), kl.item()

    runs = {OURS: ours, **{name: lambda peer=peer: run(peer) for name, peer in peers.items()}}
    if sizes.bare_products:
        runs["bare products"] = lambda: _bare_products(inputs)
    return runs, missing


def _rank(sizes: LossSizes) -> dict:
    """One rank's whole measurement; the slowest rank's seconds and the largest rank's bytes are returned."""
    from megatron.core import parallel_state

    from megatron_rpsd.training.main import choose_device

    choose_device(["--device", sizes.device])
    if sizes.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if sizes.device == "cuda" else "gloo")
    parallel_state.initialize_model_parallel(sizes.tensor_model_parallel_size)
    group = parallel_state.get_tensor_model_parallel_group()
    inputs = _Inputs(sizes, group)
    runs, missing = _implementations(sizes, inputs, group)
    rows = {name: {"seconds": [], "peak_bytes": 0} for name in runs}
    gradients = {}
    for repetition in range(1 + sizes.repetitions):  # the first one allocates and compiles
        for name, run in runs.items():
            dist.barrier()
            memory = PeakMemory(sizes.device)
            started = time.perf_counter()
            values = run()
            torch.cuda.synchronize()
            seconds, taken = time.perf_counter() - started, memory.taken()
            returned = inputs.take_gradients()
            row = rows[name]
            if repetition:
                row["seconds"].append(seconds)
                row["peak_bytes"] = max(row["peak_bytes"], taken - sum(gradient.nbytes for gradient in returned))
            elif values is not None:
                row["clm"], row["kl"] = values
                gradients[name] = returned
                row["gradient_difference"] = _difference(returned, gradients[OURS])
            if repetition == 0 and dist.get_rank() == 0:
                print(f"{name}: {seconds:.2f} s (warming up)", flush=True)
        gradients.clear()
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, rows)
    dist.destroy_process_group()
    return {"implementations": _worst(gathered), "missing": missing}


def _difference(found: list[Tensor], ours: list[Tensor]) -> float:
    """Largest relative difference of a gradient, in the 2-norm."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, ours, strict=True))


def _worst(ranks: list[dict]) -> dict:
    merged = {}
    for name, row in ranks[0].items():
        seconds = [max(values) for values in zip(*(rank[name]["seconds"] for rank in ranks), strict=True)]
        peak = max(rank[name]["peak_bytes"] for rank in ranks)
        difference = max(rank[name].get("gradient_difference", 0.0) for rank in ranks)
        merged[name] = {**row, "seconds": statistics.median(seconds), "peak_bytes": peak}
        if "gradient_difference" in row:
            merged[name]["gradient_difference"] = difference
    return merged


def measure_loss_costs(sizes: LossSizes, progress: Callable[[str], None] = lambda line: None) -> dict:
    """Time and memory of every implementation, and ours over the best peer's.

    Returns:
        implementations: by name, seconds (median; the slowest rank's), peak_bytes (the largest rank's), clm and kl sums
        and gradient_difference from ours; ratio_seconds, ratio_peak_bytes over the best peer (absent without peers);
        ratio_seconds_bare over the bare products; missing peers with reasons; sizes.
    """
    # Ranks would tell that Apex is absent, and of functions that peers should no longer call.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning,ignore::FutureWarning")
    progress(f"{sizes.repetitions} repetitions after a first one, on {sizes.tensor_model_parallel_size} ranks")
    measured = run_on_local_ranks(_rank, sizes.tensor_model_parallel_size, sizes)
    rows = measured["implementations"]
    result = {"sizes": vars(sizes), **measured, "device": _device_name(sizes.device)}
    peers = [row for name, row in rows.items() if name not in (OURS, "bare products")]
    for key in ("seconds", "peak_bytes") if peers else ():
        result[f"ratio_{key}"] = rows[OURS][key] / min(row[key] for row in peers)
    if "bare products" in rows:
        result["ratio_seconds_bare"] = rows[OURS]["seconds"] / rows["bare products"]["seconds"]
    return result


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {os.cpu_count()} cores"
