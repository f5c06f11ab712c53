"""Scalars of a training run, read back from its TensorBoard event files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator


@dataclass(frozen=True)
class Series:
    """One scalar over steps.

    Attributes:
        steps: strictly increasing.
        values: one for each step, in the unit in which the run logged it.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.steps)


def read_scalars(folder: str | Path, tags: Sequence[str]) -> dict[str, Series]:
    """The scalars `tags` from all event files of `folder`.

    A run that was interrupted and went on from a checkpoint has some steps twice; what was written last is what the
    model that came out has seen, so that is kept.

    Raises:
        ValueError: no event file in the folder, or a tag that none of them holds.
    """
    if not any(Path(folder).glob("*tfevents*")):
        raise ValueError(
            f"{folder} holds no TensorBoard event file; was the run started with --tensorboard-dir {folder}?"
        )
    # By default steps that go back make the reader drop what came before them, and long series are thinned out.
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}, purge_orphaned_data=False)
    events.Reload()
    present = events.Tags()[SCALARS]
    found = {}
    for tag in tags:
        if tag not in present:
            raise ValueError(f"{folder} holds no scalar {tag!r}, only {', '.join(sorted(present)) or 'none'}")
        latest = {event.step: event.value for event in sorted(events.Scalars(tag), key=lambda event: event.wall_time)}
        steps = sorted(latest)
        found[tag] = Series(tuple(steps), tuple(latest[step] for step in steps))
    return found
