"""tools/evaluate.py from prompts to report: answers that are known give the scores that they must."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_rpsd.evaluation.engines.prompt_tokens import PromptTokens
from megatron_rpsd.evaluation.engines.reference import Oracle
from megatron_rpsd.evaluation.ruler_evaluation import evaluate
from megatron_rpsd.evaluation.ruler_options import evaluation_parser
from megatron_rpsd.evaluation.samples import load_prepared
from megatron_rpsd.ruler.sources import Sources
from megatron_rpsd.ruler.tasks import RULER_TASKS, SYNTHETIC_TASKS
from tests.completions_server import Server, completion
from tests.ruler_prompts import save_tokenizer, tiny_reader

ROOT = Path(__file__).resolve().parents[2]
LENGTH, SAMPLES = 4096, 4


def command_line():
    """tools/evaluate.py as a module."""
    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "tools" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def run(output: Path, *argv: object) -> dict:
    """scores.json of an evaluation."""
    assert command_line()([*map(str, argv), "--output", str(output)]) == 0
    return json.loads((output / "scores.json").read_text())


def scores_alone(output: Path, *argv: object) -> dict:
    """The same without a report, whose figures take seconds."""
    return evaluate(evaluation_parser("").parse_args([*map(str, argv), "--output", str(output)]))[0]


def cells(scores: dict) -> dict[str, dict]:
    return {cell["task"]: cell for cell in scores["cells"]}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with whole words, so that questions fit; no model is needed."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("words")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def available_tasks() -> list[str]:
    """RULER's 13 where its texts are installed; else the synthetic ones in place of those that need texts."""
    try:
        sources = Sources(None)
        assert sources.essay_words and sources.squad and sources.hotpotqa
    except ValueError:
        return [name + "@synthetic" * (name + "@synthetic" in SYNTHETIC_TASKS) for name in RULER_TASKS]
    return list(RULER_TASKS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_the_oracle_has_100_and_chance_has_0(words: Path, cache: Path, tmp_path: Path, capsys) -> None:
    tasks = available_tasks()
    common = ["--tokenizer", words, "--tasks", *tasks, "--lengths", LENGTH, "--num-samples", SAMPLES, "--cache", cache]
    scores = run(tmp_path / "oracle", *common, "--backend", "oracle")
    assert {name: cell["score"] for name, cell in cells(scores).items()} == dict.fromkeys(tasks, 100.0)
    (row,) = scores["lengths_summary"]
    assert row["mean"] == (100.0 if tasks == list(RULER_TASKS) else None)
    assert "100.00" in capsys.readouterr().out and (tmp_path / "oracle" / "report.html").is_file()
    run_json = json.loads((tmp_path / "oracle" / "run.json").read_text())
    assert set(run_json["prepared"]) == {f"{task}-{LENGTH}" for task in tasks}
    chance = cells(scores_alone(tmp_path / "random", *common, "--backend", "random"))
    assert sum(cell["score"] for cell in chance.values()) / len(chance) < 2
    # A finished run, replayed by id, scores as it did.
    replayed = scores_alone(tmp_path / "replay", *common, "--backend", "replay", "--predictions", tmp_path / "random")
    assert {name: cell["score"] for name, cell in cells(replayed).items()} == {n: c["score"] for n, c in chance.items()}


def test_a_hole_of_known_place(words: Path, cache: Path, tmp_path: Path) -> None:
    argv = ["--tokenizer", words, "--tasks", "niah_single_1", "vt", "niah_single_1@grid", "--lengths", 1024]
    argv += ["--num-samples", 40, "--cache", cache, "--depths", 0, 20, 40, 60, 80, 100]
    found = cells(scores_alone(tmp_path / "blind", *argv, "--backend", "blind:0.33-0.67"))
    prepared = {
        task: load_prepared(next(cache.glob(f"*/{task}-1024.jsonl")))
        for task in ("niah_single_1", "vt", "niah_single_1@grid")
    }
    for task in ("niah_single_1", "vt"):
        seen: dict[int, list[bool]] = {}
        share = []
        for sample in prepared[task].samples:
            places = [evidence.tokens[0][0] / sample.prompt_tokens for evidence in sample.evidence]
            hits = [not 0.33 <= place < 0.67 for place in places]
            share.append(sum(hits) / len(hits))
            for place, hit in zip(places, hits, strict=True):
                seen.setdefault(min(int(place * 10), 9), []).append(hit)
        bins = {round(one["low"] * 10): one for one in found[task]["position"]["bins"]}
        assert {place: (one["n"], one["accuracy"]) for place, one in bins.items()} == {
            place: (len(hits), pytest.approx(sum(hits) / len(hits))) for place, hits in seen.items()
        }
        assert bins[5]["accuracy"] == 0 and bins[9]["accuracy"] == 1
        assert found[task]["score"] == pytest.approx(100 * sum(share) / len(share), abs=0.01)
        means = [sum(hits) / len(hits) for hits in seen.values()]
        middle = sum(means) / len(means)
        by_hand = 100 * (sum((mean - middle) ** 2 for mean in means) / len(means)) ** 0.5
        assert found[task]["position"]["deviation"] == pytest.approx(by_hand) and by_hand > 30
    grid = found["niah_single_1@grid"]["position"]
    assert grid["kind"] == "grid" and [one["accuracy"] for one in grid["bins"]] == [1, 1, 0, 0, 1, 1]
    assert grid["deviation"] == pytest.approx(100 * (2 / 6 * 4 / 6) ** 0.5) and grid["range"] == 100


def test_lengths_and_tasks_join_a_run(words: Path, cache: Path, tmp_path: Path, capsys) -> None:
    common = ["--tokenizer", words, "--num-samples", 2, "--cache", cache, "--backend", "oracle"]
    scores_alone(tmp_path / "run", *common, "--tasks", "niah_single_1", "--lengths", 512)
    scores = scores_alone(tmp_path / "run", *common, "--tasks", "vt", "--lengths", 1024)
    assert [(cell["task"], cell["length"]) for cell in scores["cells"]] == [("niah_single_1", 512), ("vt", 1024)]
    # What an interrupted command has left unfinished is left out until it is run again.
    place = tmp_path / "run" / "predictions" / "niah_single_1-512.jsonl"
    place.write_bytes(place.read_bytes().splitlines(keepends=True)[0])
    scores = scores_alone(tmp_path / "run", *common, "--tasks", "vt", "--lengths", 1024)
    assert scores["tasks"] == ["vt"] and "niah_single_1-512 is not complete" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_reader(tmp_path_factory.mktemp("model"))


def test_a_model_runs_resumes_compares_and_reports(model: Path, tmp_path: Path, capsys) -> None:
    argv = ["--hf", model, "--tasks", "niah_single_1", "--lengths", 512, "--num-samples", 3, "--teacher-forced"]
    output, main = tmp_path / "model", command_line()
    first = run(output, *argv, "--device", "cpu")
    shown = capsys.readouterr()
    for line in ("window      1024 tokens; longest length 512", "BOS         none", "TFLOP in", "time, at most"):
        assert line in shown.out
    assert "niah_single_1-512: 3 of 3 samples" in shown.err
    lines = (output / "predictions" / "niah_single_1-512.jsonl").read_bytes()
    assert {"nll", "greedy_exact", "answer_tokens"} <= json.loads(lines.splitlines()[0]).keys()
    (cell,) = first["cells"]
    assert cell["teacher_forced"]["nll"] > 1 and cell["truncated"] <= 3
    model_said = first["provenance"]["model"]
    assert model_said["path"] == str(model) and len(model_said["weights_sha256"]) == 64
    assert first["provenance"]["engine"]["dtype"] == "float32" and first["provenance"]["bos"] == "none"
    # Nothing is left to ask, and nothing is loaded: the same command only scores again.
    second = run(output, *argv, "--device", "cpu")
    assert second == first and (output / "predictions" / "niah_single_1-512.jsonl").read_bytes() == lines
    # Another length joins the run; another option does not.
    with pytest.raises(SystemExit) as refused:
        main([*map(str, argv), "--device", "cpu", "--yarn-factor", "2", "--output", str(output)])
    assert refused.value.code == 2 and "holds another run: model.rope" in capsys.readouterr().err
    report = output / "report.html"
    report.unlink()
    assert main(["report", str(output)]) == 0 and report.is_file()
    assert main(["compare", str(output), str(output), "--max-regression", "0"]) == 0
    compared = json.loads((output / "compare" / "compare.json").read_text())
    assert compared["regressions"] == [] and compared["cells"][0]["difference"] == 0
    assert main(["doctor", "--hf", str(model)]) == 0
    prompts = next((output / "prompts").glob("*/niah_single_1-512.jsonl"))
    assert main(["export-harness", "--prepared", str(prompts), "--output", str(tmp_path / "harness")]) == 0
    assert capsys.readouterr().out.endswith("prepared_niah_single_1_512\n")


def test_an_interrupted_run_says_how_to_go_on(words: Path, cache: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def stop(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Oracle, "complete", stop)
    argv = ["--tokenizer", words, "--tasks", "niah_single_1", "--lengths", 512, "--num-samples", 2, "--cache", cache]
    assert command_line()([*map(str, argv), "--backend", "oracle", "--output", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err.endswith("interrupted; the same command goes on from here\n")


def refuse(capsys, argv: Sequence[object]) -> str:
    """What stderr holds when a command is refused: exit code 2, and one line of error at the end."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as refused:
        command_line()([*map(str, argv)])
    said = capsys.readouterr().err
    assert refused.value.code == 2 and said.splitlines()[-1].startswith("error: ") and said.count("error: ") == 1, said
    return said


def test_refusals(model: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "output"
    common = ["--hf", model, "--output", output, "--num-samples", 2, "--device", "cpu"]
    vt = [*common, "--tasks", "vt"]
    for argv, said in (
        ([*common, "--tasks", "niah_9", "--lengths", 512], "niah_9: the tasks are"),
        ([*vt, "--lengths", "4k"], "--lengths 4k: give whole numbers of tokens"),
        ([*vt, "--lengths", 2048], "--lengths 2048: more than the model's window of 1024 tokens by 1024"),
        ([*vt, "--lengths", 4096, "--yarn-factor", 2], "1024 x YaRN 2 = 2048 tokens by 2048"),
        ([*vt], "give --tasks and --lengths, or --prepared"),
        ([*vt, "--lengths", 512, "--prepared", "x.jsonl"], "--prepared names the prompts"),
        ([*vt, "--lengths", 512, "--depths", 50], "--depths belongs to tasks whose name ends in @grid"),
        ([*vt, "--lengths", 512, "--edition", "1999"], "--edition 1999"),
        ([*vt, "--lengths", 512, "--backend", "vllm", "--device", "cpu"], "--device is read by --backend transformers"),
        (
            ["--tasks", "vt", "--lengths", 512, "--backend", "oracle", "--output", output],
            "--tokenizer DIR (or --hf DIR)",
        ),
        (["report", output], "holds no scores.json"),
        (["compare", output, output], "has no scores.json"),
    ):
        found = refuse(capsys, argv)
        assert said in found and found.count("\n") == 1
    assert not output.exists()
    (tmp_path / "file").write_text("")
    below = [
        "--hf",
        model,
        "--tasks",
        "vt",
        "--lengths",
        512,
        "--backend",
        "oracle",
        "--output",
        tmp_path / "file" / "x",
    ]
    assert "Not a directory" in refuse(capsys, below)
    dear = [*common, "--tasks", "niah_single_1", "--lengths", 512, "--limit-hours", 0]
    assert "--limit-hours 0: the run would take up to" in refuse(capsys, dear)
    assert not (output / "run.json").exists() and not (output / "predictions").exists()


def test_prompts_of_another_tokenizer(model: Path, tmp_path: Path, capsys) -> None:
    other = save_tokenizer(tmp_path / "other", adds_bos=True)
    made = ["--tasks", "niah_single_1", "--lengths", 512, "--num-samples", 2, "--cache", tmp_path / "cache"]
    scores_alone(tmp_path / "oracle", *made, "--tokenizer", other, "--backend", "oracle")
    (path,) = (tmp_path / "cache").glob("*/niah_single_1-512.jsonl")
    said = refuse(capsys, ["--hf", model, "--prepared", path, "--output", tmp_path / "x", "--device", "cpu"])
    assert re.search("was prepared with tokenizer [0-9a-f]{12}, the model's is", said)


def test_a_server_that_goes_away_and_comes_back(model: Path, tmp_path: Path, capsys) -> None:
    tokens, whole = PromptTokens(model), []

    def answers(number: int, body: dict) -> tuple:
        if body["max_tokens"] == 128:  # a sample, not the warm-up
            whole.append(len(body["prompt"]))
        value = re.search(r"is: (\d{7})[.]", tokens.text(body["prompt"]))[1]
        return (200, completion(body, f" {value}."), {})

    with Server() as server:
        argv = ["--tokenizer", model, "--tasks", "niah_single_1", "--lengths", 512, "--num-samples", 4]
        argv += ["--backend", "openai", "--endpoint", server.url, "--model", "m", "--concurrency", 1]
        # Three requests of the warm-up and two samples, then nothing but refusals.
        server.reply = lambda number, body: answers(number, body) if number <= 5 else (403, "closed", {})
        assert "refuses: 403 closed" in refuse(capsys, [*argv, "--output", tmp_path / "run"])
        assert len((tmp_path / "run" / "predictions" / "niah_single_1-512.jsonl").read_text().splitlines()) == 2
        server.reply = answers
        scores = scores_alone(tmp_path / "run", *argv)
    (cell,) = scores["cells"]
    assert cell["score"] == 100 and scores["provenance"]["model"]["path"] == "m"
    assert len(whole) == 4 and max(whole) + 128 <= 512  # none was asked again that had been answered
