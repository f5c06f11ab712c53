"""RoPE at given positions, in fp32: inverse frequencies, cos and sin tables, rotation of queries and keys.

Positions come from outside (a perturbed view has gaps and negative values), so a table is made per micro batch and is
never cached by length. Frequencies equal those of Hugging Face transformers bit for bit: one that is off by a single
fp32 unit in the last place (6e-8 just below 1) turns a token at position 500,000 by 0.03 rad too much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

EXACT_FP32_INTEGERS = 2**24
"""fp32 has a 24-bit significand: every integer up to here is exact, the next one is not."""

# Keys of Hugging Face's rope_scaling (rope_parameters) per type: (required, optional).
_SCALING_KEYS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
        frozenset(),
    ),
    "yarn": (
        frozenset({"factor", "original_max_position_embeddings"}),
        frozenset({"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"}),
    ),
}
_COMMON_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_DEFAULT_BETA_FAST, _DEFAULT_BETA_SLOW = 32, 1


@dataclass(frozen=True)
class RopeConfig:
    """RoPE of one model.

    Raises:
        ValueError: a value out of range, an unknown ``rope_type``, or a key of ``scaling`` that is missing, unknown or
            in conflict with another field; the message names the key.
    """

    head_dim: int
    """d (--kv-channels); even. All of it is rotated: partial rotary is not supported."""
    base: float
    """--rotary-base (rope_theta), > 1."""
    scaling: Mapping[str, Any] | None = field(default=None, hash=False)
    """Hugging Face's rope_scaling (or rope_parameters) of type default, linear, llama3 or yarn; None is default."""
    max_position_embeddings: int | None = None
    """In positions. Read for yarn with ``factor: null`` only: factor = this / original_max_position_embeddings."""

    def __post_init__(self) -> None:
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"--kv-channels {self.head_dim} is not even and positive: RoPE rotates pairs of channels")
        if not self.base > 1:
            raise ValueError(f"--rotary-base {self.base} must be greater than 1")
        if self.scaling is not None:
            # Own copy: a caller that edits its dictionary later must not change a frozen configuration.
            object.__setattr__(self, "scaling", dict(self.scaling))
            self._check_keys(self.scaling)
            self._check_values(self.scaling)

    @property
    def rope_type(self) -> str:
        """default, linear, llama3 or yarn; the older key ``type`` counts where ``rope_type`` is absent."""
        return "default" if self.scaling is None else self.scaling.get("rope_type", self.scaling.get("type"))

    def exported_scaling(self) -> dict[str, Any] | None:
        """The scaling as a config.json should carry it: None for plain RoPE, else with ``rope_type`` and all it needs.

        What follows from other fields is left out (the base) or written out (yarn's factor), so that the result keeps
        its meaning beside another ``max_position_embeddings``.
        """
        if self.rope_type == "default":
            return None
        scaling = {key: value for key, value in self.scaling.items() if key not in _COMMON_KEYS}
        if self.rope_type == "yarn" and scaling["factor"] is None:
            scaling["factor"] = self.max_position_embeddings / scaling["original_max_position_embeddings"]
        return {"rope_type": self.rope_type, **scaling}

    def _check_keys(self, scaling: Mapping[str, Any]) -> None:
        if self.rope_type not in _SCALING_KEYS:
            known = ", ".join(_SCALING_KEYS)
            raise ValueError(f"rope_scaling: rope_type is {self.rope_type!r}: choose one of {known}")
        required, optional = _SCALING_KEYS[self.rope_type]
        if missing := sorted(required - scaling.keys()):
            raise ValueError(f"rope_scaling: rope_type {self.rope_type} needs {', '.join(missing)}: add it")
        if unknown := sorted(scaling.keys() - required - optional - _COMMON_KEYS):
            raise ValueError(f"rope_scaling: rope_type {self.rope_type} has no key {', '.join(unknown)}: remove it")
        if scaling.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"rope_scaling: partial_rotary_factor {scaling['partial_rotary_factor']} must be 1.0")
        if scaling.get("rope_theta", self.base) != self.base:
            raise ValueError(
                f"rope_scaling: rope_theta {scaling['rope_theta']} differs from --rotary-base {self.base}: "
                "make them equal or leave rope_theta out"
            )

    def _check_values(self, scaling: Mapping[str, Any]) -> None:
        required, optional = _SCALING_KEYS[self.rope_type]
        for key in sorted((required | optional) & scaling.keys()):
            value = scaling[key]
            if key == "truncate":
                if not isinstance(value, bool):
                    raise ValueError(f"rope_scaling: truncate {value!r} must be true or false")
                continue
            if value is None and (key in optional or (self.rope_type == "yarn" and key == "factor")):
                continue
            least = 1 if key == "factor" else 0
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < least or value == 0:
                bound = "of at least 1" if least else "greater than 0"
                raise ValueError(f"rope_scaling: {key} {value!r} must be a number {bound}")
        if self.rope_type == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            raise ValueError(
                f"rope_scaling: high_freq_factor {scaling['high_freq_factor']} must be greater than "
                f"low_freq_factor {scaling['low_freq_factor']}"
            )
        if self.rope_type == "yarn":
            fast, slow = _yarn_betas(scaling)
            if fast < slow:
                raise ValueError(f"rope_scaling: beta_fast {fast} must be at least beta_slow {slow}")
            if scaling["factor"] is None and self.max_position_embeddings is None:
                raise ValueError("rope_scaling: factor is null and max_position_embeddings is not known: give factor")


def inverse_frequencies(config: RopeConfig) -> tuple[torch.Tensor, float]:
    """Angle per position of each channel pair, and the factor that multiplies cos and sin.

    Unscaled, pair j turns by base**(-2j/d) rad per position. linear divides all of them by ``factor``; llama3 and yarn
    divide the slow ones, keep the fast ones and blend in between. Only yarn has a factor other than 1. Always made on
    the CPU: pow on a GPU rounds differently, and ranks and exports must agree.

    Returns:
        inv_freq fp32 [d/2] in rad per position, bitwise equal to transformers' ``ROPE_INIT_FUNCTIONS``; and
        attention_scaling.
    """
    d = config.head_dim
    wavelengths = config.base ** (torch.arange(0, d, 2, dtype=torch.float32, device="cpu") / d)  # [d/2], over 2 pi
    inv_freq = 1.0 / wavelengths
    match config.rope_type:
        case "default":
            return inv_freq, 1.0
        case "linear":
            return inv_freq / config.scaling["factor"], 1.0
        case "llama3":
            return _llama3(inv_freq, config.scaling), 1.0
        case "yarn":
            return _yarn(wavelengths, config)
    raise AssertionError(f"rope_type {config.rope_type} passed the check but has no formula")


def rope_tables(
    position_ids: torch.Tensor, inv_freq: torch.Tensor, attention_scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every token's angles, times ``attention_scaling``.

    Equal to transformers' ``LlamaRotaryEmbedding`` (which repeats each column for the second half of d), computed the
    same way: fp32 position times fp32 frequency. The position is exact (|position| < 2**24, see check_positions), the
    product is rounded once, to half a unit in the last place: at most 6e-8 of the angle, at any distance and with
    either sign. In bf16, position 500,000 alone would be off by up to 1,024 positions.

    Args:
        position_ids: int64 [b, s], any order, negative ones included.
        inv_freq: fp32 [d/2]; an fp64 tensor gives fp64 tables, for references.

    Returns:
        (cos, sin), each [b, s, d/2] in the dtype of inv_freq, on the device of position_ids, without gradient.
    """
    assert position_ids.dtype == torch.int64, f"position_ids are {position_ids.dtype}, not int64"
    assert inv_freq.dtype in (torch.float32, torch.float64), f"inv_freq is {inv_freq.dtype}: too coarse for RoPE"
    with torch.no_grad():
        angles = position_ids[..., None].to(inv_freq.dtype) * inv_freq.to(position_ids.device)  # [b, s, d/2]
        return angles.cos().mul_(attention_scaling), angles.sin_().mul_(attention_scaling)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns channel pairs (j, j + d/2) of queries or keys by the table's angles.

    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) with x1, x2 the halves of d: Llama's pairing, as in transformers'
    ``apply_rotary_pos_emb``. Computed in fp32 (fp64 for fp64 x) and cast back once: bf16 x pays one rounding and
    not one for each table, product and sum. Linear in x: autograd keeps the tables and nothing of the size of x.

    Args:
        x: [s, b, heads, d], any floating dtype; not modified.
        cos, sin: [b, s, d/2] from rope_tables.

    Returns:
        [s, b, heads, d], dtype of x.
    """
    assert x.shape[-1] == 2 * cos.shape[-1], f"head_dim {x.shape[-1]} is not twice the table's {cos.shape[-1]}"
    assert cos.shape[:2] == (x.shape[1], x.shape[0]), f"tables {tuple(cos.shape)} for x {tuple(x.shape)}"
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = (table.to(dtype).transpose(0, 1).unsqueeze(2) for table in (cos, sin))  # [s, b, 1, d/2]
    first, second = x.to(dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def check_positions(length: int, max_shift: int) -> None:
    """Refuses runs whose positions fp32 cannot hold exactly; two tokens would then share a position.

    A skip view reaches length - 1 + max_shift; a cyclic one stays above -length.

    Raises:
        ValueError: length + max_shift >= 2**24.
    """
    if length + max_shift >= EXACT_FP32_INTEGERS:
        raise ValueError(
            f"--seq-length {length} + --rpsd-max-shift {max_shift} = {length + max_shift} must be below "
            f"2**24 = {EXACT_FP32_INTEGERS}, where fp32 stops holding every position: lower one of them"
        )


def _llama3(inv_freq: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Llama 3.1's scaling. ``turns`` is how often a pair turns over the original context: from high_freq_factor turns
    on a pair is kept, below low_freq_factor it is divided by factor, in between the two are mixed linearly in turns."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / inv_freq)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * inv_freq / scaling["factor"] + keep * inv_freq


def _yarn(wavelengths: torch.Tensor, config: RopeConfig) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv 2309.00071): as llama3, but linear in the pair's index, between those that turn beta_fast and
    beta_slow times over the original context. Order of operations as in transformers, for bitwise equality."""
    scaling, d = config.scaling, config.head_dim
    original = scaling["original_max_position_embeddings"]
    factor = scaling["factor"]
    if factor is None:
        factor = config.max_position_embeddings / original
    low, high = (
        d * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.base)) for turns in _yarn_betas(scaling)
    )
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp: keeps the division below finite, as transformers does
    ramp = ((torch.arange(d // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    inv_freq = (1.0 / (factor * wavelengths)) * (1 - keep) + (1.0 / wavelengths) * keep
    return inv_freq, _yarn_attention_scaling(scaling, factor)


def _yarn_betas(scaling: Mapping[str, Any]) -> tuple[float, float]:
    return scaling.get("beta_fast") or _DEFAULT_BETA_FAST, scaling.get("beta_slow") or _DEFAULT_BETA_SLOW


def _yarn_attention_scaling(scaling: Mapping[str, Any], factor: float) -> float:
    """``attention_factor`` where given; else 0.1 ln(factor) + 1, or DeepSeek's ratio of two such terms (mscale)."""
    if (given := scaling.get("attention_factor")) is not None:
        return float(given)

    def temperature(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return temperature(mscale) / temperature(mscale_all_dim)
    return temperature(1.0)
