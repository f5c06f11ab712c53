"""The two instruments on a seed's checkpoints: how a shift of positions travels, and what training changed.

A shift is that of one repeat alone (`scope` single): the first layer's queries and keys of later repeats are then those
of the standard reading, and what changes there was carried by attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from examples.lab.settings import MODEL_FLAGS
from examples.short_data_long_context.arms import MODELS
from examples.short_data_long_context.settings import END, LARGE, SMALL

TRACED = ("phase-kd", "phase-ce", "teacher", f"base-{SMALL}")
COMPARED = ("phase-kd", "phase-ce", "small-kd", "large-kd")
SHIFTED_REPEAT = 5
SHIFTS = (1, 8, 64, 256)
CHUNK, REPEATS = 64, 8

BAND = range(3, 7)
"""RoPE indices whose wavelengths at theta 500,000 are 74 to 861 tokens"""
SLOW = range(8, 16)
"""the slower half of the 16 indices"""


def traced(models: Sequence[str]) -> tuple[str, ...]:
    """Those of the models whose response to a shift is traced."""
    return tuple(name for name in TRACED if name in models)


def comparisons(models: Sequence[str]) -> dict[str, tuple[str, str]]:
    """(before, after) of every comparison of weights, by the student's name."""
    return {name: (MODELS[name].start, name) for name in COMPARED if name in models}


def look_into(seed_folder: Path, folder: Path, models: Sequence[str], sequences: int) -> dict:
    """Traces and update spectra of a seed's models, as the tools' JSON, by model. On one rank of its own.

    Args:
        seed_folder: holds the checkpoints by their models' names.
        folder: for the Hugging Face form of a model, to which checkpoints are compared.
        sequences: random chunks of a trace.
    """
    from megatron_rpsd.analysis.trace import (
        TraceSettings,
        load_traced_model,
        model_folder,
        trace_positions,
        trace_record,
    )
    from megatron_rpsd.analysis.updates import compare_updates, open_weights, update_record

    reference = str(_reference(folder / "reference"))
    settings = TraceSettings(CHUNK, REPEATS, SHIFTED_REPEAT, SHIFTS, scope="single", sequences=sequences)
    traces = {}
    for name in traced(models):
        with model_folder(None, str(seed_folder / name), reference) as (exported, _):
            model = load_traced_model(exported)
        traces[name] = trace_record(trace_positions(model, settings))
    updates = {}
    for name, (before, after) in comparisons(models).items():
        weights = (open_weights(seed_folder / which, reference) for which in (before, after))
        compared = compare_updates(*weights)
        updates[name] = update_record(compared, compared.window)
    return {"traces": traces, "updates": updates}


def shift_response(looked: Mapping, model: str, shift: int) -> float:
    """KL of the next token in the shifted repeat, nats."""
    return looked["traces"][model]["shifts"][str(shift)]["kl_per_repeat"][SHIFTED_REPEAT]


def later_response(looked: Mapping, model: str, shift: int) -> float:
    """KL of the next token behind the shifted repeat, nats: attention alone carried it there."""
    return float(np.mean(looked["traces"][model]["shifts"][str(shift)]["kl_per_repeat"][SHIFTED_REPEAT + 1 :]))


def response_ratio(looked: Mapping, model: str) -> float:
    """How much more the largest shift moves the logits than the smallest."""
    return shift_response(looked, model, SHIFTS[-1]) / max(shift_response(looked, model, SHIFTS[0]), 1e-12)


def later_inputs_changed(looked: Mapping, model: str) -> float:
    """Largest relative change of the first layer's queries and keys behind the shifted repeat."""
    return max(
        max(parts["relative_change"][name]["per_repeat"][0][SHIFTED_REPEAT + 1 :])
        for parts in looked["traces"][model]["shifts"].values()
        for name in ("queries", "keys")
    )


def band_ratio(looked: Mapping, student: str, projection: str) -> float:
    """Change of the middle frequencies over that of the slow half."""
    curve = np.array(looked["updates"][student]["mean"][projection])
    return float(curve[BAND].mean() / curve[SLOW].mean())


def _reference(folder: Path) -> Path:
    """A Hugging Face folder of the lab's model, with weights of no meaning."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = MODEL_FLAGS["--num-attention-heads"]
    config = LlamaConfig(
        vocab_size=MODEL_FLAGS["--vocab-size"], hidden_size=MODEL_FLAGS["--hidden-size"],
        intermediate_size=MODEL_FLAGS["--ffn-hidden-size"], num_hidden_layers=MODEL_FLAGS["--num-layers"],
        num_attention_heads=heads, num_key_value_heads=heads,
        head_dim=MODEL_FLAGS["--kv-channels"], max_position_embeddings=512, rope_theta=LARGE, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=END, dtype=torch.float32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
