"""Megatron's flags out of range, and its assertions as one line with flag and value."""

from __future__ import annotations

import runpy
from argparse import Namespace

import pytest

from megatron_rpsd.training import megatron_checks
from megatron_rpsd.training.megatron_checks import check_batch, check_folders, check_sources, refusal, settle_fusions

SIZES = {
    "micro_batch_size": 1, "global_batch_size": 4, "decrease_batch_size_if_needed": False, "world_size": 1,
    "tensor_model_parallel_size": 1, "context_parallel_size": 1, "pipeline_model_parallel_size": 1,
    "train_iters": 2, "train_samples": None, "lr": 1e-5, "skip_train": False,
}  # fmt: skip


# Assertions as Megatron writes them, in a file that pytest does not rewrite.
MEGATRONS = """
def check(args, micro_batch_size):
    if args.min_lr is not None:
        assert args.min_lr <= args.lr
    assert (
        micro_batch_size > 0 and args.lr < 1
    ), "said in words"
"""


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (Namespace(min_lr=1.0, lr=0.5), "--min-lr 1.0, --lr 0.5: args.min_lr <= args.lr"),
        (Namespace(min_lr=None, lr=0.5, micro_batch_size=0), "--micro-batch-size 0, --lr 0.5: said in words"),
    ],
)
def test_an_assertion_becomes_a_line_with_flags_and_values(args, line, tmp_path):
    (tmp_path / "megatrons.py").write_text(MEGATRONS)
    check = runpy.run_path(str(tmp_path / "megatrons.py"))["check"]
    with pytest.raises(AssertionError) as refused:
        check(args, 0)
    assert refusal(refused.value, args) == f"Megatron refuses {line}"


def test_a_global_batch_that_micro_batches_do_not_make_up(tmp_path):
    check_batch(Namespace(**SIZES))
    check_batch(Namespace(**{**SIZES, "world_size": 4, "tensor_model_parallel_size": 2}))
    with pytest.raises(ValueError, match=r"--global-batch-size 4 .* --micro-batch-size 3 x 1 .* = 3; .* 3 and 6$"):
        check_batch(Namespace(**{**SIZES, "micro_batch_size": 3}))
    with pytest.raises(ValueError, match=r"1 x 8 data-parallel ranks = 8; the nearest sizes are 8$"):
        check_batch(Namespace(**{**SIZES, "world_size": 8}))
    with pytest.raises(ValueError, match="--train-samples 8 --train-iters 2"):
        check_batch(Namespace(**{**SIZES, "train_samples": 8}))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    places = {
        "run_dir": None,
        "save": str(tmp_path / "new" / "below"),
        "tensorboard_dir": None,
        "data_cache_path": None,
    }
    check_folders(Namespace(**places))
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=f"--save {place}: {tmp_path / 'file'} is a file"):
            check_folders(Namespace(**{**places, "save": str(place)}))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_without_a_learning_rate():
    check_batch(Namespace(**{**SIZES, "lr": None, "train_iters": None}))  # nothing is trained
    with pytest.raises(ValueError, match="^--lr is not set"):
        check_batch(Namespace(**{**SIZES, "lr": None}))


def test_data_from_two_places():
    names = ("data_path", "data_args_path", "per_split_data_args_path", "train_data_path", "valid_data_path")
    none = {**dict.fromkeys((*names, "test_data_path")), "mock_data": False}
    check_sources(Namespace(**{**none, "train_data_path": ["a"], "valid_data_path": ["b"]}))
    with pytest.raises(ValueError, match="^--data-path and --train-data-path both name"):
        check_sources(Namespace(**{**none, "train_data_path": ["a"], "data_path": ["b"]}))


def test_a_fusion_without_its_kernel_is_left_out_with_a_word(capsys, monkeypatch):
    args = Namespace(gradient_accumulation_fusion=True, rank=0)
    settle_fusions(args)
    assert args.gradient_accumulation_fusion is False
    assert "--no-gradient-accumulation-fusion is set: Apex's" in capsys.readouterr().out
    settle_fusions(args)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(megatron_checks, "_APEX_KERNEL", "json")  # any module that is there
    args = Namespace(gradient_accumulation_fusion=True, rank=0)
    settle_fusions(args)
    assert args.gradient_accumulation_fusion is True
