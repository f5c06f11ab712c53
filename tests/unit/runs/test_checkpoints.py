"""Which checkpoint is trusted, which are kept; damage of every kind is found and named."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megatron_rpsd.runs.checkpoints import (
    TRACKER,
    complete_iterations,
    iteration_folder,
    iterations,
    remove_superseded,
    superseded,
    trust_newest,
)
from megatron_rpsd.runs.checksums import CHECKSUMS, complete, damage, file_sums, write_checksums

FILES = {"common.pt": 300, ".metadata": 50, "__0_0.distcp": 5000, "__1_0.distcp": 4000}


def checkpoint(root: Path, iteration: int, whole: bool = True) -> Path:
    folder = iteration_folder(root, iteration)
    folder.mkdir(parents=True)
    for name, size in FILES.items():
        (folder / name).write_bytes(random.Random(f"{iteration}{name}").randbytes(size))
    if whole:
        write_checksums(folder, file_sums(folder, FILES))
    (root / TRACKER).write_text(str(iteration))
    return folder


def truncate(path: Path, dice: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: dice.randrange(path.stat().st_size)])


def flip(path: Path, dice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


def remove(path: Path, dice: random.Random) -> None:
    path.unlink()


@pytest.mark.parametrize("harm", [truncate, flip, remove])
@pytest.mark.parametrize("case", range(10))
def test_damage_is_found_named_and_the_checkpoint_before_is_used(harm, case, tmp_path):
    """Thirty cases: ten of each kind, at a random place of a random file."""
    dice = random.Random(f"{harm.__name__}{case}")
    for iteration in (10, 20):
        checkpoint(tmp_path, iteration)
    name = dice.choice(list(FILES))
    harm(iteration_folder(tmp_path, 20) / name, dice)
    said: list[str] = []
    assert trust_newest(tmp_path, said.append) == 10
    assert len(said) == 1 and "iteration 20 is not used" in said[0] and name in said[0]
    assert (tmp_path / TRACKER).read_text() == "10"
    assert iterations(tmp_path) == [10] and (tmp_path / "damaged-iter_0000020").is_dir()


def test_a_whole_newest_checkpoint_is_used_without_a_word(tmp_path):
    checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 20)
    assert trust_newest(tmp_path, pytest.fail) == 20
    assert trust_newest(tmp_path / "nothing", pytest.fail) is None


def test_an_interrupted_checkpoint_is_set_aside_and_the_tracker_follows(tmp_path):
    checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 20, whole=False)
    said: list[str] = []
    assert trust_newest(tmp_path, said.append) == 10
    assert said == [
        "checkpoint of iteration 20 is not used: its writing was interrupted; set aside as interrupted-iter_0000020"
    ]
    assert (tmp_path / TRACKER).read_text() == "10"
    checkpoint(tmp_path, 20, whole=False)  # again at the same place: the first one keeps its name
    trust_newest(tmp_path, said.append)
    assert (tmp_path / "interrupted-iter_0000020-2").is_dir()


def test_a_first_checkpoint_that_was_interrupted_means_the_beginning(tmp_path):
    checkpoint(tmp_path, 10, whole=False)
    assert trust_newest(tmp_path, lambda text: None) is None
    assert not (tmp_path / TRACKER).exists()


def test_a_run_whose_every_checkpoint_is_damaged_does_not_start_over(tmp_path):
    for iteration in (10, 20):
        (checkpoint(tmp_path, iteration) / "common.pt").unlink()
    with pytest.raises(ValueError, match=r"every completed .* \(iteration 20: common.pt is missing; iteration 10"):
        trust_newest(tmp_path, lambda text: None)


@pytest.mark.parametrize("text", ["", "[]", '{"common.pt": {}}', "{", '{"common.pt": 3}'])
def test_sums_that_cannot_be_read_are_damage(text, tmp_path):
    folder = checkpoint(tmp_path, 10)
    assert complete(folder) and damage(folder) is None
    (folder / CHECKSUMS).write_text(text)
    assert CHECKSUMS in damage(folder)


def test_the_sums_are_those_of_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4's example
    assert file_sums(tmp_path, ["a"]) == {"a": {"bytes": 3, "sha256": digest}}


@pytest.mark.parametrize(
    ("newest", "every", "gone"),
    [(1, None, [2, 4, 6, 8]), (2, None, [2, 4, 6]), (2, 4, [2, 6]), (9, None, []), (1, 1, []), (1, 7, [2, 4, 6, 8])],
)
def test_which_checkpoints_are_superseded(newest, every, gone):
    assert superseded([2, 4, 6, 8, 10], newest, every) == gone


def test_what_is_removed_is_gone_whole(tmp_path):
    for iteration in (2, 4, 6):
        checkpoint(tmp_path, iteration)
    checkpoint(tmp_path, 5, whole=False)
    trust_newest(tmp_path, lambda text: None)  # 6 is whole: 5 stays where it is, and is no checkpoint
    checkpoint(tmp_path, 8, whole=False)
    trust_newest(tmp_path, lambda text: None)
    (tmp_path / "removed-iter_0000001").mkdir()  # of a removal that a kill cut short
    assert remove_superseded(tmp_path, 1, None) == [2, 4]
    assert complete_iterations(tmp_path) == [6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000005", "iter_0000006", TRACKER]
