"""Exported prompts in lm-evaluation-harness: the same text to the model, the same answers, the same scores."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rpsd.evaluation import harness_task
from megatron_rpsd.evaluation.harness import export_harness
from megatron_rpsd.evaluation.samples import load_prepared
from megatron_rpsd.evaluation.scoring import reference_hits, sample_score, task_score
from tests.ruler_prompts import lines, make_prompts, tiny_reader

TASKS = {"niah_single_1": 512, "vt": 1000, "qa_1@synthetic": 4608}
# Where lm_eval and what it needs were installed, if they are not among the environment's own packages.
PACKAGES = os.environ.get("LM_EVAL_PATH", str(Path(sys.prefix) / "peers"))


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    return tiny_reader(tmp_path_factory.mktemp("reader") / "hf", "llama", adds_bos=True)


@pytest.fixture(scope="module")
def prepared(reader, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("prompts")
    return [make_prompts(folder, reader, task, length, 2) for task, length in TASKS.items()]


def greedy(hf: Path, path: Path) -> list[str]:
    """Answers to a prepared file's prompts by transformers, with the tokenizer's own BOS."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(hf), AutoTokenizer.from_pretrained(hf)
    answers = []
    for sample in load_prepared(path).samples:
        ids = tokenizer(sample.prompt, return_tensors="pt").input_ids
        assert ids.shape[1] == sample.prompt_tokens + 1
        with torch.no_grad():
            made = model.generate(ids, max_new_tokens=sample.generated_tokens, do_sample=False)
        answers.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


def with_references(path: Path, answers: list[str]) -> None:
    """Change the references so that these answers hold some of them: no random model finds RULER's own."""
    records, evidence = lines(path), lines(path.with_suffix(".evidence.jsonl"))
    for number, (record, where, answer) in enumerate(zip(records, evidence, answers, strict=True)):
        said = max(re.findall(r"[A-Za-z]{2,}", answer), key=len).upper()
        if path.name.startswith("qa"):
            record["outputs"] = ["never said", said][: 1 + number]
        else:
            record["outputs"] = [said, "NEVER SAID", "nor this"][: 3 - number]
        where["evidence"] = [{**where["evidence"][0], "reference": output} for output in record["outputs"]]
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(content)
    path.with_suffix(".evidence.jsonl").write_text("".join(json.dumps(where) + "\n" for where in evidence))
    manifest = json.loads(path.with_suffix(".manifest.json").read_text())
    manifest["sha256"] = hashlib.sha256(content).hexdigest()
    path.with_suffix(".manifest.json").write_text(json.dumps(manifest))


def lm_eval(*words) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [PACKAGES, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "lm_eval", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)


@pytest.fixture(scope="module")
def has_lm_eval() -> None:
    looked = [sys.executable, "-c", "import lm_eval"]
    if subprocess.run(looked, capture_output=True, env={**os.environ, "PYTHONPATH": PACKAGES}).returncode:
        pytest.skip("needs lm_eval: install it, or name the folder that holds it and its packages in LM_EVAL_PATH")


def test_the_harness_gives_the_same_answers_and_scores(reader, prepared, has_lm_eval, tmp_path):
    expected = {}
    for path in prepared:
        answers = greedy(reader, path)
        with_references(path, answers)
        loaded = load_prepared(path)
        hits = [reference_hits(answer, s.outputs) for answer, s in zip(answers, loaded.samples, strict=True)]
        expected[path.stem] = answers, task_score([sample_score(found, loaded.manifest["metric"]) for found in hits])
    assert [score for _, score in expected.values()] == [41.67, 41.67, 50.0]
    names = export_harness(prepared, tmp_path / "tasks")
    done = lm_eval(
        "--model", "hf", "--model_args", f"pretrained={reader},dtype=float32,max_length=4609", "--device", "cpu",
        "--include_path", tmp_path / "tasks", "--tasks", "prepared", "--batch_size", 1,
        "--output_path", tmp_path / "out", "--log_samples",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").glob("*/results_*.json")
    scores = json.loads(results.read_text())["results"]
    for name, path in zip(names, prepared, strict=True):
        answers, score = expected[path.stem]
        metric = f"string_match_{load_prepared(path).manifest['metric']}"
        assert round(100 * scores[name][f"{metric},none"], 2) == score
        (logged,) = (tmp_path / "out").glob(f"*/samples_{name}_*.jsonl")
        asked = sorted(lines(logged), key=lambda line: line["doc_id"])
        assert [line["arguments"]["gen_args_0"]["arg_0"] for line in asked] == [
            s.prompt for s in load_prepared(path).samples
        ]
        assert [line["resps"][0][0] for line in asked] == answers


def test_the_exported_folder_holds_prompts_tasks_and_scoring(prepared, tmp_path):
    names = export_harness(prepared, tmp_path / "tasks")
    assert names == ["prepared_niah_single_1_512", "prepared_vt_1000", "prepared_qa_1_synthetic_4608"]
    assert {path.name for path in (tmp_path / "tasks").iterdir()} == {
        "harness_task.py", *(f"{name}{end}" for name in names for end in (".jsonl", ".yaml"))
    }  # fmt: skip
    documents = lines(tmp_path / "tasks" / "prepared_vt_1000.jsonl")
    records = lines(prepared[1])
    assert [document["prompt"] for document in documents] == [r["input"] + r["answer_prefix"] for r in records]
    assert [document["outputs"] for document in documents] == [record["outputs"] for record in records]
    text = (tmp_path / "tasks" / "prepared_qa_1_synthetic_4608.yaml").read_text()
    assert "harness_task.string_match_part" in text and '"max_gen_toks": 32' in text
    assert load_prepared(prepared[2]).manifest["sha256"] in text


CASES = [
    ("  The answer is\tABC-7 and abc-8 ", ["abc-7", "ABC-8", "abc-9"]),
    ("", ["x"]),
    ("a\x00b\nc", ["a\nb", "b\nc"]),
    ("12345678", ["2345678", "99"]),
]


@pytest.mark.parametrize("prediction, outputs", CASES)
def test_its_scoring_is_ours(prediction, outputs):
    hits, doc = reference_hits(prediction, outputs), {"outputs": outputs}
    assert harness_task.string_match_all(doc, [prediction]) == {"string_match_all": sample_score(hits, "all")}
    assert harness_task.string_match_part(doc, [prediction]) == {"string_match_part": sample_score(hits, "part")}


def test_what_cannot_be_exported_leaves_nothing(prepared, tmp_path):
    with pytest.raises(ValueError, match="same task and length, prepared_vt_1000"):
        export_harness([prepared[1], prepared[1]], tmp_path / "new" / "tasks")
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(ValueError, match="not an empty folder"):
        export_harness(prepared, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
