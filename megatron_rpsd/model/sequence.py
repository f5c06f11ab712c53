"""What a micro-batch carries through Megatron's layers: its layout and its rotary tables."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_rpsd.parallel import ViewLayout


@dataclass
class ViewSequence(PackedSeqParams):
    """Layout and rotary tables of one micro-batch, on its way from the forward step to every core attention.

    Megatron hands `packed_seq_params` to each layer as an argument and captures it in the closures of activation
    recomputation, so that under 1F1B a layer run again sees its own micro-batch, not the latest one.

    Attributes:
        layout: the local tokens of both views.
        cos, sin: fp32 [b, (2L-t)/cp, d/2], the local tokens' rotary tables.
        documents: borders of every row's documents in the whole sequence, which attention does not cross; None: it is
            causal over the whole window.
    """

    layout: ViewLayout = None
    cos: Tensor = None
    sin: Tensor = None
    documents: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        self.qkv_format = "sbhd"  # Megatron tests this field for 'thd' (packed documents)
        super().__post_init__()
