"""What a plan assumes of GPUs and of the links between them: vendors' figures, and shares of them that code reaches.

Nothing here was measured by this project. Figures are dense bf16, one direction of a link, decimal units; memory is
what torch reports. A node holds eight GPUs. Attention's share is that of FlashAttention-2 (arXiv 2307.08691), forward
and backward, its rebuilt scores not counted as work: about 0.5 of an A100 and 0.3 of an H100; for a B200 it is a guess.
"""

from __future__ import annotations

from dataclasses import dataclass

GPUS_PER_NODE = 8
_GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """One kind of GPU in nodes of eight.

    Attributes:
        memory_bytes: what a process can allocate of it.
        flops: bf16 matrix operations a second, without sparsity.
        memory_bandwidth: bytes a second.
        nvlink: bytes a second and direction between the GPUs of a node.
        network: bytes a second and direction of a GPU's own network card.
        attention_efficiency: share of `flops` that torch's flash attention reaches forward and backward together.
        source: where the figures stand.
    """

    name: str
    memory_bytes: int
    flops: float
    memory_bandwidth: float
    nvlink: float
    network: float
    attention_efficiency: float
    source: str


_NDR = "network: one 400 Gb/s card a GPU (DGX)"
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a100-80gb", int(79.2 * _GIB), 312e12, 2.04e12, 300e9, 25e9, 0.50,
            "NVIDIA A100 80 GB SXM data sheet; network: one 200 Gb/s card a GPU (DGX A100)"),
        GPU("h100-80gb", int(79.1 * _GIB), 989e12, 3.35e12, 450e9, 50e9, 0.30,
            f"NVIDIA H100 SXM data sheet; {_NDR} H100"),
        GPU("h200-141gb", int(139.8 * _GIB), 989e12, 4.8e12, 450e9, 50e9, 0.30,
            f"NVIDIA H200 SXM data sheet; {_NDR} H200"),
        GPU("b200", int(178.0 * _GIB), 2250e12, 8.0e12, 900e9, 50e9, 0.15,
            f"NVIDIA HGX B200 data sheet; {_NDR} B200"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Assumptions:
    """What a step time is computed with, beside the GPU's figures.

    Attributes:
        linear_efficiency: share of the GPU's `flops` in matrix products.
        attention_efficiency: share in attention; None: the GPU's own.
        memory_efficiency: share of the memory bandwidth in norms, rotation, activation and losses.
        link_efficiency: share of a link's bandwidth in collectives.
        overlap: share of communication hidden behind computation; none of the collectives here is started early.
        nvlink_latency, network_latency: seconds that a collective takes beside its bytes.
        reserved_bytes: CUDA context, NCCL buffers, cuBLAS workspaces.
        fragmentation: share of the activations' bytes that the allocator loses.
    """

    linear_efficiency: float = 0.60
    attention_efficiency: float | None = None
    memory_efficiency: float = 0.70
    link_efficiency: float = 0.75
    overlap: float = 0.0
    nvlink_latency: float = 20e-6
    network_latency: float = 60e-6
    reserved_bytes: int = 4 * _GIB
    fragmentation: float = 0.05

    def __post_init__(self) -> None:
        for name in ("linear_efficiency", "attention_efficiency", "memory_efficiency", "link_efficiency"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"--{name.replace('_', '-')} {value:g} must be a share above 0 and at most 1")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"--overlap {self.overlap:g} must be a share from 0 to 1")

    def describe(self, gpu: GPU) -> list[str]:
        """Lines for a reader, every figure with its unit."""
        attention = self.attention_efficiency or gpu.attention_efficiency
        return [
            f"{gpu.name}: {gpu.memory_bytes / _GIB:.1f} GiB, {gpu.flops / 1e12:g} TFLOP/s bf16, memory "
            f"{gpu.memory_bandwidth / 1e12:g} TB/s, NVLink {gpu.nvlink / 1e9:g} GB/s and network "
            f"{gpu.network / 1e9:g} GB/s a GPU and direction, {GPUS_PER_NODE} GPUs a node ({gpu.source})",
            f"assumed shares of these: matrix products {self.linear_efficiency:g}, attention {attention:g}, memory "
            f"{self.memory_efficiency:g}, links {self.link_efficiency:g}; communication hidden {self.overlap:g}; a "
            f"collective costs {self.nvlink_latency * 1e6:g} us (NVLink) or {self.network_latency * 1e6:g} us besides",
            f"memory kept back: {self.reserved_bytes / _GIB:g} GiB (context, NCCL, cuBLAS) and "
            f"{100 * self.fragmentation:g}% of the activations (fragmentation)",
        ]


DEFAULTS = Assumptions()
