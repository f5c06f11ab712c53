"""What is refused before anything is computed, and what a run is said to cost."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rpsd.evaluation import preflight, ruler_evaluation
from megatron_rpsd.evaluation.cost_table import check_limit, cost_table, total
from megatron_rpsd.evaluation.engines.base import Completion
from megatron_rpsd.evaluation.engines.choose import check_backend, make_engine
from megatron_rpsd.evaluation.engines.model_facts import read_model
from megatron_rpsd.evaluation.engines.prompt_tokens import PromptTokens
from megatron_rpsd.evaluation.engines.reference import Oracle
from megatron_rpsd.evaluation.preflight import (
    Cell,
    Rate,
    check_alike,
    check_disk,
    check_tokens,
    check_window,
    costs,
    measure,
    warm_up,
)
from megatron_rpsd.evaluation.ruler_options import evaluation_parser
from tests.ruler_prompts import BOS, save_tokenizer
from tests.unit.evaluation.made_samples import Made, write_prepared
from tests.unit.evaluation.questions import question, with_prompt


def cell(tokens: PromptTokens, length: int = 4096, **changed) -> Cell:
    manifest = {"length": length, "generated_tokens": 10, "tokenizer_sha256": tokens.counter.sha256}
    return replace(Cell(Path("p"), f"vt-{length}", manifest, 4, 400, 0.0, False, False, question(0, tokens)), **changed)


def test_window(folder: Path) -> None:
    facts = read_model(folder)
    assert check_window(facts, None, 1024) == "window      1024 tokens; longest length 1024"
    assert check_window(facts, 2.0, 2048) == "window      1024 x YaRN 2 = 2048 tokens; longest length 2048"
    with pytest.raises(
        ValueError, match="--lengths 1025: more than the model's window of 1024 tokens by 1; use a larger"
    ):
        check_window(facts, None, 1025)
    with pytest.raises(ValueError, match="window of 1024 x YaRN 2 = 2048 tokens by 952; use a larger --yarn-factor"):
        check_window(facts, 2.0, 3000)


def test_tokenizer_vocabulary_and_bos(folder: Path, tokens: PromptTokens, tmp_path: Path) -> None:
    facts = read_model(folder)
    lines = check_tokens([cell(tokens)], tokens, facts)
    assert [line.split()[0] for line in lines] == ["tokenizer", "vocabulary", "BOS"] and lines[2].endswith("none")
    other = cell(tokens, manifest={"tokenizer_sha256": "0123456789abcdef", "length": 64, "generated_tokens": 1})
    with pytest.raises(ValueError, match="p was prepared with tokenizer 0123456789ab, the model's is"):
        check_tokens([other], tokens, facts)
    with pytest.raises(ValueError, match="its tokenizer.json .* is not the model's"):
        check_tokens([cell(tokens)], PromptTokens(save_tokenizer(tmp_path / "adding", adds_bos=True)), facts)
    with pytest.raises(ValueError, match="tokens by .*, 7 by its evidence file"):
        check_tokens([cell(tokens, first=question(0, tokens, prompt_tokens=7))], tokens, facts)
    small = shutil.copytree(folder, tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": tokens.vocab_size - 1}))
    with pytest.raises(ValueError, match=f"ids up to {tokens.vocab_size - 1}, the model {tokens.vocab_size - 1} embed"):
        check_tokens([cell(tokens)], tokens, read_model(small))
    templated = cell(tokens, bos_in_text=True, first=with_prompt(question(), BOS + "a question", tokens))
    with pytest.raises(ValueError, match="--bos add: p begins with the BOS already"):
        check_tokens([templated], PromptTokens(folder, "add"), facts)
    assert check_tokens([templated], tokens, facts)[-1] == "BOS         one, in the prompts' own text"
    with pytest.raises(ValueError, match="some prompts begin with a BOS and some do not"):
        check_tokens([templated, cell(tokens)], tokens, facts)
    assert check_tokens([cell(tokens, bos=True)], tokens, facts)[-1] == "BOS         one, put before every prompt"


def test_prompts_that_would_be_cut(tmp_path: Path) -> None:
    path = write_prepared(tmp_path, "vt", [Made(["a"], [1])] * 3, length=1128)
    assert (measure(path, None, None).prompt_tokens, measure(path, None, None).generated_tokens) == (3000, 3 * 128)
    path = write_prepared(tmp_path, "vt", [Made(["a"], [1])], length=1127)
    with pytest.raises(ValueError, match="vt/1127/0 has 1000 [+] 128 tokens, more than 1127: it would be cut"):
        measure(path, None, None)


def test_files_of_one_run_are_alike(tokens: PromptTokens) -> None:
    one, other = cell(tokens), cell(tokens, 64, path=Path("q"))
    check_alike([one, other])
    for key, value in (("edition", "2024-12"), ("seed", 7), ("tokenizer_sha256", "x"), ("model_template", "chat")):
        with pytest.raises(ValueError, match=f"p has {key} .*, q has {value}: evaluate them apart"):
            check_alike([one, replace(other, manifest=other.manifest | {key: value})])
    check_alike([one, replace(other, manifest=other.manifest | {"model_template": "base"})])
    with pytest.raises(ValueError, match="p and q are of the same task and length"):
        check_alike([one, replace(other, name=one.name)])


def test_disk(tmp_path: Path, monkeypatch) -> None:
    check_disk(tmp_path / "not" / "there", 1)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: argparse.Namespace(free=3e9))
    with pytest.raises(ValueError, match="about 4.00 GB are needed, 3.00 GB are free"):
        check_disk(tmp_path, 4_000_000_000)


def test_costs(folder: Path, tokens: PromptTokens) -> None:
    facts = read_model(folder)
    cells = [
        cell(tokens, 64, samples=4, prompt_tokens=200, flops=4 * facts.flops(50)),
        cell(tokens, 128, samples=10, prompt_tokens=1000, flops=10 * facts.flops(100)),
        cell(tokens, 64, samples=2, prompt_tokens=100, flops=2 * facts.flops(50)),
    ]
    # 25 tokens took 3 s to read and 0.5 s each to write; half of the second file is done.
    short, long = costs(cells, [0, 5, 0], Rate(25, 3.0, 0.5), facts)
    assert (short.length, short.prompts, short.prompt_tokens, short.generated_tokens) == (64, 6, 300, 60)
    assert (long.prompts, long.prompt_tokens, long.generated_tokens) == (5, 500, 50)
    assert long.flops == 5 * facts.flops(100)
    assert long.seconds == pytest.approx(3 * 5 * facts.flops(100) / facts.flops(25) + 25)
    unknown = costs(cells, [0, 5, 0], Rate(25, 3.0, 0.5), None, parallel=2)
    assert unknown[1].seconds == pytest.approx((3 * 20 + 25) / 2)
    assert costs(cells, [0] * 3, None, None)[0].seconds is None
    table = cost_table([short, long]).splitlines()
    assert len({len(line) for line in table}) == 1 and table[-1].split()[:4] == ["all", "11", "800", "110"]
    check_limit([long], None)
    check_limit([long], long.seconds / 3600 + 0.01)
    with pytest.raises(ValueError, match="--limit-hours 0: the run would take up to"):
        check_limit([short, long], 0.0)
    assert total(costs(cells, [0] * 3, None, None)).seconds is None


def test_warm_up(tokens: PromptTokens, monkeypatch) -> None:
    clock, asked = [0.0], []

    class Timed(Oracle):
        def complete(self, samples) -> Iterator:
            for sample in samples:
                asked.append((sample.prompt_tokens, sample.generated_tokens))
                # 0.01 s a token read, 0.25 s a token written; the answer ends by itself after five.
                written = min(5, sample.generated_tokens)
                clock[0] += 0.01 * sample.prompt_tokens + 0.25 * min(5, sample.generated_tokens - 1)
                yield sample, Completion("x", written, "stop" if sample.generated_tokens > 5 else "length")

    monkeypatch.setattr(preflight.time, "perf_counter", lambda: clock[0])
    sample = question(0, tokens, noise=40)
    rate = warm_up(Timed(), tokens, sample, 100)
    assert [generated for _, generated in asked] == [1, 1, 9] and {prompt for prompt, _ in asked} == {rate.tokens}
    assert 70 < rate.tokens <= 110 < sample.prompt_tokens
    assert rate.prefill == pytest.approx(0.01 * rate.tokens) and rate.step == pytest.approx(0.25)


def options(*argv: str) -> argparse.Namespace:
    return evaluation_parser("").parse_args(["--output", "o", *argv])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--backend", "gpt"], "--backend gpt: the backends are transformers, vllm, openai"),
        (["--backend", "oracle:1"], "--backend oracle:1: the backends are"),
        (["--backend", "blind"], "--backend blind: the backends are"),
        ([], "--backend transformers needs --hf"),
        (["--backend", "openai", "--model", "m"], "--backend openai needs --endpoint and --model"),
        (["--backend", "replay"], "--backend replay needs --predictions"),
        (["--backend", "oracle", "--prefill-chunk", "4"], "--prefill-chunk is read by --backend transformers, not by"),
        (["--backend", "openai", "--endpoint", "u", "--model", "m", "--yarn-factor", "2"], "--yarn-factor is read by"),
        (["--backend", "random", "--teacher-forced"], "--teacher-forced needs probabilities .* transformers or vllm"),
    ],
)
def test_backends_that_cannot_be(argv: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_backend(options(*argv))


def test_devices_and_options(folder: Path, tokens: PromptTokens) -> None:
    facts = read_model(folder)
    with pytest.raises(ValueError, match="--device cuda:7: torch sees no GPU|--device cuda:7"):
        make_engine(options("--hf", str(folder), "--device", "cuda:7"), facts, tokens, None, 64)
    with pytest.raises(ValueError, match="--batch-size -1"):
        make_engine(options("--hf", str(folder), "--device", "cpu", "--batch-size", "-1"), facts, tokens, None, 64)
    made = make_engine(options("--hf", str(folder), "--device", "cpu", "--prefill-chunk", "7"), facts, tokens, 2.0, 64)
    wanted = {"name": "transformers", "device": "cpu", "dtype": "float32", "attention": "sdpa", "prefill_chunk": 7}
    assert made.describe() == wanted | {"batch_size": 1}


def test_tasks_and_lengths() -> None:
    assert len(ruler_evaluation.wanted_tasks(["all"])) == 13
    assert [task.name for task in ruler_evaluation.wanted_tasks(["vt", "qa_1@synthetic"])] == ["vt", "qa_1@synthetic"]
    assert ruler_evaluation.wanted_lengths(["512", "256", "512"]) == [256, 512]
    with pytest.raises(ValueError, match="--task.* niah_9: the tasks are niah_single_1"):
        ruler_evaluation.wanted_tasks(["niah_9"])
    with pytest.raises(ValueError, match="--tasks: vt is there twice"):
        ruler_evaluation.wanted_tasks(["all", "vt"])
    for wrong in ("4k", "-1", "0", "1.5", "²"):
        with pytest.raises(ValueError, match=f"--lengths {wrong}: give whole numbers"):
            ruler_evaluation.wanted_lengths([wrong])


def test_every_backend_is_made(folder: Path, tokens: PromptTokens, tmp_path: Path) -> None:
    facts, predictions = read_model(folder), tmp_path / "p.jsonl"
    predictions.write_text("")

    def made(*argv: str) -> dict:
        args = options("--hf", str(folder), *argv)
        check_backend(args)
        engine = make_engine(args, facts, tokens, None, 64)
        engine.close()
        return engine.describe()

    server = made("--backend", "openai", "--endpoint", "http://h/v1", "--model", "m", "--timeout", "5")
    assert server == {"name": "openai", "url": "http://h/v1/completions", "model": "m"}
    assert made("--backend", "replay", "--predictions", str(predictions), "--predictions-order", "lines")["by_line"]
    assert made("--backend", "random", "--seed", "9") == {"name": "random", "seed": 9}
    assert made("--backend", "oracle") == {"name": "oracle"} and made("--backend", "blind:0-1")["high"] == 1
    for wrong in ("x", "[]"):
        with pytest.raises(ValueError, match="--vllm-options .*: give a JSON object"):
            made("--backend", "vllm", "--vllm-options", wrong)
