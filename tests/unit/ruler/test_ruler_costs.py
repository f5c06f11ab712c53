"""The benchmark beside the plain procedure: it refuses to compare prompts that are not the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rpsd.planning.ruler_costs import measure_prompts


@pytest.mark.slow  # the plain procedure builds the list of six million pairs: ten seconds and a gigabyte
def test_both_ways_give_the_same_prompts(ws_folder: Path) -> None:
    result = measure_prompts(ws_folder, 1024, 3)
    assert result["samples"] == 3 and set(result["seconds"]) == set(result["cpu_seconds"]) == {"ours", "plain"}
    assert result["ratio"] == result["seconds"]["ours"] / result["seconds"]["plain"]
