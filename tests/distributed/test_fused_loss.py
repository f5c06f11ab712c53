"""The fused loss over tensor-parallel ranks: the definition, the number of collectives, and their size."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region

from megatron_rpsd.loss import Divergence, fused_linear_loss
from megatron_rpsd.parallel import VocabularyShard
from tests.distributed import jobs
from tests.distributed.models import samples, split_in_every_chunk
from tests.distributed.test_gradients import CP2, SP, TP2, largest_error
from tests.unit.loss.fused_cases import Case, errors, kept_teacher

ONE_TOKEN, SOME, ALL = 1, 12_000, 2**30
CASES = {
    "paper": Case(),
    "a_rank_of_padding": Case(vocab_size=60),
    "logit_scale": Case(logit_scale=0.3),
    "large_logits": Case(size=6.0),
    "forward_kl_T2": Case(view=Divergence("forward-kl", 2.0)),
    "jsd": Case(view=Divergence("jsd"), distill=Divergence("jsd", 2.0)),
    "top_k": Case(view=Divergence("reverse-kl", top_k=5), distill=Divergence("forward-kl", 2.0, 40)),
    "teacher": Case(distill=Divergence("forward-kl")),
}


def _job(case: Case, dtype: torch.dtype, chunk_bytes: int, masked: bool, kept: bool = False):
    """Losses, gradients (the hidden states' summed over ranks, the weight's gathered), and the collectives taken."""
    taken = []
    gather = dist.all_gather_into_tensor

    def counted(output, given, **options):
        taken.append(given.numel())
        return gather(output, given, **options)

    dist.all_gather_into_tensor = counted
    if kept:
        result = kept_teacher(case, dtype, chunk_bytes, dist.group.WORLD)
    else:
        result = case.fused(dtype, chunk_bytes, dist.group.WORLD, masked)
    dist.all_gather_into_tensor = gather
    partial = result["hidden"].double()
    dist.all_reduce(partial)  # each rank's columns give a part, as those of a column-parallel layer do
    shards = [torch.empty_like(result["weight"]) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, result["weight"])
    return {**result, "hidden": partial, "weight": torch.cat(shards)}, taken


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tp", [2, 4])
def test_shards_equal_the_definition(name, tp, ranks):
    case = CASES[name]
    truth = case.definition(torch.float64)
    for result, _ in ranks.run(tp, _job, case, torch.float64, SOME, False):
        found = errors(result, truth)
        assert max(found.values()) < 1e-12, found
        assert not result["weight"][case.vocab_size :].any()


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("vocab_size, padded", [(101, 128), (60, 128), (9, 12)])
def test_a_teachers_likeliest_tokens_over_shards(vocab_size, padded, kept, ranks):
    """Also where a rank holds fewer columns than K, or padding only."""
    case = Case(vocab_size=vocab_size, padded=padded, distill=Divergence("forward-kl", 2.0, 6))
    truth = case.definition(torch.float64)
    for result, _ in ranks.run(4, _job, case, torch.float64, SOME, False, kept):
        found = errors(result, truth)
        assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [ONE_TOKEN, ALL])
def test_errors_of_shards_are_at_most_twice_those_of_torch_itself(dtype, chunk_bytes, ranks):
    case = Case(distill=Divergence("forward-kl"))
    truth = case.definition(dtype)
    plain = errors(case.plain(dtype), truth)
    results = ranks.run(4, _job, case, dtype, chunk_bytes, False)
    for result, _ in results:
        for value, error in errors(result, truth).items():
            roundings = 0.5 if dtype == torch.bfloat16 and value not in ("hidden", "weight") else 4
            assert error <= max(2 * plain[value], roundings * torch.finfo(dtype).eps), (value, error, plain[value])
        for value in ("clm", "view", "teacher", "total"):
            assert torch.equal(result[value], results[0][0][value])  # bitwise the same on every rank


@pytest.mark.parametrize("settings, floats", [(Divergence(), 6), (Divergence("forward-kl", 2.0), 8)])
def test_one_small_collective_a_chunk(settings, floats, ranks):
    case = Case(view=settings)
    for _, taken in ranks.run(2, _job, case, torch.float64, ONE_TOKEN, False):
        # A token: label logit, maximum and sum; a pair: its maximum, sum and cross term more, all in one exchange.
        assert taken == [3] * (case.standard - case.perturbed) + [floats] * case.perturbed
    for _, taken in ranks.run(2, _job, case, torch.float64, ALL, False):
        assert taken == [3 * (case.standard - case.perturbed), floats * case.perturbed]


def test_a_rank_without_kept_tokens_gives_zeros(ranks):
    for result, _ in ranks.run(2, _job, CASES["teacher"], torch.float32, SOME, True):
        assert result["total"] == 0 and not result["hidden"].any() and not result["weight"].any()
        assert result["clm"].isfinite().all() and result["clm"].any()  # values of single tokens are still told


def _sequence_parallel_job(sequence_parallel: bool):
    """Gradients of hidden states that Megatron's regions gather, and the collectives left to the backward pass."""
    case, group = Case(standard=12, perturbed=12), dist.group.WORLD
    given = case.tensors(torch.float64)
    shard = VocabularyShard.of_rank(case.vocab_size, case.padded // group.size(), group)
    whole = given["hidden"]
    local = (whole.chunk(group.size())[group.rank()] if sequence_parallel else whole).clone().requires_grad_()

    def readings(hidden):
        if sequence_parallel:
            gathered = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
        else:
            gathered = copy_to_tensor_model_parallel_region(hidden, group=group)
        return gathered.split([case.standard, case.perturbed])

    weight = given["weight"][shard.vocab_start : shard.vocab_stop].clone().requires_grad_()
    loss = fused_linear_loss(
        local, weight, given["labels"], given["clm_weights"], shard,
        split_readings=readings, view_weights=given["view_weights"], chunk_bytes=SOME,
    )  # fmt: skip
    names = ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "all_to_all_single")
    originals = {name: getattr(dist, name) for name in names}
    backward_collectives = []
    for name in names:
        setattr(
            dist, name, lambda *a, called=name, **k: backward_collectives.append(called) or originals[called](*a, **k)
        )
    (3 * loss.total).backward()
    for name, original in originals.items():
        setattr(dist, name, original)
    return local.grad, backward_collectives


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_hidden_gradients_are_reduced_within_the_pass(sequence_parallel, ranks):
    truth = Case(standard=12, perturbed=12).definition(torch.float64)["hidden"]
    results = ranks.run(2, _sequence_parallel_job, sequence_parallel)
    expected = truth.chunk(2) if sequence_parallel else [truth, truth]
    for (gradient, collectives), share in zip(results, expected, strict=True):
        torch.testing.assert_close(gradient, share, rtol=1e-11, atol=1e-12)
        assert collectives == []


def test_training_is_the_same_with_many_chunks_and_with_whole_logits(ranks, tiny_llama):
    flags = ["--objective", "rpsd", "--rpsd-kl-weight", "0.7", *TP2, *CP2, *SP]
    views, sample = split_in_every_chunk(), samples(8, masked=True)
    (chunked, fused), (whole, unfused) = (
        ranks.run(4, jobs.step, tiny_llama, [*flags, *implementation], sample, views)[0]
        for implementation in (["--loss-chunk-bytes", "3000"], ["--loss-implementation", "unfused"])
    )
    assert chunked == pytest.approx(whole, rel=1e-6)
    assert largest_error(fused, unfused) < 5e-6
