"""How much of the attention of a prompt's last queries falls on the evidence, the first and last tokens, and the rest.

    share(c) = mean over the last r queries i of  sum over the keys j <= i of group c of  softmax_j(q_i k_j / sqrt(d))

for every layer and head; the four shares of a head add up to 1. The attention matrix is never whole: the model runs
with torch's SDPA, in chunks of the prompt, and only in the last chunk each layer forms the rows of the last r queries
beside it, [r, L] for every head. transformers hands what its model is called with on to each layer's attention
function, so the recorder travels as an argument and no state is shared between calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUPS = ("evidence", "sink", "local", "rest")
"""What a key belongs to, the first that applies."""
IMPLEMENTATION = "sdpa_with_last_rows"
"""The name under which transformers knows our attention function."""


@dataclass(frozen=True)
class MassSettings:
    """What is counted as what, in tokens.

    Raises:
        ValueError: a negative number, no query row, or a chunk that does not hold all query rows.
    """

    sink: int = 4
    """first tokens"""
    window: int = 128
    """a query's last tokens, itself included"""
    rows: int = 1
    """the prompt's last queries, which the shares are a mean over"""
    chunk: int = 2048
    """tokens that go through the model at once"""

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--sink-tokens", self.sink, 0),
            ("--local-window", self.window, 0),
            ("--query-rows", self.rows, 1),
            ("--chunk-tokens", self.chunk, self.rows),
        ):
            if value < least:
                raise ValueError(f"{flag} {value} must be at least {least}{' (--query-rows)' * (least > 1)}")


def key_groups(length: int, evidence: Sequence[tuple[int, int]], settings: MassSettings) -> Tensor:
    """Which of GROUPS each key belongs to for each of the last queries, int64 [rows, length]; -1 for later keys.

    Evidence comes first: a key that holds evidence counts as such wherever it stands.

    Args:
        evidence: half-open token spans.
    """
    query = torch.arange(length - settings.rows, length)[:, None]
    key = torch.arange(length)
    groups = torch.full((settings.rows, length), GROUPS.index("rest"))
    groups[query - key < settings.window] = GROUPS.index("local")
    groups[:, : settings.sink] = GROUPS.index("sink")
    for start, stop in evidence:
        groups[:, start:stop] = GROUPS.index("evidence")
    groups[key > query] = -1
    return groups


class MassRecorder:
    """Takes queries and keys of every layer and keeps the shares.

    Attributes:
        shares: [heads, 4] in fp32 (fp64 for an fp64 model) by layer, groups in the order of GROUPS.
    """

    def __init__(self, groups: Tensor) -> None:
        self.groups = groups
        self.shares: dict[int, Tensor] = {}

    def record(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        """Query [1, n, q, d], whose last rows are counted; key [1, g, L, d], both rotated."""
        (rows, length), heads = self.groups.shape, key.shape[1]
        assert key.shape[2] == length and query.shape[2] >= rows
        kind = torch.float64 if query.dtype == torch.float64 else torch.float32
        groups = self.groups.to(query.device)
        member = torch.stack([groups == index for index in range(len(GROUPS))], dim=-1).to(kind)  # [r, L, 4]
        last = query[0, :, -rows:].to(kind).unflatten(0, (heads, -1))  # [g, n/g, r, d]
        shares = []
        for some, keys in zip(last, key[0], strict=True):  # one group's keys at a time in fp32
            scores = (some @ keys.to(kind).T).mul_(scaling).masked_fill_(groups < 0, float("-inf"))
            shares.append(torch.einsum("hrl,rlc->hc", scores.softmax(dim=-1), member) / rows)
        self.shares[layer] = torch.cat(shares)


def _attention(module, query, key, value, attention_mask, scaling=None, mass_recorder=None, **kwargs):
    """transformers' SDPA attention; records beside it where the call carries a recorder."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if mass_recorder is not None:
        window = kwargs.get("sliding_window")
        if window is not None and window < mass_recorder.groups.shape[1]:
            raise ValueError(
                f"layer {module.layer_idx} attends to a window of {window} tokens, the prompt has "
                f"{mass_recorder.groups.shape[1]}: only models that attend to the whole prompt are measured"
            )
        mass_recorder.record(module.layer_idx, query, key, scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def load_model(hf: str, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """A causal model of a Hugging Face folder whose attention can be recorded."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=dtype, attn_implementation=IMPLEMENTATION)
    return model.eval().to(device)


@torch.no_grad()
def attention_shares(
    model: PreTrainedModel, ids: Sequence[int], evidence: Sequence[tuple[int, int]], settings: MassSettings
) -> Tensor:
    """Shares of one prompt, [layers, heads, 4] on the CPU, in fp32 (fp64 for an fp64 model).

    Args:
        model: from `load_model`.
        ids: the prompt's tokens.
        evidence: half-open spans of `ids`.

    Raises:
        ValueError: a prompt shorter than the query rows, or a model with attention windows.
    """
    from transformers import DynamicCache

    length = len(ids)
    if length < settings.rows:
        raise ValueError(f"--query-rows {settings.rows}: a prompt has only {length} tokens")
    tokens = torch.tensor([list(ids)], device=model.device)
    recorder = MassRecorder(key_groups(length, evidence, settings))
    cache, first = DynamicCache(config=model.config), (length - 1) % settings.chunk + 1
    stops = range(first, length + 1, settings.chunk)  # the last chunk is a full one, or the whole prompt
    for start, stop in zip([0, *stops], stops, strict=False):
        recording = {"mass_recorder": recorder} if stop == length else {}
        model(tokens[:, start:stop], past_key_values=cache, use_cache=True, logits_to_keep=1, **recording)
    assert len(recorder.shares) == model.config.num_hidden_layers, "the model kept the recorder from some layers"
    return torch.stack([share.cpu() for _, share in sorted(recorder.shares.items())])
