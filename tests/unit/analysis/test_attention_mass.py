"""Attention mass against transformers' eager attention and against a definition written out in loops."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from megatron_rpsd.analysis import attention_mass
from megatron_rpsd.analysis.attention_mass import GROUPS, MassSettings, attention_shares, load_model
from megatron_rpsd.analysis.attention_study import run_study
from megatron_rpsd.report.attention_mass import attention_figure
from tests.ruler_prompts import lines, make_prompts, tiny_reader

LENGTH = 61
SETTINGS = MassSettings(sink=3, window=7, rows=4, chunk=10)  # 61 = 1 + 6 x 10
EVIDENCE = [(1, 5), (20, 27), (52, 58)]  # touches the first tokens and every local window


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readers")
    return {family: tiny_reader(folder / family, family) for family in ("llama", "qwen2", "qwen3", "mistral")}


def ids(length: int = LENGTH) -> list[int]:
    return torch.randint(1, 290, (length,), generator=torch.Generator().manual_seed(5)).tolist()


def eager_weights(hf, kind: torch.dtype, monkeypatch) -> torch.Tensor:
    """Attention weights [layers, heads, L, L] by transformers; its softmax always takes fp32, here `kind`."""
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=kind, attn_implementation="eager").eval()
    softmax = torch.nn.functional.softmax
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(torch.nn.functional, "softmax", lambda x, dim=-1, dtype=None: softmax(x, dim=dim, dtype=kind))
        weights = model(torch.tensor([ids()]), output_attentions=True).attentions
    return torch.stack(weights)[:, 0]


def share_by_loops(weights: torch.Tensor) -> torch.Tensor:
    """[layers, heads, 4], a key at a time."""
    shares = weights.new_zeros(*weights.shape[:2], len(GROUPS))
    for query in range(LENGTH - SETTINGS.rows, LENGTH):
        for key in range(query + 1):
            if any(start <= key < stop for start, stop in EVIDENCE):
                group = "evidence"
            elif key < SETTINGS.sink:
                group = "sink"
            elif key > query - SETTINGS.window:
                group = "local"
            else:
                group = "rest"
            shares[..., GROUPS.index(group)] += weights[:, :, query, key] / SETTINGS.rows
    return shares


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("kind, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_shares_equal_those_of_eager_attention(family, kind, tolerance, models, monkeypatch):
    expected = share_by_loops(eager_weights(models[family], kind, monkeypatch))
    assert (expected.amin(dim=(0, 1)) < 0.9 * expected.amax(dim=(0, 1))).all()  # heads differ in every group
    model = load_model(str(models[family]), kind)
    for chunk in (SETTINGS.chunk, LENGTH, 4):
        settings = MassSettings(SETTINGS.sink, SETTINGS.window, SETTINGS.rows, chunk)
        found = attention_shares(model, ids(), EVIDENCE, settings)
        assert found.dtype == kind
        # Hidden states carry the rounding of two attention kernels.
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


class _LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for value in output if isinstance(output, tuple | list) else (output,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return output


def test_the_attention_matrix_is_never_formed(models):
    model, length = load_model(str(models["llama"]), torch.float32), 2000
    with _LargestTensor() as seen:
        attention_shares(model, ids(length), [(30, 50)], MassSettings(chunk=100, rows=2))
    # The chunk's mask is the largest; one head's whole matrix would be 20 times that.
    assert seen.numel <= 100 * length


def test_attention_windows_are_refused(tmp_path):
    model = load_model(str(tiny_reader(tmp_path / "windowed", "windowed")), torch.float32)
    with pytest.raises(ValueError, match="window of 16 tokens, the prompt has 61"):
        attention_shares(model, ids(), EVIDENCE, SETTINGS)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"sink": -1}, "--sink-tokens -1"),
        ({"rows": 0}, "--query-rows 0"),
        ({"rows": 9, "chunk": 8}, "--chunk-tokens 8"),
    ],
)
def test_settings_that_count_nothing_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        MassSettings(**given)


@pytest.fixture(scope="module")
def prompts(models, tmp_path_factory):
    return make_prompts(tmp_path_factory.mktemp("prompts"), models["llama"], "niah_single_1", 512, 8)


def test_a_study_knows_where_each_prompts_evidence_stands(models, prompts):
    settings = MassSettings(chunk=64)
    study = json.loads(json.dumps(run_study([str(models["llama"])], prompts, settings)))
    (entry,), evidence = study["models"], lines(prompts.with_suffix(".evidence.jsonl"))
    total = sum(np.array(entry["shares"][group]) for group in GROUPS)
    assert total.shape == (4, 4) and np.allclose(total, 1, atol=1e-5)
    assert len({round(prompt["depth"], 2) for prompt in entry["prompts"]}) > 4
    model = load_model(str(models["llama"]), torch.float32)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    for prompt, record, where in zip(entry["prompts"], lines(prompts), evidence, strict=True):
        tokens = tokenizer(record["input"] + record["answer_prefix"]).input_ids
        ((start, stop),) = where["evidence"][0]["tokens"]
        assert record["outputs"][0] in tokenizer.decode(tokens[start:stop])
        assert prompt["depth"] == pytest.approx((start + stop - 1) / 2 / (len(tokens) - 1), abs=1e-5)
        alone = attention_shares(model, tokens, [(start, stop)], settings)
        assert np.allclose(prompt["evidence_by_head"], alone[..., 0], atol=2e-6)
    strongest = np.unravel_index(np.argmax(entry["shares"]["evidence"]), total.shape)
    assert study["evidence_heads"] == [list(map(int, strongest))]
    by_depth = entry["by_depth"]["bins"]
    assert sum(one["n"] for one in by_depth) == 8
    weighed = sum(one["n"] * one["all_heads"] for one in by_depth if one["n"]) / 8
    assert weighed == pytest.approx(np.mean(entry["shares"]["evidence"]), abs=1e-5)


def test_a_bos_moves_the_evidence_by_one_token(models, prompts, tmp_path):
    plain = run_study([str(models["llama"])], prompts, MassSettings(), limit=1)["models"][0]["prompts"][0]
    assert plain["tokens"] == lines(prompts.with_suffix(".evidence.jsonl"))[0]["prompt_tokens"]
    seen = {}

    def spy(model, tokens, evidence, settings):
        seen["tokens"], seen["evidence"] = tokens, evidence
        return torch.zeros(4, 4, 4)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("megatron_rpsd.analysis.attention_study.attention_shares", spy)
        run_study([str(models["llama"])], prompts, MassSettings(), limit=1, bos="add")
    ((start, stop),) = lines(prompts.with_suffix(".evidence.jsonl"))[0]["evidence"][0]["tokens"]
    assert seen["tokens"][0] == 0 and len(seen["tokens"]) == plain["tokens"] + 1
    assert seen["evidence"] == ((start + 1, stop + 1),)


def test_two_models_are_compared_on_the_first_ones_heads(models, prompts, tmp_path):
    other = tiny_reader(tmp_path / "other", "llama", seed=2)
    study = run_study([str(models["llama"]), str(other)], prompts, MassSettings(), limit=3)
    first, second = study["models"]
    layer, head = study["evidence_heads"][0]
    assert first["shares"]["evidence"][layer][head] == np.max(first["shares"]["evidence"])
    assert first["shares"] != second["shares"]
    filled = [one for one in second["by_depth"]["bins"] if one["n"] == 1]
    for one in filled:
        (prompt,) = [p for p in second["prompts"] if one["low"] <= p["depth"] < one["high"]]
        assert one["evidence_heads"] == pytest.approx(prompt["evidence_by_head"][layer][head], abs=1e-6)
    assert filled
    one, two = attention_figure({**study, "models": [first]}), attention_figure(study)
    assert one.startswith(b"\x89PNG") and len(two) > len(one) > 10_000
    with pytest.raises(ValueError, match="layers and heads"):
        narrow = {**second, "layers": 3}
        with pytest.MonkeyPatch.context() as patched:
            answers = iter([first, narrow])
            patched.setattr("megatron_rpsd.analysis.attention_study.study_model", lambda *_: next(answers))
            run_study([str(models["llama"]), str(other)], prompts, MassSettings(), limit=3)


def test_prompts_of_another_tokenizer_are_refused(models, prompts, tmp_path):
    other = tiny_reader(tmp_path / "bos", "llama", adds_bos=True)
    with pytest.raises(ValueError, match="prepare prompts with this one"):
        run_study([str(other)], prompts, MassSettings())


def test_the_tool_writes_json_and_figure_or_one_line(models, prompts, tmp_path):
    def run(*words):
        command = [sys.executable, "tools/attention_mass.py", "--hf", str(models["qwen3"]), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=240)

    prepared = make_prompts(tmp_path / "p", models["qwen3"], "vt", 1000, 2)
    out = tmp_path / "out" / "mass.json"
    done = run("--prepared", prepared, "--output", out, "--query-rows", 2)
    assert done.returncode == 0, done.stderr
    study = json.loads(out.read_text())
    assert study["prepared"]["task"] == "vt" and study["settings"]["rows"] == 2
    assert all(prompt["evidence_tokens"] > 5 for prompt in study["models"][0]["prompts"])  # five assignments
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    refused = run("--prepared", prepared, "--output", tmp_path / "no.json", "--num-samples", 0)
    assert refused.returncode == 2 and refused.stderr.startswith("error: --num-samples 0")
    assert len(refused.stderr.splitlines()) == 1 and not (tmp_path / "no.json").exists()


def test_the_recorder_is_not_left_behind(models, monkeypatch):
    model = load_model(str(models["llama"]), torch.float32)
    attention_shares(model, ids(), EVIDENCE, SETTINGS)
    monkeypatch.setattr(attention_mass.MassRecorder, "record", None)  # a call without a recorder must not reach it
    with torch.no_grad():
        assert model(torch.tensor([ids()])).logits.isfinite().all()
