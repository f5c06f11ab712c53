"""Distillation's flags, tokenizers as identities, and what the models hold, without ranks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_rpsd.training.arms import DISTILLING, settle_arm, views_of
from megatron_rpsd.training.cache_writing import cache_teacher
from megatron_rpsd.training.distillation import check_distillation, distillation_from_args
from megatron_rpsd.training.model_memory import memory_parts
from megatron_rpsd.training.teacher import _check_model, check_vocabulary
from megatron_rpsd.training.teacher_cache import CacheWriter, KeptMicroBatch, TeacherCache
from megatron_rpsd.training.token_identity import TokenIdentity, check_same_tokens, token_identity


def settled(*flags: str) -> argparse.Namespace:
    """Arms' and distillation's own flags, settled, beside the few of Megatron's that they look at."""
    from megatron_rpsd.training.arms import add_arm_arguments
    from megatron_rpsd.training.distillation import add_distillation_arguments

    parser = argparse.ArgumentParser()
    add_arm_arguments(parser)
    add_distillation_arguments(parser)
    args = parser.parse_args(flags)
    args.rpsd_kl_direction = args.rpsd_kl_temperature = args.rpsd_kl_top_k = args.length_mix = None
    args.pipeline_model_parallel_size, args.seq_length, args.loss_implementation = 1, 64, "fused"
    settle_arm(args)
    return args


TEACHER = ("--objective", "distill", "--teacher-checkpoint", "t")


def test_defaults_are_the_papers_logit_distillation():
    args = settled(*TEACHER)
    check_distillation(args)
    found = distillation_from_args(args)
    assert (found.kl_weight, found.ce_weight) == (1.0, 0.0)
    assert (found.divergence.direction, found.divergence.temperature, found.divergence.top_k) == (
        "forward-kl", 1.0, None,
    )  # fmt: skip
    assert views_of(args) == "standard" and args.rpsd_split_sampling == "independent"
    both = settled("--objective", "distill-rpsd", "--teacher-cache", "c", "--rpsd-kl-weight", "0.5")
    assert views_of(both) == "rpsd" and both.rpsd_split_sampling == "stratified" and set(DISTILLING) == {
        "distill", "distill-rpsd",
    }  # fmt: skip
    assert distillation_from_args(settled("--objective", "rpsd")) is None


REFUSED = {
    "two_teachers": ([*TEACHER, "--teacher-cache", "c"], "one place"),
    "negative": ([*TEACHER, "--distill-kl-weight", "-1"], "--distill-kl-weight -1.0"),
    "nothing": ([*TEACHER, "--distill-kl-weight", "0"], "--distill-kl-weight 0 --distill-ce-weight 0"),
    "not_finite": ([*TEACHER, "--distill-ce-weight", "inf"], "--distill-ce-weight inf"),
    "heat": ([*TEACHER, "--distill-temperature", "0"], "--distill-temperature 0.0"),
    "top_k": ([*TEACHER, "--distill-top-k", "0"], "--distill-top-k 0"),
    "cache_dtype": (
        ["--objective", "distill", "--teacher-cache", "c", "--teacher-dtype", "bf16"], "--teacher-dtype",
    ),
    "other_arm": (["--objective", "rpsd", "--teacher-checkpoint", "t"], "--teacher-checkpoint t belongs to"),
    "no_view": ([*TEACHER, "--rpsd-kl-weight", "1"], "--rpsd-kl-weight 1.0 belongs to"),
    "no_weights": (["--objective", "rpsd", "--distill-ce-weight", "1"], "--distill-ce-weight 1.0 belongs to"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_flags_that_contradict_each_other_are_refused(case):
    flags, part = REFUSED[case]
    with pytest.raises(ValueError, match="(?s).*") as refused:
        check_distillation(settled(*flags))
    assert part in str(refused.value) and "\n" not in str(refused.value)


def folder(path: Path, vocabulary, added=(), **rest) -> Path:
    path.mkdir()
    text = json.dumps({"model": {"vocab": vocabulary}, "added_tokens": list(added), **rest})
    (path / "tokenizer.json").write_text(text)
    return path


def test_identity_is_what_ids_mean_and_nothing_else(tmp_path):
    end = {"id": 2, "content": "<end>", "special": True}
    known = [
        folder(tmp_path / "bpe", {"a": 0, "b": 1}, [end]),
        folder(tmp_path / "other_order", {"b": 1, "a": 0}, [{**end, "special": False}], truncation={"max_length": 4}),
        folder(tmp_path / "unigram", [["a", -1.0], ["b", -2.0]], [end]),
    ]
    first, *others = (token_identity("HuggingFaceTokenizer", str(path)) for path in known)
    for other in others:
        check_same_tokens(first, other)
    for name, vocabulary, added in (
        ("swapped", {"a": 1, "b": 0}, [end]),
        ("more", {"a": 0, "b": 1}, [end, {"id": 3, "content": "<pad>"}]),
        ("other_end", {"a": 0, "b": 1}, [{**end, "content": "<stop>"}]),
    ):
        other = token_identity("HuggingFaceTokenizer", str(folder(tmp_path / name, vocabulary, added)))
        with pytest.raises(ValueError, match=f"the teacher's tokens.*{name}.*sha256"):
            check_same_tokens(first, other)


def test_an_unknown_tokenizer_is_refused_with_the_way_out(tmp_path):
    known = token_identity("HuggingFaceTokenizer", str(folder(tmp_path / "known", {"a": 0})))
    unknown = token_identity("HuggingFaceTokenizer", str(tmp_path / "gone"))
    ids = token_identity("NullTokenizer", None)
    with pytest.raises(ValueError, match="gone.*--teacher-tokenizer DIR"):
        check_same_tokens(known, unknown)
    with pytest.raises(ValueError, match="gone.*--tokenizer-model DIR"):
        check_same_tokens(unknown, known)
    with pytest.raises(ValueError, match="NullTokenizer"):
        check_same_tokens(ids, known)
    check_same_tokens(ids, TokenIdentity("NullTokenizer", "saved"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="broken.*not a tokenizer.json"):
        token_identity("HuggingFaceTokenizer", str(tmp_path / "broken"))


def run_arguments(**changes) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "teacher_checkpoint": "t",
            "tensor_model_parallel_size": 2,
            "vocab_size": 97,
            "distill_top_k": None,
            **changes,
        }
    )


SAVED = {
    "num_experts": None, "position_embedding_type": "rope", "rotary_percent": 1.0, "normalization": "RMSNorm",
    "group_query_attention": True, "num_query_groups": 2, "num_attention_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"num_experts": 8}, "mixture of 8 experts"),
        ({"multi_latent_attention": True}, "multi-latent"),
        ({"rotary_percent": 0.5}, "--rotary-percent 0.5"),
        ({"num_query_groups": 3}, "--tensor-model-parallel-size 2 does not divide"),
    ],
)
def test_a_model_that_cannot_teach_is_refused(changes, part):
    _check_model(run_arguments(), SimpleNamespace(**SAVED))
    with pytest.raises(ValueError, match=part):
        _check_model(run_arguments(), SimpleNamespace(**{**SAVED, **changes}))


def test_vocabularies_must_agree_and_hold_k():
    check_vocabulary(run_arguments(distill_top_k=97), 97, "t")
    for vocab_size, k, part in ((101, None, "101.*97"), (None, None, "tools/convert_checkpoint"), (97, 98, "98.*97")):
        with pytest.raises(ValueError, match=part):
            check_vocabulary(run_arguments(distill_top_k=k), vocab_size, "t")


@pytest.mark.parametrize("distributed, dtype, each", [(False, torch.float32, 8), (True, torch.bfloat16, 12)])
def test_memory_counts_what_is_trained(distributed, dtype, each):
    student = torch.nn.Linear(6, 4, dtype=dtype)
    student.bias.requires_grad_(False)
    args = SimpleNamespace(
        optimizer="adam", use_distributed_optimizer=distributed, data_parallel_size=2, context_parallel_size=3
    )
    parts = memory_parts(args, student, torch.nn.Linear(5, 3, bias=False, dtype=torch.bfloat16))
    assert parts["student weights"] == 28 * dtype.itemsize and parts["teacher weights"] == 30
    assert parts["optimizer"] == 24 * each // (6 if distributed else 1)
    assert parts["gradients"] == 0  # without DDP there are no buffers


def test_a_cache_follows_the_run_through_skipped_and_repeated_steps():
    def step(iteration: int) -> tuple[list[KeptMicroBatch], list]:
        return [KeptMicroBatch(None, None, None, 10 * iteration + part, iteration) for part in (0, 1)], []

    def following(iteration: int, times: int) -> list[int]:
        return [cache._following(iteration).checksum for _ in range(times)]

    cache = TeacherCache("c")
    cache._stream = iter([step(0), step(1), step(2), step(3)])
    assert following(0, 2) == [0, 1]
    assert following(1, 4) == [10, 11, 10, 11]  # Megatron runs a step again to tell faults from errors
    assert following(3, 2) == [30, 31]
    with pytest.raises(ValueError, match="holds nothing of iteration 4"):
        following(4, 1)


def test_a_cache_is_written_to_a_new_folder_alone(tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ValueError, match="--output .* exists"):
        cache_teacher(tmp_path, [])
    with pytest.raises(ValueError, match="--iterations-per-file 0"):
        cache_teacher(tmp_path / "new", [], 0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_ids_beyond_17_bits_are_read_back_by_megatron(tmp_path, monkeypatch):
    """Qwen's vocabulary of 151,936 tokens; Megatron packs 17 bits."""
    from megatron.core import parallel_state
    from megatron.training.distillation.utils_logits import load_log_probs_from_tar

    for name in ("tensor_model", "context", "data"):
        monkeypatch.setattr(parallel_state, f"get_{name}_parallel_rank", lambda: 0)
    tokens = torch.tensor([[[0, 65_535, 65_536, 131_071, 131_072, 151_935]]])
    kept = KeptMicroBatch(torch.zeros(tokens.shape), tokens, torch.zeros(1, 1), 7, 3)
    writer = CacheWriter(tmp_path, {"top_k": 6, "dataset_hash": "h", "dataset": {}}, 1)
    writer.add(3, [kept, kept])
    _, read = load_log_probs_from_tar(str(tmp_path / "cp0_dp0__3.tar"), 3)
    assert len(read) == 2 and torch.equal(read[1], tokens)
