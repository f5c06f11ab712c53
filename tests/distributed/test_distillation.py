"""A teacher of another size: losses and gradients against transformers in fp64, whole runs, caches, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from megatron.training.distillation.utils_logits import load_log_probs_from_tar
from transformers import AutoModelForCausalLM, LlamaConfig

from megatron_rpsd.checkpoint.convert import import_hf
from megatron_rpsd.loss.definitions import divergence_per_token
from megatron_rpsd.positions import View
from tests.distributed import distillation_job, jobs, training_job
from tests.distributed.corpus import run_arguments, write_corpus
from tests.distributed.models import LENGTH, VOCABULARY, causal_mask, reference, samples
from tests.distributed.test_gradients import CP2, PP2, SP, TP2, largest_error
from tests.distributed.test_training import scalars

VIEWS = [View(16, shift) for shift in (1, 9, 17, 32)]
LAYOUTS = {"one": (1, []), "tp2_cp2": (4, TP2 + CP2), "tp2_cp2_sp": (4, TP2 + CP2 + SP)}
WEIGHTS = ["--distill-kl-weight", "0.6", "--distill-ce-weight", "0.3"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Another hidden size, layer count, head count, RoPE base and an output layer of its own; the student's ids."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, rope_theta=300.0, tie_word_embeddings=False,
        initializer_range=0.3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("teachers") / "teacher"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(ranks, teacher, tiny_llama, tmp_path_factory) -> dict[str, Path]:
    """Teacher and student as torch_dist checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, hf in (("teacher", teacher), ("student", tiny_llama)):
        ranks.run(1, import_hf, hf, folder / name)
    return {"teacher": folder / "teacher", "student": folder / "student"}


def logits_of(folder: Path, sample: dict) -> tuple[torch.nn.Module, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double()
    rows, length = sample["tokens"].shape
    positions = torch.arange(length).expand(rows, -1)
    mask = causal_mask(length).expand(rows, -1, -1, -1)
    return model, model(input_ids=sample["tokens"], position_ids=positions, attention_mask=mask).logits


def written_out(teacher: Path, student: Path, sample: dict, settings: tuple, rpsd: bool):
    """Losses and the student's gradients of 0.3 CE + 0.6 D(student || teacher), + 0.7 RPSD's KL, in fp64."""
    with torch.no_grad():
        _, targets = logits_of(teacher, sample)
    model, logits = logits_of(student, sample)
    mask = sample["loss_mask"]
    distilled = (divergence_per_token(logits, targets, *settings) * mask).sum() / mask.sum()
    (0.6 * distilled).backward()
    losses, plain = reference(student, sample, VIEWS, "rpsd" if rpsd else "standard", 0.0)
    gradients = {name: value.grad + 0.3 * plain[name] for name, value in model.named_parameters()}
    if rpsd:
        _, both = reference(student, sample, VIEWS, "rpsd", 0.7)
        gradients = {name: value + both[name] - plain[name] for name, value in gradients.items()}
    return {"clm": losses["clm"], "kl": losses["kl"], "teacher": distilled.item()}, gradients


CASES = {
    "forward": ("distill", ("forward-kl", 1.0, None), []),
    "reverse_T2": (
        "distill", ("reverse-kl", 2.0, None), ["--distill-direction", "reverse-kl", "--distill-temperature", "2"],
    ),
    "top_k": ("distill", ("forward-kl", 1.0, 11), ["--distill-top-k", "11"]),
    "with_rpsd": ("distill-rpsd", ("forward-kl", 1.0, None), ["--rpsd-kl-weight", "0.7"]),
}  # fmt: skip


@pytest.mark.parametrize(
    "case, layout",
    [("forward", "one"), ("reverse_T2", "tp2_cp2"), ("top_k", "tp2_cp2_sp"), ("with_rpsd", "tp2_cp2_sp")],
)
def test_losses_and_every_gradient_equal_transformers(case, layout, ranks, teacher, checkpoints, tiny_llama):
    (objective, settings, flags), (world_size, parallel) = CASES[case], LAYOUTS[layout]
    sample = samples(len(VIEWS), masked=True)
    arguments = ["--objective", objective, "--teacher-checkpoint", str(checkpoints["teacher"]), *WEIGHTS, *flags]
    losses, gradients = ranks.run(world_size, jobs.step, tiny_llama, [*arguments, *parallel], sample, VIEWS, 2, 16)[0]
    expected_losses, expected = written_out(teacher, tiny_llama, sample, settings, objective == "distill-rpsd")
    assert expected_losses["teacher"] > 0.1  # the two models differ, so the comparison means something
    assert losses["clm"] == pytest.approx(expected_losses["clm"], rel=1e-5)
    assert losses["teacher"] == pytest.approx(expected_losses["teacher"], rel=1e-5)
    if objective == "distill-rpsd":
        assert losses["kl"] == pytest.approx(expected_losses["kl"], rel=1e-5) and losses["kl"] > 0.01
    # fp32 against fp64: an error of a few 1e-6 is what transformers itself shows in fp32.
    assert largest_error(gradients, expected) < 2e-5


def test_a_teacher_that_is_the_student_teaches_nothing(ranks, checkpoints, tiny_llama):
    arguments = ["--objective", "distill", "--teacher-checkpoint", str(checkpoints["student"])]
    losses, gradients = ranks.run(2, jobs.step, tiny_llama, [*arguments, *TP2], samples(2, masked=True), VIEWS[:2])[0]
    assert losses["teacher"] == 0 and not any(gradient.any() for gradient in gradients.values())


@pytest.fixture(scope="module")
def run_flags(checkpoints, tmp_path_factory):
    """Arguments of a run of distillation, without its teacher."""
    prefix = write_corpus(tmp_path_factory.mktemp("corpus") / "random")

    def flags(steps: int, objective: str = "distill") -> list[str]:
        arguments = run_arguments(checkpoints["student"], prefix, steps)
        return [*arguments, "--objective", objective, *WEIGHTS]

    return flags


@pytest.fixture(scope="module")
def live(checkpoints) -> list[str]:
    return ["--teacher-checkpoint", str(checkpoints["teacher"])]


NAMES = ("lm loss", "teacher kl", "grad-norm")
EVALUATED = ["--split", "80,20,0", "--eval-iters", "1", "--eval-interval", "4"]


def run(ranks, world_size: int, folder: Path, arguments: list[str]) -> dict[str, list[float]]:
    ranks.run(world_size, training_job.train, [*arguments, "--tensorboard-dir", str(folder)])
    return {name: scalars(folder, name) for name in NAMES}


def test_training_leaves_the_teacher_as_it_was_and_a_resumed_run_repeats(ranks, run_flags, live, checkpoints, tmp_path):
    arguments = [*run_flags(4, "distill-rpsd"), *live, "--use-distributed-optimizer", "--teacher-dtype", "bf16"]
    arguments += [*EVALUATED, "--save", str(tmp_path / "run"), "--save-interval", "2"]
    watched = ranks.run(2, distillation_job.watched, [*arguments, "--tensorboard-dir", str(tmp_path / "whole")])
    for seen in watched:
        assert seen["changed"] == [] and seen["with_gradient"] == []
        assert seen["random_state_kept"] and not seen["training"]
        assert seen["dtypes"] == {torch.bfloat16}
        assert seen["shapes"]["output_layer.weight"] == (128, 48)
        assert sum(".mlp.linear_fc1.weight" in name for name in seen["shapes"]) == 2
    whole = {name: scalars(tmp_path / "whole", name) for name in (*NAMES, "view kl")}
    _check_memory(watched[0]["output"], tmp_path / "whole", watched[0]["shapes"])
    resumed = run(ranks, 2, tmp_path / "second", [*arguments, "--load", str(tmp_path / "run"), "--ckpt-step", "2"])
    for name in NAMES:
        assert resumed[name] == whole[name][2:] and len(set(whole[name])) == 4, name
    assert whole["teacher kl"][-1] < whole["teacher kl"][0]
    assert all(0 < kl < 2 * whole["teacher kl"][0] for kl in scalars(tmp_path / "whole", "teacher kl validation"))


def _check_memory(output: str, folder: Path, teacher_shapes: dict) -> None:
    line = next(line for line in output.splitlines() if line.startswith("memory of a rank"))
    gib = {
        name: scalars(folder, f"memory/{name}_gib")[0]
        for name in ("student_weights", "gradients", "optimizer", "teacher_weights")
    }
    held = sum(torch.Size(shape).numel() for shape in teacher_shapes.values()) * 2 / 2**30  # bf16
    assert gib["teacher_weights"] == pytest.approx(held)
    # fp32 weights and gradients; Adam's two moments, shared out over two ranks.
    assert gib["student_weights"] == pytest.approx(gib["optimizer"])
    assert gib["gradients"] >= gib["student_weights"]  # buffers are padded
    assert f"teacher weights {held:.4g}" in line


def test_kept_tokens_under_a_pipeline_equal_the_live_teacher(ranks, run_flags, live, tmp_path):
    top_k = ["--distill-top-k", "9", *EVALUATED]
    expected = run(ranks, 1, tmp_path / "live", [*run_flags(4), *live, *top_k])
    cache = tmp_path / "cache"
    # Written by two data-parallel ranks, read by one, in two stages.
    arguments = [*run_flags(4), *live, *top_k, *CP2]
    assert ranks.run(4, distillation_job.write_cache, cache, arguments, 3) == [4] * 4
    arguments = [*run_flags(4), "--teacher-cache", str(cache), *EVALUATED, *PP2, *CP2]
    arguments += ["--save", str(tmp_path / "run"), "--save-interval", "2"]
    found = run(ranks, 4, tmp_path / "pp2", arguments)
    for name in NAMES:
        assert found[name][0] == pytest.approx(expected[name][0], rel=1e-5), name
        # Adam divides by the square root of tiny second moments, which magnifies the rounding of reordered sums.
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name
    resumed = run(ranks, 4, tmp_path / "second", [*arguments, "--load", str(tmp_path / "run"), "--ckpt-step", "2"])
    assert all(resumed[name] == found[name][2:] for name in NAMES)
    assert scalars(tmp_path / "pp2", "lm loss validation") and scalars(tmp_path / "live", "teacher kl validation")
    with pytest.raises(KeyError):  # of held-out data nothing is kept
        scalars(tmp_path / "pp2", "teacher kl validation")
    _check_layout_and_refusals(ranks, run_flags, cache, tmp_path)


def _check_layout_and_refusals(ranks, run_flags, cache: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in cache.iterdir()) == [
        *(f"cp{cp}_dp{dp}__{last}.tar" for cp in (0, 1) for dp in (0, 1) for last in (2, 3)), "teacher_cache.json",
    ]  # fmt: skip
    values, tokens = load_log_probs_from_tar(str(cache / "cp0_dp1__2.tar"), 1)  # Megatron's own reader
    assert len(values) == 2 and values[0].shape == tokens[0].shape == (LENGTH // 2, 1, 9)
    assert (values[0][..., :-1] >= values[0][..., 1:]).all() and (0 <= tokens[0]).all() and (tokens[0] < 97).all()
    change = distillation_job.changed_manifest
    kept = ["--teacher-cache", str(change(cache, tmp_path / "one", context_parallel_size=1))]
    cases = {
        "other_cp": ([*run_flags(4), "--teacher-cache", str(cache)], ["--context-parallel-size 2", "has 1"]),
        "other_k": ([*run_flags(4), *kept, "--distill-top-k", "8"], ["--distill-top-k 8", "9 likeliest"]),
        "other_stream": ([*run_flags(5), *kept], ["train_samples 16 and 20"]),
        "other_heat": ([*run_flags(4), *kept, "--distill-temperature", "2"], ["--distill-temperature 1.0", "has 2.0"]),
        "other_batch": ([*run_flags(4), *kept, "--micro-batch-size", "2"], ["--micro-batch-size 1", "has 2"]),
        "not_whole": ([*run_flags(4), "--teacher-cache", str(tmp_path)], ["teacher_cache.json", "no whole cache"]),
        "tokens": (
            [*run_flags(4), "--teacher-cache", str(change(cache, tmp_path / "ids", tokens="ab12"))],
            ["the teacher's tokens", "ab12"],
        ),
        "lengths": ([*run_flags(4), *kept, "--length-mix", "0.5:32", "0.5:16"], ["--length-mix"]),
    }
    answers = ranks.run(1, distillation_job.refusals, {name: words for name, (words, _) in cases.items()})[0]
    _check_lines(answers, {name: parts for name, (_, parts) in cases.items()})
    other_data = ["--data-path", str(write_corpus(tmp_path / "random", documents=11))]
    with pytest.raises(AssertionError, match="iteration 0 was written of other tokens"):  # the rank's ValueError
        ranks.run(1, training_job.train, [*run_flags(4), *kept, *other_data])


def _check_lines(answers: dict[str, tuple[int | None, str]], parts: dict[str, list[str]]) -> None:
    for name, (code, text) in answers.items():
        lines = text.splitlines()
        assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (name, text)
        for part in parts[name]:
            assert part in lines[0], (name, lines[0])


def tokenizer(folder: Path, *added: str) -> Path:
    folder.mkdir()
    vocabulary = {word: index for index, word in enumerate(("a", "b", *added))}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    return folder


def test_a_teacher_that_is_none_is_one_line_and_exit_code_2(ranks, run_flags, live, checkpoints, tmp_path):
    other = tmp_path / "other_vocabulary"
    torch.manual_seed(6)
    config = LlamaConfig(
        vocab_size=101, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    ranks.run(1, import_hf, other, tmp_path / "other")
    good = run_flags(2)
    cases = {
        "no_teacher": (good, ["--teacher-checkpoint", "--teacher-cache"]),
        "path": ([*good, "--teacher-checkpoint", "nowhere"], ["--teacher-checkpoint nowhere"]),
        "vocabulary": (
            [*good, "--teacher-checkpoint", str(tmp_path / "other")],
            ["a vocabulary of 101", "one of 97"],
        ),
        "tokenizer": (
            [*good, *live, "--teacher-tokenizer", str(tokenizer(tmp_path / "words"))],
            ["words", "NullTokenizer", "--teacher-tokenizer"],
        ),
        "no_tokenizer": ([*good, *live, "--teacher-tokenizer", str(tmp_path)], ["no tokenizer.json"]),
        "top_k": ([*good, *live, "--distill-top-k", "98"], ["--distill-top-k 98", "97"]),
        "fp8": ([*good, *live, "--teacher-dtype", "fp8"], ["--teacher-dtype fp8", "Transformer Engine"]),
    }
    answers = ranks.run(1, distillation_job.refusals, {name: words for name, (words, _) in cases.items()})[0]
    _check_lines(answers, {name: parts for name, (_, parts) in cases.items()})
    code, text = ranks.run(2, training_job.refused, [*good, *live, *PP2])[0]
    _check_lines({"pp": (code, text)}, {"pp": ["--pipeline-model-parallel-size 2", "tools/cache_teacher.py"]})
