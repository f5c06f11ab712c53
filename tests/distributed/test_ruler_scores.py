"""Teacher-forced scores inside training against transformers reading every prompt and answer by itself."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rpsd.checkpoint.convert import export_hf, hf_session_arguments, import_hf
from megatron_rpsd.checkpoint.hf_folder import HFFolder
from megatron_rpsd.checkpoint.model_loading import load_hf_weights
from megatron_rpsd.loss import vocab_parallel_argmax
from megatron_rpsd.parallel import VocabularyShard
from megatron_rpsd.positions.phases import parse_phases
from megatron_rpsd.training.phases import PhasedForwardStep
from megatron_rpsd.training.ruler_scores import DEFAULT_SAMPLES, RulerScores, answer_files, ruler_scores_from_args
from megatron_rpsd.training.run import forward_step_from_args
from megatron_rpsd.training.session import build_stages, end_session, start_session
from tests.distributed import training_job
from tests.distributed.corpus import run_arguments, write_corpus
from tests.distributed.test_gradients import CP2, SP, TP2
from tests.distributed.test_training import PP2, scalars
from tests.ruler_prompts import lines, make_prompts, tiny_reader, write_prepared

LENGTH = 96
LEARNED = 3
NUMBERS = [["4815162", "3421087"], ["9900112"], ["5550001", "7", "31"], ["2718281"], ["1618033"]]
NAMES = [["QAZ", "WSX", "EDC"], ["RFV", "TGB"], ["YHN"], ["UJM", "IKO", "LPA"], ["MNB", "VCX"]]
# The gold answers as text, written out.
NUMBER_ANSWERS = [" 4815162 and 3421087", " 9900112", " 5550001, 7, and 31", " 2718281", " 1618033"]
NAME_ANSWERS = [" QAZ WSX EDC", " RFV TGB", " YHN", " UJM IKO LPA", " MNB VCX"]


def prompt_texts(kind: str) -> list[tuple[str, str]]:
    """Inputs of different lengths, and answer prefixes; VT's ends with a blank, as RULER's."""
    ends = {"niah": " The special magic number is", "vt": " Answer: they are: "}[kind]
    return [("The grass is green. " * (1 + row) + f"Case {row}.", ends) for row in range(len(NUMBERS))]


def training_rows(hf: Path, kind: str, answers: list[str]) -> list[tuple[list[int], int]]:
    """(ids of prompt and answer, where the answer begins), by transformers' tokenizer."""
    tokenizer, rows = AutoTokenizer.from_pretrained(hf), []
    for (text, prefix), answer in zip(prompt_texts(kind), answers, strict=True):
        whole = tokenizer(text + prefix + answer).input_ids
        rows.append((whole, len(tokenizer(text + prefix).input_ids)))
    return rows


def learn(hf: Path, rows: list[tuple[list[int], int]]) -> None:
    """Make the model give the answers of `rows` greedily."""
    model = AutoModelForCausalLM.from_pretrained(hf)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(300):
        right, total = 0, 0.0
        for ids, start in rows:
            logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
            labels = torch.tensor(ids[start:])
            total = total + torch.nn.functional.cross_entropy(logits, labels)
            right += bool((logits.argmax(-1) == labels).all())
        if right == len(rows):
            model.save_pretrained(hf)
            return
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    raise AssertionError("the tiny model did not learn its answers")


def expected_scores(hf: Path) -> dict[str, float]:
    """By transformers in fp64, a sample at a time."""
    model, scores = AutoModelForCausalLM.from_pretrained(hf).double(), {}
    for name, kind, answers in (("niah_multivalue-96", "niah", NUMBER_ANSWERS), ("vt-96", "vt", NAME_ANSWERS)):
        losses, exact = [], []
        for ids, start in training_rows(hf, kind, answers):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
            labels = torch.tensor(ids[start:])
            losses.append(torch.nn.functional.cross_entropy(logits, labels).item())
            exact.append(bool((logits.argmax(-1) == labels).all()))
        scores[f"{name} answer nll"] = sum(losses) / len(losses)
        scores[f"{name} greedy exact"] = sum(exact) / len(exact)
    return scores


def written(folder: Path, hf: Path) -> list[Path]:
    """Both prepared files."""
    files = []
    for task, kind, outputs in (("niah_multivalue", "niah", NUMBERS), ("vt", "vt", NAMES)):
        samples = [(*text, answers) for text, answers in zip(prompt_texts(kind), outputs, strict=True)]
        files.append(write_prepared(folder / f"{task}-96.jsonl", hf, task, samples))
    return files


def make_reader(folder: Path, adds_bos: bool) -> tuple[Path, list[Path]]:
    """A model that knows some of the answers, and both prepared files."""
    hf = tiny_reader(folder / "hf", "llama", adds_bos=adds_bos)
    learn(hf, training_rows(hf, "niah", NUMBER_ANSWERS)[:LEARNED])
    return hf, written(folder / "prompts", hf)


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> tuple[Path, list[Path]]:
    """One whose tokenizer puts a BOS before every text."""
    return make_reader(tmp_path_factory.mktemp("reader"), adds_bos=True)


def _scores(hf: Path, files: list[Path], flags: list[str]) -> dict[str, float]:
    folder = HFFolder(hf)
    arguments = [*hf_session_arguments(folder, None), "--device", "cpu", "--seq-length", str(LENGTH), *flags]
    arguments += ["--eval-ruler", *map(str, files), "--eval-iters", "1", "--tokenizer-model", str(hf)]
    try:
        args, config = start_session([*arguments, "--tokenizer-type", "HuggingFaceTokenizer", "--objective", "rpsd"])
        stages = build_stages(config, args)
        from megatron.core import parallel_state

        rank = parallel_state.get_tensor_model_parallel_rank()
        load_hf_weights(stages, folder, args.tensor_model_parallel_size, rank, args.padded_vocab_size)
        for stage in stages:
            stage.eval()
        return ruler_scores_from_args(args, forward_step_from_args(args, config)).scores(stages)
    finally:
        end_session()


LAYOUTS = {
    "one": (1, []),
    "tp2_cp2_sp": (4, TP2 + CP2 + SP),
    "pp2_dp2": (4, PP2),
    "interleaved": (2, [*PP2, "--num-layers-per-virtual-pipeline-stage", "1"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_equal_transformers_reading_each_answer(layout, reader, ranks):
    world_size, flags = LAYOUTS[layout]
    hf, files = reader
    expected = expected_scores(hf)
    assert LEARNED / 5 <= expected["niah_multivalue-96 greedy exact"] < 1 and expected["vt-96 greedy exact"] < 1
    for found in ranks.run(world_size, _scores, hf, files, flags):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_no_bos_where_the_tokenizer_puts_none(ranks, tmp_path):
    hf, files = make_reader(tmp_path, adds_bos=False)
    (found,) = ranks.run(1, _scores, hf, files, [])
    assert found == pytest.approx(expected_scores(hf), rel=1e-5, abs=1e-5)


def test_a_run_logs_them_at_every_evaluation_and_trains_as_without(ranks, tmp_path):
    hf = tiny_reader(tmp_path / "hf", "llama")
    files, prefix = written(tmp_path / "prompts", hf), write_corpus(tmp_path / "corpus", documents=40)
    ranks.run(1, import_hf, hf, tmp_path / "checkpoint")
    arguments = [*run_arguments(tmp_path / "checkpoint", prefix, 3), "--seq-length", str(LENGTH)]
    arguments += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(hf)]
    arguments += ["--split", "60,40,0", "--eval-interval", "2", "--eval-iters", "1"]
    saved = ["--run-dir", str(tmp_path / "run"), "--save-interval", "3", "--eval-ruler", *map(str, files)]
    outputs = ranks.run(2, training_job.train, [*arguments, *saved, *TP2])
    with_scores = tmp_path / "run" / "tensorboard"
    ranks.run(2, training_job.train, [*arguments, *TP2, "--tensorboard-dir", str(tmp_path / "without")])
    for name in ("lm loss", "view kl", "lm loss validation"):
        assert scalars(with_scores, name) == scalars(tmp_path / "without", name)
    logged = [line for line in outputs[-1].splitlines() if line.startswith(" ruler at iteration")]
    assert [int(re.match(r" ruler at iteration (\d+) \|", line)[1]) for line in logged] == [2, 3]
    ranks.run(1, export_hf, tmp_path / "run" / "checkpoints", hf, tmp_path / "exported")
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    evaluated = [line for line in metrics if "vt-96 answer nll validation" in line]
    assert [line["iteration"] for line in evaluated] == [2, 3]
    first, last = (
        {name.removesuffix(" validation"): value for name, value in line.items() if "answer" in name or "exact" in name}
        for line in evaluated
    )
    assert last == pytest.approx(expected_scores(tmp_path / "exported"), rel=1e-5, abs=1e-6)
    assert first["vt-96 answer nll"] != last["vt-96 answer nll"]
    for name, value in last.items():
        assert scalars(with_scores, f"{name} validation") == pytest.approx([first[name], value], rel=1e-6)
        assert f"| {name}: {first[name]:.6E} |" in logged[0] and f"| {name}: {value:.6E} |" in logged[1]


def test_in_phases_the_one_that_trained_last_reads():
    schedule = parse_phases("short:theta=100,seq=4,samples=8;long:theta=5000,seq=8")
    for trained, name in ((0, "short"), (8, "short"), (9, "long")):
        step = PhasedForwardStep(schedule, ["short", "long"], lambda phase: None, lambda trained=trained: trained)
        assert RulerScores([], step).current_step() == name


def _argmax(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    import torch.distributed as dist

    columns = logits.shape[-1] // dist.get_world_size()
    shard = VocabularyShard.of_rank(vocab_size, columns, dist.group.WORLD)
    return vocab_parallel_argmax(logits[..., shard.vocab_start : shard.vocab_stop], shard)


def test_argmax_over_shards_equals_torchs(ranks):
    logits = torch.randn(50, 3, 64, generator=torch.Generator().manual_seed(1)).round(decimals=1)  # with equal logits
    logits[..., 37:] += 9  # padding: of one rank in part, of the last one wholly
    for found in ranks.run(4, _argmax, logits, 37):
        assert torch.equal(found, logits[..., :37].argmax(dim=-1))


def given(**changed) -> argparse.Namespace:
    usual = {
        "eval_ruler": None, "eval_ruler_samples": None, "eval_iters": 1, "split": "99,1,0", "valid_data_path": None,
        "tokenizer_model": None, "seq_length": LENGTH, "vocab_size": 1000, "context_parallel_size": 1,
        "tensor_model_parallel_size": 1, "sequence_parallel": False,
    }  # fmt: skip
    return argparse.Namespace(**{**usual, **changed})


REFUSED = {
    "no_files": ({"eval_ruler": None, "eval_ruler_samples": 4}, "--eval-ruler-samples needs --eval-ruler"),
    "no_samples": ({"eval_ruler_samples": 0}, "--eval-ruler-samples 0"),
    "no_evaluation": ({"eval_iters": 0}, "--eval-iters 0"),
    "no_held_out_data": ({"split": "100,0,0"}, "--split 100,0,0"),
    "no_tokenizer": ({"tokenizer_model": None}, "--tokenizer-model None"),
    "long": ({"seq_length": 32}, r"takes \d+ tokens, --seq-length is 32"),
    "vocabulary": ({"vocab_size": 200}, "the model's vocabulary 200"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_scored_is_refused(case, reader):
    hf, files = reader
    changed, words = REFUSED[case]
    with pytest.raises(ValueError, match=words) as refused:
        answer_files(given(**{"eval_ruler": files, "tokenizer_model": str(hf), **changed}))
    assert "\n" not in str(refused.value)


def test_files_that_are_not_the_runs_own_are_refused(reader, tmp_path):
    hf, files = reader
    usual = {"eval_ruler": files, "tokenizer_model": str(hf)}
    with pytest.raises(ValueError, match="two files are called vt-96.jsonl"):
        answer_files(given(**{**usual, "eval_ruler": [files[1], tmp_path / "vt-96.jsonl"]}))
    with pytest.raises(ValueError, match="does not exist"):
        answer_files(given(**{**usual, "eval_ruler": [tmp_path / "vt-96.jsonl"]}))
    other = tiny_reader(tmp_path / "other", "llama")
    (other / "tokenizer.json").write_text((hf / "tokenizer.json").read_text() + "\n")
    with pytest.raises(ValueError, match="prepare prompts with --tokenizer of the run's own"):
        answer_files(given(**{**usual, "tokenizer_model": str(other)}))
    torn = write_prepared(tmp_path / "torn" / "vt-96.jsonl", hf, "vt", [("a", " b", ["C"])])
    torn.write_bytes(torn.read_bytes().replace(b"C", b"D"))
    with pytest.raises(ValueError, match="its sha256 is not that of its manifest"):
        answer_files(given(**{**usual, "eval_ruler": [torn]}))


def test_generated_prompts_are_read_with_their_answers_alone(tmp_path):
    hf = tiny_reader(tmp_path / "hf", "llama")
    path = make_prompts(tmp_path, hf, "niah_single_1", 512, 3)
    (file,) = answer_files(
        given(eval_ruler=[path], tokenizer_model=str(hf), seq_length=512, context_parallel_size=2, eval_ruler_samples=2)
    )
    assert file.name == "niah_single_1-512" and file.tokens.shape[0] == 2 < DEFAULT_SAMPLES
    assert file.length % 4 == 0 and file.length <= 512
    tokenizer = AutoTokenizer.from_pretrained(hf)
    for row, record in enumerate(lines(path)[:2]):
        answer = file.loss_mask[row].bool()
        assert tokenizer.decode(file.labels[row][answer]) == f" {record['outputs'][0]}"
        first = int(answer.nonzero()[0])
        assert tokenizer.decode(file.tokens[row][: first + 1]) == record["input"] + record["answer_prefix"]
