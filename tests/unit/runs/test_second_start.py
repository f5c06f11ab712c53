"""A run whose every completed checkpoint is damaged is refused at every start, not at the first one alone."""

from __future__ import annotations

import pytest

from megatron_rpsd.runs.checkpoints import TRACKER, iteration_folder, iterations, trust_newest
from tests.unit.runs.test_checkpoints import checkpoint


def test_damage_without_a_way_back_is_refused_again_and_nothing_is_moved(tmp_path):
    for iteration in (10, 20):
        (checkpoint(tmp_path, iteration) / "common.pt").unlink()
    checkpoint(tmp_path, 30, whole=False)
    for _ in range(2):
        with pytest.raises(ValueError, match="iteration 20: common.pt is missing; iteration 10: common.pt"):
            trust_newest(tmp_path, pytest.fail)
        assert iterations(tmp_path) == [10, 20, 30] and (tmp_path / TRACKER).read_text() == "30"
    restored = checkpoint(tmp_path / "copy", 10)
    (iteration_folder(tmp_path, 10) / "common.pt").write_bytes((restored / "common.pt").read_bytes())
    said: list[str] = []
    assert trust_newest(tmp_path, said.append) == 10 and len(said) == 2
