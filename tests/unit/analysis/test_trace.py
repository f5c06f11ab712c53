"""The trace against two plain forward passes of transformers, and what must be exactly 0."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

from megatron_rpsd.analysis.trace import (
    QUANTITIES,
    TraceSettings,
    load_traced_model,
    model_folder,
    trace_positions,
    trace_record,
)
from megatron_rpsd.positions import RopeConfig, inverse_frequencies

SIZES = dict(
    vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.4,
)  # fmt: skip
FAMILIES = {
    "Llama": dict(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "Qwen2": dict(),
    "Qwen3": dict(head_dim=8, tie_word_embeddings=True),
    "Mistral": dict(sliding_window=None),
}
SETTINGS = TraceSettings(chunk=6, repeats=5, shift_repeat=3, shifts=(1, 40), sequences=2, seed=7)


def save(family: str, folder) -> str:
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family]})
    torch.manual_seed(5)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    return str(folder)


def plain_readings(folder: str, position_ids: torch.Tensor) -> tuple[list, torch.Tensor]:
    """Hidden states after every layer and logits of all sequences, by transformers' eager attention."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    length = SETTINGS.length
    mask = torch.full((length, length), float("-inf")).triu(1).expand(SETTINGS.sequences, 1, -1, -1)
    with torch.no_grad():
        output = model(
            input_ids=SETTINGS.tokens(SIZES["vocab_size"]), attention_mask=mask, output_hidden_states=True,
            position_ids=position_ids.expand(SETTINGS.sequences, -1),
        )  # fmt: skip
    return output.hidden_states, output.logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trace_is_the_difference_of_two_plain_forward_passes(family, tmp_path):
    folder = save(family, tmp_path)
    with model_folder(folder, None, None) as (found, name):
        assert found == name == folder
    readings = []
    trace = trace_positions(load_traced_model(folder), SETTINGS, lambda: readings.append(1))
    assert len(readings) == 2 * 3
    border = 18
    for shift in (1, 40):
        positions = torch.tensor([*range(border), *range(border + shift, 30 + shift)])
        before, q = plain_readings(folder, torch.arange(30))
        after, p = plain_readings(folder, positions)
        for layer in (0, 1):  # transformers' last hidden states are those behind the final norm
            old, new = before[layer + 1], after[layer + 1]
            expected = ((new - old).norm(dim=-1) / old.norm(dim=-1)).mean(dim=0)
            np.testing.assert_allclose(trace.changes[shift]["hidden states"][layer], expected, rtol=1e-3, atol=1e-6)
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean(dim=0)
        np.testing.assert_allclose(trace.kl[shift], expected, rtol=1e-3, atol=1e-6)
        assert trace.kl[shift][border + 1 :].min() > 1e-4  # what is compared is no rounding
    assert trace.largest_before_border() == 0.0


@pytest.mark.parametrize("scope", ["onward", "single"])
def test_nothing_changes_before_the_shift_and_only_attention_carries_it_on(scope, tmp_path):
    settings = TraceSettings(chunk=6, repeats=5, shift_repeat=2, shifts=(3,), scope=scope, sequences=1)
    folder = save("Qwen3", tmp_path)
    trace = trace_positions(load_traced_model(folder), settings)
    changes, border, behind = trace.changes[3], 12, slice(18, 30)
    assert set(changes) == set(QUANTITIES) and all(values.shape == (3, 30) for values in changes.values())
    assert trace.largest_before_border() == 0.0
    for name, values in changes.items():
        assert (values[:, :border] == 0).all(), name
        assert np.isfinite(values).all() and (values[1:, border + 1 :] > 0).all(), name
    for name in ("queries before RoPE", "keys before RoPE"):
        assert (changes[name][0] == 0).all(), name  # the first layer sees the same tokens
    for name in ("queries", "keys"):
        assert (changes[name][0, border:18] > 0).all()
        assert (changes[name][0, behind] == 0).all() == (scope == "single"), name
    assert (changes["hidden states"][0, behind] > 0).all() and (trace.kl[3][behind] > 0).all()


def test_the_first_layers_keys_turn_by_the_angles_of_the_shift(tmp_path):
    folder = save("Llama", tmp_path)
    model = load_traced_model(folder)
    settings = TraceSettings(chunk=4, repeats=3, shift_repeat=1, shifts=(5,), sequences=1)
    trace = trace_positions(model, settings)
    tokens = settings.tokens(SIZES["vocab_size"])
    layer = model.model.layers[0]
    with torch.no_grad():
        keys = layer.self_attn.k_proj(layer.input_layernorm(model.model.embed_tokens(tokens)))[0].double()
    pairs = keys.view(12, 2, 2, 4).permute(0, 1, 3, 2).reshape(12, 8, 2)  # [s, heads x d/2, (i, i + d/2)]
    inv_freq, _ = inverse_frequencies(RopeConfig(8, 500.0))
    # A pair that turns by an angle moves by twice the sine of its half.
    moved = 2 * (5 * inv_freq.double() / 2).sin().abs().repeat(2)[:, None] * pairs.norm(dim=-1, keepdim=True)
    expected = moved.flatten(1).norm(dim=1) / keys.norm(dim=1)
    np.testing.assert_allclose(trace.changes[5]["keys"][0, 4:], expected[4:], rtol=1e-4)


def test_means_by_repeat_and_by_distance(tmp_path):
    trace = trace_positions(load_traced_model(save("Llama", tmp_path)), SETTINGS)
    values = trace.changes[40]["queries"]
    record = trace_record(trace)
    assert record["distances"] == [[0, 1], [1, 2], [2, 4], [4, 8], [8, 12]] and record["largest_before_border"] == 0
    written = record["shifts"]["40"]["relative_change"]["queries"]
    for layer in range(3):
        for repeat in range(5):
            assert written["per_repeat"][layer][repeat] == pytest.approx(
                values[layer, 6 * repeat : 6 * repeat + 6].mean()
            )
        for index, (low, high) in enumerate(record["distances"]):
            assert written["by_distance"][layer][index] == pytest.approx(values[layer, 18 + low : 18 + high].mean())
    assert len(record["shifts"]["1"]["kl_per_token"]) == 30
    json.dumps(record, allow_nan=False)


def test_chunks_are_repeated_and_drawn_from_the_seed():
    tokens = SETTINGS.tokens(53)
    assert tokens.shape == (2, 30) and tokens.min() >= 0 and tokens.max() < 53
    chunks = tokens.view(2, 5, 6)
    assert (chunks == chunks[:, :1]).all() and not torch.equal(chunks[0], chunks[1])
    assert not torch.equal(TraceSettings(chunk=6, repeats=5, shift_repeat=3, sequences=2, seed=8).tokens(53), tokens)


@pytest.mark.parametrize(
    "changed, flag",
    [
        ({"chunk": 0}, "--chunk 0"),
        ({"repeats": 1}, "--repeats 1"),
        ({"shift_repeat": 0}, "--shift-repeat 0 must lie in 1..7"),
        ({"shift_repeat": 8}, "--shift-repeat 8 must lie in 1..7"),
        ({"shifts": (1, 0)}, "--shifts 1 0"),
        ({"shifts": (4, 4)}, "--shifts 4 4"),
        ({"scope": "both"}, "--scope both"),
        ({"sequences": 0}, "--sequences 0"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_settings_out_of_range_are_refused(changed, flag):
    with pytest.raises(ValueError, match=flag):
        TraceSettings(**changed)


def test_a_checkpoint_needs_its_reference():
    for given, flag in (((None, "runs/x", None), "--checkpoint runs/x"), (("hf", None, "ref"), "--hf-reference ref")):
        with pytest.raises(ValueError, match=flag), model_folder(*given):
            raise AssertionError("not refused")
