"""How a perturbation of positions travels through a model: layer by layer, from queries and keys to the logits.

After "Short Data, Long Context" (arXiv 2604.06070): a random chunk of tokens is repeated, and the same tokens are read
twice, under standard positions and with the positions from one repeat on shifted. Tokens, order and causal mask stay:

    tokens      chunk | chunk | chunk | chunk | chunk | chunk        repeat 0, 1, 2, ...
    standard    0 1 2 | 3 4 5 | 6 7 8 | 9 ...
    shifted     0 1 2 | 3 4 5 | 6+y 7+y 8+y | 9+y ...                from repeat 2 on ("onward")
                0 1 2 | 3 4 5 | 6+y 7+y 8+y | 9 ...                  repeat 2 alone ("single")

Under "single" the first layer's queries and keys of later repeats are those of the standard reading, so what changes
there was carried by attention. A change of a vector x of a token is |x' - x| / |x|. Nothing before the shifted repeat
can change, and in a causal model nothing does: those changes are 0, not small.

The model is transformers' own, in fp32; queries and keys are taken where its attention function receives them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megatron_rpsd.checkpoint.hf_folder import HFFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANTITIES = (
    "queries before RoPE",
    "keys before RoPE",
    "attention output",
    "queries",
    "keys",
    "hidden states",
)
"""What is compared in every layer, all heads of a token together: queries and keys as projected (in Qwen3 normalised)
and as rotated, the values that attention averages before W_o, and the layer's output."""
SCOPES = ("onward", "single")
IMPLEMENTATION = "sdpa_with_positions_traced"
"""The name under which transformers knows our attention function."""
_ROWS = 256
"""Tokens whose logits are formed at once."""


@dataclass(frozen=True)
class TraceSettings:
    """What is read.

    Raises:
        ValueError: a number out of range, naming its flag.
    """

    chunk: int = 64
    """--chunk: tokens of a repeat"""
    repeats: int = 8
    """--repeats"""
    shift_repeat: int = 5
    """--shift-repeat: the first repeat whose positions are shifted, counted from 0"""
    shifts: tuple[int, ...] = (1, 8, 64, 256)
    """--shifts: positions, each a reading of its own"""
    scope: str = "onward"
    """--scope: shift all repeats from that one on, or a single one"""
    sequences: int = 4
    """--sequences: random chunks, which the results are a mean over"""
    seed: int = 0
    """--seed of the chunks"""

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--chunk", self.chunk, 1),
            ("--repeats", self.repeats, 2),
            ("--sequences", self.sequences, 1),
            ("--seed", self.seed, 0),
        ):
            if value < least:
                raise ValueError(f"{flag} {value} must be at least {least}")
        if not 1 <= self.shift_repeat < self.repeats:
            raise ValueError(
                f"--shift-repeat {self.shift_repeat} must lie in 1..{self.repeats - 1} (repeats are counted from 0): "
                "RoPE does not see a shift of the whole sequence"
            )
        if not self.shifts or min(self.shifts) < 1 or len(set(self.shifts)) < len(self.shifts):
            raise ValueError(
                f"--shifts {' '.join(map(str, self.shifts))}: give different shifts of at least 1 position"
            )
        if self.scope not in SCOPES:
            raise ValueError(f"--scope {self.scope} is unknown: choose {' or '.join(SCOPES)}")

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.chunk * self.repeats

    @property
    def border(self) -> int:
        """The first token whose position is shifted."""
        return self.chunk * self.shift_repeat

    @property
    def distances(self) -> list[tuple[int, int]]:
        """Half-open ranges of distances from the border, in tokens: [0, 1), [1, 2), [2, 4), [4, 8), ..."""
        behind, bounds = self.length - self.border, [0, 1]
        while bounds[-1] < behind:
            bounds.append(min(2 * bounds[-1], behind))
        return list(zip(bounds, bounds[1:], strict=False))

    def tokens(self, vocab_size: int) -> Tensor:
        """The repeated chunks, int64 [sequences, length], uniform over the vocabulary."""
        chunks = np.random.default_rng(self.seed).integers(0, vocab_size, (self.sequences, self.chunk))
        return torch.from_numpy(np.tile(chunks, (1, self.repeats)))

    def position_ids(self, shift: int) -> Tensor:
        """int64 [length]."""
        positions = torch.arange(self.length)
        end = self.length if self.scope == "onward" else self.border + self.chunk
        positions[self.border : end] += shift
        return positions


@dataclass(frozen=True)
class Trace:
    """Means over the sequences, token by token.

    Attributes:
        changes: shift -> quantity -> relative change, float64 [layers, length].
        kl: shift -> KL(shifted || standard) of the next token, in nats, float64 [length].
    """

    settings: TraceSettings
    changes: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    kl: dict[int, np.ndarray] = field(default_factory=dict)

    def per_repeat(self, values: np.ndarray) -> np.ndarray:
        """Mean over the tokens of each repeat, [..., repeats], of values [..., length]."""
        return values.reshape(*values.shape[:-1], self.settings.repeats, self.settings.chunk).mean(axis=-1)

    def by_distance(self, values: np.ndarray) -> np.ndarray:
        """Mean over the tokens of each range of `TraceSettings.distances`, of values [..., length]."""
        behind = values[..., self.settings.border :]
        return np.stack([behind[..., low:high].mean(axis=-1) for low, high in self.settings.distances], axis=-1)

    def largest_before_border(self) -> float:
        """The largest change of anything before the shifted repeat: 0 in a causal model."""
        before = [values[..., : self.settings.border] for parts in self.changes.values() for values in parts.values()]
        return float(
            max(np.abs(part).max() for part in [*before, *(kl[: self.settings.border] for kl in self.kl.values())])
        )


class Recorder:
    """Takes the vectors of one reading and keeps them, or compares them with those of another.

    Args:
        standard: the recorder of the standard reading; None in that reading itself.

    Attributes:
        vectors: (quantity, layer) -> [length, width], of the standard reading alone.
        changes: (quantity, layer) -> relative change, fp32 [length], of a shifted reading alone.
    """

    def __init__(self, standard: Recorder | None = None) -> None:
        self.standard = standard
        self.vectors: dict[tuple[str, int], Tensor] = {}
        self.changes: dict[tuple[str, int], Tensor] = {}

    def take(self, quantity: str, layer: int, vectors: Tensor) -> None:
        """`vectors`: [1, length, ...] of one quantity."""
        vectors = vectors[0].flatten(1).float()
        key = quantity, layer
        assert key not in self.vectors and key not in self.changes, key
        if self.standard is None:
            self.vectors[key] = vectors.clone()
            return
        before = self.standard.vectors[key]
        change = (vectors - before).norm(dim=-1)
        self.changes[key] = torch.where(change == 0, change, change / before.norm(dim=-1)).cpu()


def _attention(module, query, key, value, attention_mask, position_trace=None, **kwargs):
    """transformers' SDPA attention, beside which the call's recorder takes what goes in and what comes out."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if position_trace is not None:
        for quantity, vectors in (
            ("queries", query.transpose(1, 2)),
            ("keys", key.transpose(1, 2)),
            ("attention output", output),
        ):
            position_trace.take(quantity, module.layer_idx, vectors)
    return output, weights


@contextlib.contextmanager
def model_folder(hf: str | None, checkpoint: str | None, hf_reference: str | None) -> Iterator[tuple[str, str]]:
    """(Hugging Face folder to load, name of the model): `hf` itself, or a checkpoint's export, removed at the end.

    So one model code is traced, whatever the model is stored as.

    Raises:
        ValueError: no reference for a checkpoint, one without a checkpoint, or a model that does not convert.
    """
    if checkpoint is None:
        if hf_reference is not None:
            raise ValueError(f"--hf-reference {hf_reference} belongs to --checkpoint; leave it out beside --hf")
        HFFolder(hf).check()
        yield hf, hf
        return
    if hf_reference is None:
        raise ValueError(f"--checkpoint {checkpoint} needs --hf-reference, the folder that its model was imported from")
    from megatron_rpsd.checkpoint.convert import export_hf  # Megatron takes seconds to import

    with tempfile.TemporaryDirectory() as folder:
        exported = str(Path(folder) / "exported")
        export_hf(checkpoint, hf_reference, exported)
        yield exported, checkpoint


def load_traced_model(hf: str, device: str = "cpu") -> PreTrainedModel:
    """A causal model of a Hugging Face folder in fp32, ready to be traced."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation=IMPLEMENTATION)
    return model.eval().to(device)


def _read(model: PreTrainedModel, tokens: Tensor, position_ids: Tensor, recorder: Recorder) -> Tensor:
    """One reading, [length] tokens at [length] positions: the last hidden states, [length, h]."""
    length, handles = len(tokens), []
    # transformers would take a jump of the positions for the beginning of another document; this mask is explicit.
    causal = torch.ones(length, length, dtype=torch.bool, device=model.device).tril()[None, None]

    def listen(module, quantity: str, layer: int) -> None:
        def hook(_, __, output) -> None:
            recorder.take(quantity, layer, output[0] if isinstance(output, tuple) else output)

        handles.append(module.register_forward_hook(hook))

    for layer, block in enumerate(model.base_model.layers):
        attention = block.self_attn
        listen(getattr(attention, "q_norm", attention.q_proj), "queries before RoPE", layer)
        listen(getattr(attention, "k_norm", attention.k_proj), "keys before RoPE", layer)
        listen(block, "hidden states", layer)
    try:
        output = model.base_model(
            input_ids=tokens[None].to(model.device), position_ids=position_ids[None].to(model.device),
            attention_mask=causal, use_cache=False, position_trace=recorder,
        )  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
    return output.last_hidden_state[0]


def _divergence(model: PreTrainedModel, shifted: Tensor, standard: Tensor) -> Tensor:
    """KL(shifted || standard) of the next token in nats, fp64 [length], from last hidden states [length, h]."""
    head, parts = model.get_output_embeddings(), []
    for p_hidden, q_hidden in zip(shifted.split(_ROWS), standard.split(_ROWS), strict=True):
        log_p, log_q = (head(hidden).double().log_softmax(dim=-1) for hidden in (p_hidden, q_hidden))
        parts.append((log_p.exp() * (log_p - log_q)).sum(dim=-1).cpu())
    return torch.cat(parts)


@torch.no_grad()
def trace_positions(
    model: PreTrainedModel, settings: TraceSettings, progress: Callable[[], None] = lambda: None
) -> Trace:
    """Trace every shift of `settings` through a model from `load_traced_model`.

    Memory: all vectors of one standard reading, layers x length x (2 h + 3 n d + 2 g d) fp32 numbers about.

    Args:
        progress: called after every reading; there are sequences x (1 + shifts).
    """
    trace, layers = Trace(settings), len(model.base_model.layers)
    for shift in settings.shifts:
        trace.changes[shift] = {name: np.zeros((layers, settings.length)) for name in QUANTITIES}
        trace.kl[shift] = np.zeros(settings.length)
    for tokens in settings.tokens(model.config.vocab_size):
        standard = Recorder()
        standard_hidden = _read(model, tokens, settings.position_ids(0), standard)
        progress()
        for shift in settings.shifts:
            shifted = Recorder(standard)
            hidden = _read(model, tokens, settings.position_ids(shift), shifted)
            for (quantity, layer), change in shifted.changes.items():
                trace.changes[shift][quantity][layer] += change.double().numpy() / settings.sequences
            trace.kl[shift] += _divergence(model, hidden, standard_hidden).numpy() / settings.sequences
            progress()
    return trace


def trace_record(trace: Trace) -> dict:
    """The trace as a JSON value: means by repeat and by distance from the border."""
    settings = trace.settings
    return {
        "settings": {**vars(settings), "shifts": list(settings.shifts)},
        "length": settings.length,
        "border": settings.border,
        "distances": [list(part) for part in settings.distances],
        "largest_before_border": trace.largest_before_border(),
        "shifts": {
            str(shift): {
                "kl_per_repeat": trace.per_repeat(trace.kl[shift]).tolist(),
                "kl_by_distance": trace.by_distance(trace.kl[shift]).tolist(),
                "kl_per_token": trace.kl[shift].tolist(),
                "relative_change": {
                    name: {
                        "per_repeat": trace.per_repeat(trace.changes[shift][name]).tolist(),
                        "by_distance": trace.by_distance(trace.changes[shift][name]).tolist(),
                    }
                    for name in QUANTITIES
                },
            }
            for shift in settings.shifts
        },
    }
