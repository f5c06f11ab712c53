"""The endpoint against a server of this process, kind and unkind; vLLM's calls against a stand-in for the package."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_rpsd.evaluation.engines.endpoint import Endpoint
from megatron_rpsd.evaluation.engines.model_facts import read_model
from megatron_rpsd.evaluation.engines.prompt_tokens import PromptTokens
from megatron_rpsd.evaluation.engines.vllm_engine import VllmEngine
from tests.completions_server import Server, completion
from tests.unit.evaluation.questions import question


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        yield made


@pytest.fixture
def client(server: Server, tokens: PromptTokens) -> Iterator[Endpoint]:
    made = Endpoint(server.url + "/", "some model", tokens, concurrency=3, attempts=3, first_wait=0.001)
    yield made
    made.close()


def test_answers_and_what_is_sent(server: Server, tokens: PromptTokens, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret word")
    client = Endpoint(server.url, "some model", tokens)
    samples = [question(number, tokens) for number in range(6)]
    server.reply = lambda number, body: (200, completion(body, text=tokens.text(body["prompt"])[-60:]), {})
    answers = {sample.id: answer for sample, answer in client.complete(samples)}
    assert len(answers) == len(server.seen) == 6
    for sample in samples:
        assert answers[sample.id].text == sample.prompt[-60:]
        assert (answers[sample.id].tokens, answers[sample.id].finish) == (4, "stop")
    path, body, headers = server.seen[0]
    assert path == "/v1/completions" and headers["Authorization"] == "Bearer secret word"
    sent = {"model": "some model", "max_tokens": 12, "temperature": 0.0, "top_p": 1.0, "stream": False}
    assert {key: value for key, value in body.items() if key != "prompt"} == sent
    assert body["prompt"] in [tokens.prompt_ids(sample) for sample in samples]
    assert "secret" not in json.dumps(client.describe())
    client.close()


@pytest.mark.parametrize(
    "trouble", [(429, "slow down", {"Retry-After": "0"}), (503, "x", {}), (200, "<html>", {}), None]
)
def test_troubles_that_pass_are_asked_again(server: Server, client: Endpoint, tokens: PromptTokens, trouble) -> None:
    server.reply = lambda number, body: trouble if number < 3 else (200, completion(body), {})
    ((_, answer),) = client.complete([question(0, tokens)])
    assert answer.text == " 1234567" and len(server.seen) == 3
    server.reply = lambda number, body: trouble
    with pytest.raises(ValueError, match="failed 3 times, last with .*; run the same command to go on"):
        list(client.complete([question(0, tokens)]))
    assert len(server.seen) == 6


@pytest.mark.parametrize(
    ("status", "content", "said"),
    [
        (404, {"error": {"message": "no such model"}}, "refuses: 404 no such model; does --endpoint lack /v1"),
        (401, {"error": "bad key"}, "refuses: 401 bad key"),
        (200, {"choices": []}, "answers without one choice and its usage"),
        (200, {"choices": [{"text": "a", "finish_reason": "stop"}]}, "KeyError: 'usage'"),
    ],
)
def test_troubles_that_stay(server: Server, client: Endpoint, tokens: PromptTokens, status, content, said) -> None:
    server.reply = lambda number, body: (status, content, {})
    with pytest.raises(ValueError, match=said):
        list(client.complete([question(0, tokens)]))
    assert len(server.seen) == 1


def test_a_server_that_cuts_prompts_or_adds_to_them(server: Server, client: Endpoint, tokens: PromptTokens) -> None:
    for read, said in ((-5, "the server cuts prompts"), (1, "it adds tokens of its own")):
        server.reply = lambda number, body, more=read: (
            200, completion(body, prompt_tokens=len(body["prompt"]) + more), {},
        )  # fmt: skip
        with pytest.raises(ValueError, match=said):
            list(client.complete([question(0, tokens)]))


def test_no_server_and_no_url(tokens: PromptTokens) -> None:
    nobody = Endpoint("http://127.0.0.1:9/v1", "m", tokens, attempts=2, first_wait=0.001)
    with pytest.raises(ValueError, match="failed 2 times, last with ConnectError"):
        list(nobody.complete([question(0, tokens)]))
    with pytest.raises(ValueError, match="--teacher-forced: --backend openai gives no probabilities"):
        nobody.force([])
    nobody.close()
    with pytest.raises(ValueError, match="--endpoint localhost:8000: give a URL"):
        Endpoint("localhost:8000", "m", tokens)


class FakeVllm(types.ModuleType):
    """Records what it is called with; answers every prompt with three tokens."""

    def __init__(self) -> None:
        super().__init__("vllm")
        self.__spec__ = ModuleSpec("vllm", None)
        self.made, self.asked = [], []
        owner = self

        class LLM:
            def __init__(self, **arguments) -> None:
                owner.made.append(arguments)

            def generate(self, prompts, parameters, use_tqdm):
                assert not use_tqdm and len(prompts) == len(parameters)
                owner.asked.append((prompts, parameters))
                return [
                    owner.answer(prompt["prompt_token_ids"], p) for prompt, p in zip(prompts, parameters, strict=True)
                ]

        self.LLM, self.SamplingParams, self.cut = LLM, SimpleNamespace, 0

    def answer(self, ids: list[int], parameters) -> SimpleNamespace:
        written = SimpleNamespace(text=" 123", token_ids=[5, 6, 0], finish_reason="stop")
        # Each token's log probability tells its place; every second one is the first choice.
        places = [{token: SimpleNamespace(logprob=-place / 8, rank=1 + place % 2)} for place, token in enumerate(ids)]
        return SimpleNamespace(outputs=[written], prompt_token_ids=ids[self.cut :], prompt_logprobs=[None, *places[1:]])


@pytest.fixture
def vllm(monkeypatch) -> FakeVllm:
    made = FakeVllm()
    monkeypatch.setitem(sys.modules, "vllm", made)
    return made


def test_vllm_is_called_as_documented(vllm: FakeVllm, folder: Path, tokens: PromptTokens) -> None:
    engine = VllmEngine(read_model(folder), tokens, 2.0, 2048, batch_size=2, options={"tensor_parallel_size": 8})
    engine.load()
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 1024}
    assert vllm.made == [
        {
            "model": str(folder), "tokenizer": str(folder), "dtype": "auto", "max_model_len": 2048, "seed": 0,
            "hf_overrides": {"rope_parameters": yarn}, "tensor_parallel_size": 8,
        }
    ]  # fmt: skip
    samples = [question(number, tokens) for number in range(3)]
    answers = list(engine.complete(samples))
    assert [sample.id for sample, _ in answers] == [sample.id for sample in samples]
    assert {(answer.text, answer.tokens, answer.finish) for _, answer in answers} == {(" 123", 2, "stop")}
    assert [len(prompts) for prompts, _ in vllm.asked] == [2, 1]
    prompts, parameters = vllm.asked[0]
    assert prompts[0] == {"prompt_token_ids": tokens.prompt_ids(samples[0])}
    assert (parameters[0].temperature, parameters[0].top_p, parameters[0].max_tokens) == (0.0, 1.0, 12)
    engine.longest = samples[0].prompt_tokens + 3  # what is left of the window bounds the answer
    list(engine.complete(samples[:1]))
    assert vllm.asked[-1][1][0].max_tokens == 3
    vllm.cut = 1
    with pytest.raises(ValueError, match="vLLM read .* tokens of a prompt of"):
        list(engine.complete(samples[:1]))


def test_vllm_teacher_forced(vllm: FakeVllm, folder: Path, tokens: PromptTokens) -> None:
    engine = VllmEngine(read_model(folder), tokens, None, 1024)
    engine.load()
    assert "hf_overrides" not in vllm.made[0]
    sample = question(3, tokens)
    ids, start, _ = tokens.answer_ids(sample)
    ((_, forced),) = engine.force([sample])
    assert vllm.asked[0][1][0].prompt_logprobs == 1 and vllm.asked[0][1][0].max_tokens == 1
    assert vllm.asked[0][0] == [{"prompt_token_ids": list(ids)}]
    assert forced.tokens == len(ids) - start > 1 and not forced.greedy_exact
    assert forced.nll == pytest.approx((start + len(ids) - 1) / 2 / 8)


def test_without_vllm(folder: Path, tokens: PromptTokens) -> None:
    with pytest.raises(ValueError, match=r"^--backend vllm needs vLLM: pip install megatron_rpsd\[vllm\]$"):
        VllmEngine(read_model(folder), tokens, None, 1024)
