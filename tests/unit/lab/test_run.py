"""The command line's checks, the folder's, and the guess of the time that is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.lab.arms import MAIN_ARMS
from examples.lab.console import FIRST_GUESS_ARM_SECONDS, FIRST_GUESS_SECONDS, Progress
from examples.lab.run import check_output, parse_arguments


def test_defaults_are_all_main_arms_over_three_seeds() -> None:
    args = parse_arguments([])
    assert args.arms == MAIN_ARMS and args.seeds == (3, 4, 5) and args.lengths == (512, 1024, 2048)
    assert parse_arguments(["--quick"]).seeds == (3,) and parse_arguments(["--quick", "--seeds", "4"]).seeds == (4,)
    assert parse_arguments(["--seeds", "2 0,2"]).seeds == (0, 2)
    assert parse_arguments(["--arms", "pose,rpsd-skip"]).arms == ("pose", "rpsd-skip")


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--arms", "pose,rpsd-skp"], "'pose,rpsd-skp' names no arm: choose from standard, pose"),
        (["--seeds", "one"], "'one': give whole numbers of at least 0"),
        (["--lengths", "128"], "'128': give whole numbers of at least 256"),
        (["--quick", "--seeds", "0,1"], "--quick runs one seed, --seeds names 2"),
    ],
)
def test_a_wrong_value_ends_with_one_line(argv, said, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        parse_arguments(argv)
    error = capsys.readouterr().err
    assert left.value.code == 2 and said in error and error.count("\n") == 1


def test_another_project_s_folder_is_refused(tmp_path: Path) -> None:
    check_output(tmp_path / "new")
    (tmp_path / "seed0").mkdir()
    (tmp_path / "depth.png").write_bytes(b"")
    check_output(tmp_path)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds other things \(thesis.tex\)"):
        check_output(tmp_path)


def test_the_time_left_is_guessed_from_parts_of_the_same_kind(capsys) -> None:
    progress = Progress(["data", "base", "pose", "pose"])
    first = FIRST_GUESS_SECONDS["data"] + FIRST_GUESS_SECONDS["base"] + 2 * FIRST_GUESS_ARM_SECONDS
    assert progress.left(0.0) == pytest.approx(first)
    progress.finish("data", "data", 5.0)
    progress.finish("base", "base", 1.0, fresh=False)  # done before: no measurement
    assert progress.guess("base") == FIRST_GUESS_SECONDS["base"]
    progress.finish("pose", "PoSE", 40.0)
    assert progress.left(0.0) == pytest.approx(40.0) and progress.left(30.0) == pytest.approx(10.0)
    assert progress.left(50.0) == 0.0
    assert "[3/4]" in capsys.readouterr().out
