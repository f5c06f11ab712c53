"""Which checkpoint of a run is trusted, and which are kept."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_rpsd.runs.checksums import complete, damage

TRACKER = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_(\d{7,})")


def iteration_folder(checkpoints: Path, iteration: int) -> Path:
    """Megatron's folder of one iteration."""
    return checkpoints / f"iter_{iteration:07d}"


def iterations(checkpoints: Path) -> list[int]:
    """Iterations that have a folder, ascending; whole or not."""
    if not checkpoints.is_dir():
        return []
    found = (_ITERATION.fullmatch(path.name) for path in checkpoints.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def complete_iterations(checkpoints: Path) -> list[int]:
    """Iterations whose writing came to its end, ascending."""
    return [iteration for iteration in iterations(checkpoints) if complete(iteration_folder(checkpoints, iteration))]


def trust_newest(checkpoints: Path, say: Callable[[str], None]) -> int | None:
    """The newest whole checkpoint, which Megatron's tracker then names; newer ones are set aside under another name.

    Args:
        say: told, in one line each, what was set aside and why.

    Returns:
        The iteration; None where no checkpoint was ever completed.

    Raises:
        ValueError: every completed checkpoint is damaged. Starting over would lose the run without a word; so they stay
            where they are, and the next start says the same.
    """
    aside: list[tuple[int, str, str]] = []
    trusted = None
    for iteration in reversed(iterations(checkpoints)):
        folder = iteration_folder(checkpoints, iteration)
        if not complete(folder):
            aside.append((iteration, "interrupted", "its writing was interrupted"))
        elif (reason := damage(folder)) is not None:
            aside.append((iteration, "damaged", reason))
        else:
            trusted = iteration
            break
    lost = [f"iteration {iteration}: {reason}" for iteration, kind, reason in aside if kind == "damaged"]
    if lost and trusted is None:
        raise ValueError(
            f"every completed checkpoint of {checkpoints} is damaged ({'; '.join(lost)}): restore one, or start over "
            "in another run folder"
        )
    for iteration, kind, reason in aside:
        folder = iteration_folder(checkpoints, iteration)
        target = _free_name(checkpoints / f"{kind}-{folder.name}")
        folder.rename(target)
        say(f"checkpoint of iteration {iteration} is not used: {reason}; set aside as {target.name}")
    if trusted is None:
        (checkpoints / TRACKER).unlink(missing_ok=True)
    else:
        _track(checkpoints, trusted)
    return trusted


def _track(checkpoints: Path, iteration: int) -> None:
    tracker = checkpoints / TRACKER
    if not tracker.is_file() or tracker.read_text().strip() != str(iteration):
        partial = tracker.with_name(f".{TRACKER}")
        partial.write_text(str(iteration))
        partial.rename(tracker)


def _free_name(path: Path) -> Path:
    candidates = (path.with_name(f"{path.name}-{number}") for number in range(2, 10_000))
    return path if not path.exists() else next(name for name in candidates if not name.exists())


def superseded(whole: list[int], newest: int, every: int | None) -> list[int]:
    """Of ascending iterations, those that go: neither among the `newest` last ones nor a multiple of `every`."""
    assert newest >= 1 and (every is None or every >= 1), (newest, every)
    return [iteration for iteration in whole[:-newest] if every is None or iteration % every]


def remove_superseded(checkpoints: Path, newest: int, every: int | None) -> list[int]:
    """Remove what `superseded` names; what was interrupted before the newest whole one goes, too.

    A folder is renamed first, so that one half removed is not taken for a checkpoint.
    """
    gone = superseded(complete_iterations(checkpoints), newest, every)
    doomed = [iteration_folder(checkpoints, iteration) for iteration in gone]
    for folder in [*doomed, *checkpoints.glob("interrupted-iter_*"), *checkpoints.glob("removed-iter_*")]:
        target = folder if folder.name.startswith("removed-") else _free_name(checkpoints / f"removed-{folder.name}")
        if target != folder:
            folder.rename(target)
        shutil.rmtree(target)
    return gone
