"""A step's model operations against torch's own counter over the step itself, one process.

torch's figure is larger by two things that a model does not need, both computed here: it takes a causal kernel's square
in full, and it takes the scores that a flash kernel's backward rebuilds. Without these both are the same integer.
"""

from __future__ import annotations

import pytest

from megatron_rpsd.positions import View
from tests.distributed import work_job
from tests.distributed.models import LENGTH, samples

SPLIT = 12
RPSD = ["--objective", "rpsd"]
NO_PADDING = ["--make-vocab-size-divisible-by", "1"]


def cases() -> dict[str, tuple]:
    """Name -> flags, sample, views, suffix start."""
    two, views = samples(2, masked=True), [View(SPLIT, 7), View(SPLIT, 3)]
    packed = {**two, "document_ids": (two["tokens"].new_tensor(range(LENGTH)) >= 20).long().expand(2, -1)}
    documents = ["--reset-attention-mask", "--tokenizer-type", "NullTokenizer"]
    indexed = {**two, "sample_index": two["tokens"].new_tensor([0, 1])}
    longce = ["--objective", "standard", "--longce", "--longce-context", "8", "--longce-stride", "8"]
    return {
        "clm": (["--objective", "standard"], two, [View.identity()] * 2, 0),
        "shared-prefix": (RPSD, two, views, SPLIT),
        "full": ([*RPSD, "--rpsd-execution", "full"], two, views, 0),
        "documents": ([*RPSD, *documents], packed, views, SPLIT),
        "longce": (longce, indexed, None, 0),
    }


@pytest.fixture(scope="module")
def counted(ranks, tiny_llama) -> dict[str, work_job.Counted]:
    given = {name: ([*flags, *NO_PADDING], *rest) for name, (flags, *rest) in cases().items()}
    return dict(zip(given, ranks.run(1, work_job.count_all, tiny_llama, list(given.values()))[0], strict=True))


@pytest.mark.parametrize("name", cases())
def test_operations_equal_torchs_count_up_to_masked_and_rebuilt_scores(name, counted):
    seen = counted[name]
    masked = sum(
        (10 if backward else 4) * (queries * (queries - 1) // 2)
        for queries, _, causal, backward in seen.kernels
        if causal
    )
    rebuilt = sum(
        2 * (queries * (queries + 1) // 2 if causal else queries * keys)
        for queries, keys, causal, backward in seen.kernels
        if backward
    )
    assert seen.kernels and masked and rebuilt
    assert seen.products + seen.attention - seen.head_dim * (masked + rebuilt) == seen.said


def test_a_later_split_counts_less_and_documents_less_than_the_whole_window(counted):
    said = {name: seen.said for name, seen in counted.items()}
    assert said["clm"] < said["documents"] < said["shared-prefix"] < said["full"] == 2 * said["clm"]
