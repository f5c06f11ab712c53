"""The transformers engine against transformers' own generate and its whole forward, on tiny models."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rpsd.evaluation.engines.model_facts import (
    model_identity,
    read_model,
    weights_sha256,
    yarn_factor,
    yarn_parameters,
)
from megatron_rpsd.evaluation.engines.prompt_tokens import PromptTokens
from megatron_rpsd.evaluation.engines.transformers_engine import TransformersEngine
from tests.ruler_prompts import tiny_reader
from tests.unit.evaluation.questions import question


@pytest.fixture(scope="module")
def folders(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("readers")
    return {"llama": folder} | {family: tiny_reader(root / family, family) for family in ("qwen3", "windowed")}


def engine(folder: Path, **options) -> TransformersEngine:
    made = TransformersEngine(read_model(folder), PromptTokens(folder), **options)
    made.load()
    return made


def generated(folder: Path, prompt: list[int], tokens: int, eos: int | None) -> list[int]:
    """transformers' own greedy answer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["llama", "qwen3", "windowed"])
def test_greedy_answers_equal_generate(folders, family: str) -> None:
    tokens = PromptTokens(folders[family])
    samples = [question(number, tokens, noise=1 + 2 * number) for number in range(3)]
    prompts = [tokens.prompt_ids(sample) for sample in samples]
    wanted = [generated(folders[family], prompt, 8, None) for prompt in prompts]
    assert len({tuple(answer) for answer in wanted}) == 3 and len({len(prompt) for prompt in prompts}) == 3
    one = engine(folders[family])
    one.eos_ids = frozenset()
    for one.prefill_chunk in (7, len(prompts[0]) - 1, len(prompts[1]), 0):
        assert [ids for prompt in prompts for ids, _ in one.generate([prompt], [8])] == wanted, one.prefill_chunk
    one.prefill_chunk = 1
    assert [ids for ids, _ in one.generate(prompts[:1], [8])] == wanted[:1]
    one.prefill_chunk = 5
    assert [ids for ids, _ in one.generate(prompts, [8] * 3)] == wanted  # padded on the left


def test_eos_and_limits_end_answers(folders) -> None:
    tokens = PromptTokens(folders["llama"])
    samples = [question(number, tokens, noise=1 + number) for number in range(4)]
    free = [generated(folders["llama"], tokens.prompt_ids(sample), 12, None) for sample in samples]
    eos = free[0][3]
    assert eos not in free[0][:3]
    one = engine(folders["llama"], batch_size=4)
    one.eos_ids = frozenset({eos, 10**6})
    answers = {sample.id: answer for sample, answer in one.complete(samples)}
    for sample, whole in zip(samples, free, strict=True):
        ends = eos in whole
        kept = whole[: whole.index(eos)] if ends else whole
        answer = answers[sample.id]
        assert (answer.tokens, answer.finish) == (len(kept), "stop" if ends else "length")
        assert answer.text == tokens.text(kept)
    # The task's limit holds for each sample of a batch, and the shortest is one token.
    short = [replace(samples[0], generated_tokens=1), replace(samples[1], generated_tokens=5)]
    one.eos_ids = frozenset()
    assert [answer.tokens for _, answer in one.complete(short)] == [1, 5]


def test_eos_comes_from_the_generation_config_else_the_tokenizer(folders, tmp_path: Path) -> None:
    copy = shutil.copytree(folders["llama"], tmp_path / "m")
    path = copy / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"eos_token_id": [3, 9]}))
    assert engine(copy).eos_ids == {3, 9}
    path.write_text(json.dumps({key: value for key, value in settings.items() if key != "eos_token_id"}))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    assert engine(copy).eos_ids == PromptTokens(copy).eos_ids != frozenset()


def test_no_logits_but_those_that_are_read(folders) -> None:
    one, widths = engine(folders["llama"], prefill_chunk=8), []
    one.model.lm_head.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    sample = question(0, one.tokens, noise=5)
    list(one.complete([sample]))
    assert set(widths) == {1} and len(widths) > sample.prompt_tokens // 8
    widths.clear()
    ((_, forced),) = one.force([sample])
    assert widths == [forced.tokens]


@pytest.mark.parametrize("family", ["llama", "windowed"])
def test_forced_scores_equal_a_whole_forward(folders, family: str) -> None:
    one = engine(folders[family], prefill_chunk=6)
    model = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32).double()
    sample = question(1, one.tokens, noise=4, task="niah_multivalue", outputs=("1234568", "7654321"))
    ids, start, references = one.tokens.answer_ids(sample)
    assert one.tokens.text(list(ids[start:])).strip() == "1234568 and 7654321"
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
    gold = torch.tensor(ids[start:])
    nlls = torch.nn.functional.cross_entropy(logits, gold, reduction="none")
    for answered in (False, True):  # with a cache of its own, and with the one that answering has left
        if answered:
            list(one.complete([sample]))
        ((_, forced),) = one.force([sample])
        assert forced.tokens == len(gold)
        assert forced.nll == pytest.approx(nlls.mean().item(), rel=1e-5)
        for reference, (word, first, last) in zip(forced.references, references, strict=True):
            own = nlls[first - start : last - start]
            assert reference["reference"] == word and reference["tokens"] == last - first > 1
            assert reference["nll"] == pytest.approx(own.mean().item(), rel=1e-5)


def test_greedy_exact_is_what_greedy_decoding_writes(folders) -> None:
    one = engine(folders["llama"])
    one.eos_ids = frozenset()
    sample = question(2, one.tokens)
    prompt = one.tokens.prompt_ids(sample)
    ((answer, _),) = one.generate([prompt], [6])
    _, right = one.answer_scores(prompt + answer, len(prompt))
    assert right == [True] * 6
    other = [*answer[:3], (answer[3] + 1) % 90, *answer[4:]]
    _, wrong = one.answer_scores(prompt + other, len(prompt))
    assert wrong[:4] == [True, True, True, False]


def test_yarn_equals_a_folder_that_declares_it(folders, tmp_path: Path) -> None:
    facts = read_model(folders["llama"])
    declared = shutil.copytree(folders["llama"], tmp_path / "yarn")
    config = json.loads((declared / "config.json").read_text())
    theta = config["rope_parameters"]["rope_theta"]
    yarn = {"rope_type": "yarn", "rope_theta": theta, "factor": 4.0, "original_max_position_embeddings": 1024}
    (declared / "config.json").write_text(json.dumps(config | {"rope_parameters": yarn}))
    assert yarn_parameters(facts, 4.0) == yarn
    ours, plain = engine(folders["llama"], factor=4.0), engine(folders["llama"])
    theirs = AutoModelForCausalLM.from_pretrained(declared, dtype=torch.float32)
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        wanted = theirs(ids).logits[:, -1:]
        found = ours._read(ids, ours._cache_of([])[0])
        without = plain._read(ids, plain._cache_of([])[0])
    torch.testing.assert_close(found, wanted)
    assert (without - wanted).abs().max() > 1e-3
    assert read_model(declared).window == 4096 and ours.model.config.max_position_embeddings == 4096


def test_yarn_factor(folders, tmp_path: Path) -> None:
    facts = read_model(folders["llama"])
    assert yarn_factor(facts, "", 10**6) is None
    assert yarn_factor(facts, "auto", 1024) is None and yarn_factor(facts, "1", 99) is None
    assert yarn_factor(facts, "auto", 1536) == 1.5 and yarn_factor(facts, "8", 99) == 8
    for wrong in ("0.5", "nan", "inf", "much"):
        with pytest.raises(ValueError, match=f"--yarn-factor {wrong}: give a number of at least 1, or auto"):
            yarn_factor(facts, wrong, 99)
    scaled = shutil.copytree(folders["llama"], tmp_path / "linear")
    config = json.loads((scaled / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 2.0}
    (scaled / "config.json").write_text(json.dumps(config))
    assert read_model(scaled).window == 2048
    assert yarn_factor(read_model(scaled), "auto", 2048) is None
    with pytest.raises(ValueError, match="rope_type linear already, good for 2048"):
        yarn_factor(read_model(scaled), "auto", 4096)


def test_rope_that_looks_at_the_length_is_read_whole(folders, tmp_path: Path) -> None:
    dynamic = shutil.copytree(folders["llama"], tmp_path / "dynamic")
    config = json.loads((dynamic / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "dynamic", "factor": 2.0}
    (dynamic / "config.json").write_text(json.dumps(config))
    facts, tokens = read_model(dynamic), PromptTokens(dynamic)
    assert TransformersEngine(facts, tokens).prefill_chunk == 0
    with pytest.raises(ValueError, match="--prefill-chunk 64.*--prefill-chunk 0"):
        TransformersEngine(facts, tokens, prefill_chunk=64)


def test_what_a_folder_says(folders, tmp_path: Path) -> None:
    facts = read_model(folders["llama"])
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    matrices = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)
    assert facts.flops(10) == 2 * matrices * 10 + 2 * model.config.num_hidden_layers * 32 * 10**2
    identity = model_identity(facts, None)
    assert identity["max_position_embeddings"] == 1024 and identity["rope"]["rope_type"] == "default"
    changed = shutil.copytree(folders["llama"], tmp_path / "m")
    assert weights_sha256(changed) == identity["weights_sha256"]
    trained = tiny_reader(tmp_path / "other", seed=2)
    assert weights_sha256(trained) != identity["weights_sha256"]
    with pytest.raises(ValueError, match="holds no config.json: not a Hugging Face model folder"):
        read_model(tmp_path)
    (changed / "config.json").write_text('{"model_type": "no such model"}')
    with pytest.raises(ValueError, match="transformers cannot read its config.json"):
        read_model(changed)


def test_nan_and_a_full_gpu_are_one_line(folders, monkeypatch) -> None:
    one = engine(folders["llama"])
    sample = question(0, one.tokens)
    with torch.no_grad():
        one.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the logits are NaN in float32"):
        list(one.complete([sample]))

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(one.model, "forward", full)
    with pytest.raises(ValueError, match="the GPU's memory is full: use a smaller --prefill-chunk"):
        list(one.complete([sample]))
    with pytest.raises(ValueError, match="the GPU's memory is full"):
        list(one.force([sample]))
