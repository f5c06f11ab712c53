"""CLM and the view pair's reverse KL as others compute them: what `fused_linear_loss` is measured against.

Each takes (hidden [n + m, 1, h], weight [v/tp, h], labels [n], m, tp_group) and returns the two sums, differentiable,
from hidden states that are whole on every tensor-parallel rank.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region, vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from torch import Tensor

Sums = tuple[Tensor, Tensor]
Peer = Callable[[Tensor, Tensor, Tensor, int, dist.ProcessGroup], Sums]


def _output_layer(hidden: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Megatron's column-parallel output layer, [n + m, 1, v/tp]."""
    return linear_with_grad_accumulation_and_async_allreduce(
        hidden, weight, None, gradient_accumulation_fusion=False, allreduce_dgrad=group.size() > 1,
        sequence_parallel=False, tp_group=group,
    )  # fmt: skip


def _dense_log_softmax(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """log softmax over all ranks' columns by plain autograd, fp32."""
    logits = logits.float()
    largest = logits.detach().amax(dim=-1, keepdim=True)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    shifted = logits - largest
    total = torch.distributed.nn.functional.all_reduce(shifted.exp().sum(dim=-1, keepdim=True), group=group)
    return shifted - total.log()


def megatron_and_dense_kl(hidden: Tensor, weight: Tensor, labels: Tensor, m: int, group: dist.ProcessGroup) -> Sums:
    """Megatron's output layer and cross-entropy, and the KL as its formula is written."""
    logits = _output_layer(hidden, weight, group)
    standard, perturbed = logits[: len(labels)], logits[len(labels) :]
    log_p = _dense_log_softmax(perturbed, group)
    log_q = _dense_log_softmax(standard[len(labels) - m :].detach(), group)
    kl = reduce_from_tensor_model_parallel_region((log_p.exp() * (log_p - log_q)).sum(), group=group)
    # Last, since it overwrites fp32 logits.
    return vocab_parallel_cross_entropy(standard, labels.unsqueeze(1)).sum(), kl


def megatron_and_modelopt(hidden: Tensor, weight: Tensor, labels: Tensor, m: int, group: dist.ProcessGroup) -> Sums:
    """Megatron's output layer and cross-entropy, and nvidia-modelopt's logits KL, reversed."""
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    config = SimpleNamespace(tensor_model_parallel_size=group.size(), sequence_parallel=False)
    logits = _output_layer(hidden, weight, group)
    standard, perturbed = logits[: len(labels)], logits[len(labels) :]
    per_token, tp_reduce, _ = LogitsKLLoss(config, reverse=True)(perturbed, standard[len(labels) - m :])
    kl = per_token.sum()
    if tp_reduce and group.size() > 1:
        kl = reduce_from_tensor_model_parallel_region(kl, group=group)
    return vocab_parallel_cross_entropy(standard, labels.unsqueeze(1)).sum(), kl


def liger(hidden: Tensor, weight: Tensor, labels: Tensor, m: int, group: dist.ProcessGroup) -> Sums:
    """Liger-Kernel's fused linear cross-entropy and fused linear JSD at beta 1, its reverse KL (one GPU)."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    standard, perturbed = hidden.squeeze(1).split([len(labels), m])
    clm = LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, standard, labels)
    kl = LigerFusedLinearJSD(jsd_beta=1.0)(perturbed, weight, standard[len(labels) - m :].detach(), weight.detach())
    return clm, kl * m  # its mean over tokens


def compiled_chunks(hidden: Tensor, weight: Tensor, labels: Tensor, m: int, group: dist.ProcessGroup) -> Sums:
    """torch.compile of a chunk of 1,024 tokens, recomputed in backward (one GPU)."""
    from torch.utils.checkpoint import checkpoint

    standard, perturbed = hidden.squeeze(1).split([len(labels), m])
    teacher = torch.cat([standard.new_zeros(len(labels) - m, hidden.shape[-1]), standard[len(labels) - m :]]).detach()
    clm, kl = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(labels), 1024):
        rows = slice(start, start + 1024)
        clm = clm + checkpoint(_compiled_clm(), standard[rows], weight, labels[rows], use_reentrant=False)
    for start in range(0, m, 1024):
        rows = slice(start, start + 1024)
        other = teacher[len(labels) - m :][rows]
        kl = kl + checkpoint(_compiled_kl(), perturbed[rows], other, weight, use_reentrant=False)
    return clm, kl


def _compiled_clm() -> Callable:
    def clm(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")

    return torch.compile(clm)


def _compiled_kl() -> Callable:
    def kl(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        log_p = (student @ weight.T).float().log_softmax(-1)
        log_q = (teacher @ weight.detach().T).float().log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum()

    return torch.compile(kl)


def available_peers(device: str, tp_size: int) -> tuple[dict[str, Peer], dict[str, str]]:
    """Peers that can run here, and why others cannot, by name."""
    beside = Path(sys.prefix) / "peers"  # `make venv` puts them there
    if beside.is_dir() and str(beside) not in sys.path:
        sys.path.append(str(beside))
    peers: dict[str, Peer] = {"megatron+dense-kl": megatron_and_dense_kl}
    missing = {}
    wanted = {"megatron+modelopt": ("modelopt", megatron_and_modelopt)}
    if device == "cuda" and tp_size == 1:
        peers["torch-compiled-chunks"] = compiled_chunks
        wanted["liger"] = ("liger_kernel", liger)
    else:
        missing["torch-compiled-chunks"] = missing["liger"] = "needs one GPU"
    for name, (package, peer) in wanted.items():
        if importlib.util.find_spec(package):
            peers[name] = peer
        else:
            missing[name] = f"the package {package} is not installed; see tools/peers.txt"
    return peers, missing
