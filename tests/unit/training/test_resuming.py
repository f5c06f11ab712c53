"""What a resumed run keeps of its checkpoint's layout, and what is refused with a way out."""

from __future__ import annotations

import argparse

import pytest

from megatron_rpsd.positions import StepShape, ViewSampler
from megatron_rpsd.training.arms import default_granule
from megatron_rpsd.training.resuming import settle_resume, step_shape

SAVED = {
    "checkpoint": "iter_0000004",
    "tp_pp": [2, 1],
    "global_batch_size": 8,
    "drawn_for": [1, 2, 4],
    "sampling": "stratified",
    "optimizer_saved": True,
    "distributed_optimizer": True,
    "optimizer_format": "dp_reshardable",
    "schedule": {"--train-iters": [40, 320], "--lr-warmup-iters": [4, 32], "--lr": [1e-3, 1e-3]},
}


def settled(saved: dict | None = None, **changed) -> tuple[argparse.Namespace, list[str]]:
    """A run's arguments after `settle_resume`, and its warnings; by default the checkpoint's own layout."""
    args = argparse.Namespace(
        load="run", finetune=False, ckpt_format="torch_dist", no_load_optim=False, use_distributed_optimizer=True,
        tensor_model_parallel_size=2, pipeline_model_parallel_size=1, context_parallel_size=1, world_size=4,
        micro_batch_size=1, global_batch_size=8, data_parallel_size=2, objective="rpsd", rpsd_execution=None,
        rpsd_split_sampling=None, length_mix=None, redraw_views=False, rope_phases=None, rpsd_split_granule=None,
        sequence_parallel=False, seq_length=1024, override_opt_param_scheduler=False,
        use_checkpoint_opt_param_scheduler=False, train_samples=None, train_iters=40, lr_decay_iters=None,
        lr_warmup_fraction=None, lr_warmup_iters=4, lr=1e-3, min_lr=0.0, lr_decay_style="cosine", weight_decay=0.1,
    )  # fmt: skip
    for name, value in changed.items():
        assert hasattr(args, name), name
        setattr(args, name, value)
    said: list[str] = []
    settle_resume(args, lambda compute: {**SAVED, **(saved or {})}, said.append)
    return args, said


def test_the_same_layout_draws_as_it_did():
    args, said = settled()
    assert step_shape(args) == StepShape(8, 1, 2) and said == []


@pytest.mark.parametrize(("replicas", "warned"), [(1, 0), (4, 1)])
def test_another_data_parallel_size_keeps_the_splits_and_says_what_it_costs(replicas, warned):
    args, said = settled(world_size=2 * replicas, data_parallel_size=replicas)
    shape = step_shape(args)
    assert shape == StepShape(8, 1, 2) and args.rpsd_drawn_for == (1, 2, 4)
    assert len(said) == warned and all("--redraw-views" in line for line in said)
    before, now, fresh = (
        [ViewSampler(5, "skip", 64, split_sampling="stratified", step=step).view(index).split for index in range(24)]
        for step in (StepShape(8, 1, 2), shape, StepShape(8, 1, replicas))
    )
    assert now == before != fresh


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"train_iters": 60}, "--train-iters 60: iter_0000004 in --load run was trained with --train-iters 40: give"),
        ({"lr": 2e-3}, "--lr 0.002: .* with --lr 0.001: give --override-opt-param-scheduler"),
        ({"lr_warmup_iters": 2}, "--lr-warmup-iters 2: .* with --lr-warmup-iters 4"),
        ({"lr_warmup_iters": 8, "global_batch_size": 4, "train_iters": 80}, None),  # as many samples as before
        ({"global_batch_size": 16}, "--train-iters 40: .* with another --global-batch-size than 16"),
        ({"train_iters": 60, "override_opt_param_scheduler": True}, None),
        ({"lr": 2e-3, "use_checkpoint_opt_param_scheduler": True}, None),
        ({"train_iters": 60, "no_load_optim": True}, None),
    ],
)
def test_another_schedule_is_refused_unless_a_flag_says_which_one_counts(changed, said):
    if said is None:
        settled(**changed)
    else:
        with pytest.raises(ValueError, match=said):
            settled(**changed)


def test_splits_can_be_redrawn():
    args, said = settled(world_size=8, data_parallel_size=4, redraw_views=True)
    assert step_shape(args) == StepShape(8, 1, 4) and said == []


def test_a_larger_batch_is_another_run_of_draws():
    args, _ = settled(global_batch_size=16, world_size=8, data_parallel_size=4, override_opt_param_scheduler=True)
    assert step_shape(args) == StepShape(16, 1, 4)


def test_the_default_granule_stays_and_is_refused_where_it_is_too_fine():
    plain = {"distributed_optimizer": False, "tp_pp": [1, 1], "drawn_for": [1, 2, 2]}
    layout = {"use_distributed_optimizer": False, "tensor_model_parallel_size": 4, "world_size": 8}
    args, _ = settled(plain, **layout)
    assert default_granule(args, 8192) == 32
    assert default_granule(settled(plain, **layout, redraw_views=True)[0], 8192) == 128
    args, _ = settled(plain, **layout, seq_length=128)
    assert default_granule(args, 128) == 4
    with pytest.raises(ValueError, match="multiples of 4 tokens, and at this layout .* = 16; give --redraw-views"):
        settled(plain, **layout, seq_length=128, sequence_parallel=True, context_parallel_size=2)
    with pytest.raises(ValueError, match="multiples of 2 tokens"):
        settled(plain, **layout, sequence_parallel=True, length_mix=["0.5:1024", "0.5:128"])


def test_where_nothing_is_drawn_nothing_is_kept():
    args, _ = settled(objective="standard", micro_batch_size=4, data_parallel_size=2)
    assert step_shape(args) == StepShape(8, 4, 2)


def test_micro_batches_larger_than_what_shares_a_split_are_refused():
    args, _ = settled(micro_batch_size=2, world_size=2, data_parallel_size=1)  # two samples share a split
    assert step_shape(args) == StepShape(8, 1, 2)
    with pytest.raises(ValueError, match=r"--micro-batch-size 4: .* one split for 2 sample\(s\)"):
        settled(micro_batch_size=4)
    with pytest.raises(ValueError, match=r"--micro-batch-size 2: .* one split for 1 sample\(s\)"):
        settled({"sampling": "independent"}, micro_batch_size=2)
    args, _ = settled(micro_batch_size=4, rpsd_execution="full")  # whole second views have no common prefix
    assert step_shape(args) == StepShape(8, 1, 2)


def test_flat_moments_do_not_go_to_another_tensor_or_pipeline_size():
    with pytest.raises(ValueError, match="--dist-ckpt-optim-fully-reshardable") as refused:
        settled(tensor_model_parallel_size=1, pipeline_model_parallel_size=2)
    assert "2 x 1" in str(refused.value) and "1 x 2" in str(refused.value)
    assert "\n" not in str(refused.value) and "--no-load-optim" in str(refused.value)
    for way_out in ({"no_load_optim": True}, {"saved": {"optimizer_format": "fully_reshardable"}}):
        settled(tensor_model_parallel_size=1, pipeline_model_parallel_size=2, **way_out)
    plain = {"distributed_optimizer": False, "optimizer_format": None}
    settled(plain, tensor_model_parallel_size=1, use_distributed_optimizer=False)


def test_the_distributed_optimizer_is_neither_dropped_nor_taken_up():
    with pytest.raises(ValueError, match="written with --use-distributed-optimizer, this run is without it"):
        settled(use_distributed_optimizer=False)
    with pytest.raises(ValueError, match="written without --use-distributed-optimizer, this run is with it"):
        settled({"distributed_optimizer": False})


def test_a_fresh_start_takes_nothing_over():
    args, _ = settled(load=None, world_size=8, data_parallel_size=4)
    assert step_shape(args) == StepShape(8, 1, 4)
    args, _ = settled(finetune=True, tensor_model_parallel_size=1)
    assert args.rpsd_drawn_for is None
