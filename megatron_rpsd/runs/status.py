"""How a run is doing, from the files of its folder alone: no torch, so that the answer comes at once."""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_rpsd.runs.checkpoints import complete_iterations, iteration_folder
from megatron_rpsd.runs.checksums import CHECKSUMS
from megatron_rpsd.runs.endings import Ending, Traces
from megatron_rpsd.runs.events import json_lines
from megatron_rpsd.runs.folder import RunFolder

_TAIL_BYTES = 1 << 18
_RECENT_STEPS = 50
_LOSSES = re.compile(r"lm loss|view kl|view lm loss|teacher kl|answer nll|greedy exact|grad-norm")
_WARNED = ("set aside", "no room", "skipped")
STATES = ("never started", "starting", "running", "silent", "stopped", "failed", "finished")


@dataclass(frozen=True)
class Rate:
    """Of the newest steps of this start.

    Attributes:
        steps_per_s: by the clock, evaluation and checkpoints included.
        tokens_per_s: the standard view's tokens of all ranks, by the same clock; None where sizes are not known.
        step_s: median seconds from one logged step to the next, over the steps between them.
        longest_s: the longest such pause.
    """

    steps_per_s: float
    tokens_per_s: float | None
    step_s: float
    longest_s: float


@dataclass(frozen=True)
class Start:
    """One start of the run.

    Attributes:
        began: seconds since 1970.
        iteration: of the checkpoint that it went on from; 0 for none, None where it was not recorded.
        ended: why it ended, in words; None for one that is running, as far as the files tell.
    """

    began: float
    iteration: int | None
    host: str | None
    ranks: int | None
    ended: str | None


@dataclass(frozen=True)
class Status:
    """What the files say.

    Attributes:
        state: one of STATES. running and silent differ by whether the newest step is older than `stale_after` x the
            time of a step, and than any pause among the recent ones.
        iteration, total: steps done, and of the whole run where it is known.
        step_age_s: since the newest sign of life.
        remaining_s, ends: seconds to go, and when (seconds since 1970), at the recent rate.
        checkpoint, checkpoint_age_s: the newest whole checkpoint's iteration.
        logged: the newest value of every loss, and of throughput.
        warnings: one line each.
    """

    run: str
    state: str
    iteration: int
    total: int | None
    step_age_s: float | None
    rate: Rate | None
    remaining_s: float | None
    ends: float | None
    checkpoint: int | None
    checkpoint_age_s: float | None
    starts: tuple[Start, ...]
    logged: dict[str, float]
    warnings: tuple[str, ...]

    def as_json(self) -> dict:
        """Plain values under the names above."""
        return asdict(self)


def read_status(path: Path, stale_after: float = 10.0, now: float | None = None) -> Status:
    """The status of the run in folder `path`.

    Args:
        stale_after: a run is silent when nothing came for so many times the time of a step.
        now: seconds since 1970; by default the present.

    Raises:
        ValueError: `path` is no run folder.
    """
    run, now = RunFolder(path), time.time() if now is None else now
    _check(run)
    arguments = _object(run.arguments)
    starts, lines = json_lines(run.origins), json_lines(run.metrics, _TAIL_BYTES)
    steps = [line for line in lines if "iteration" in line]
    whole = complete_iterations(run.checkpoints)
    finished = _object(run.finished)
    begun = starts[-1].get("time", 0.0) if starts else None
    since = [line for line in steps if begun is not None and line.get("time", 0.0) >= begun]
    iteration = finished.get("iteration") or max([*whole[-1:], *(line["iteration"] for line in since[-1:]), 0])
    rate = _rate(since, arguments)
    seen = max([line["time"] for line in since if "time" in line], default=begun)
    age = None if seen is None else now - seen
    traces = Traces.of(run, starts, seen)
    ends = [traces.ending(number) for number in range(len(starts))]
    silent_after = None if rate is None else max(stale_after * rate.step_s, 1.5 * rate.longest_s)
    state = _state(traces, ends, bool(since), age, silent_after)
    total = arguments.get("train_iters")
    remaining = None
    if state == "running" and rate is not None and total:
        remaining = max(total - iteration, 0) / rate.steps_per_s
    sealed = None if not whole else (iteration_folder(run.checkpoints, whole[-1]) / CHECKSUMS).stat().st_mtime
    return Status(
        run=str(path),
        state=state,
        iteration=iteration,
        total=total,
        step_age_s=age,
        rate=rate,
        remaining_s=remaining,
        ends=None if remaining is None else now + remaining,
        checkpoint=whole[-1] if whole else None,
        checkpoint_age_s=None if sealed is None else now - sealed,
        starts=tuple(_start(start, end) for start, end in zip(starts, ends, strict=True)),
        logged=_logged(steps),
        warnings=tuple(_warnings(run, traces, state, age, silent_after)),
    )


def _check(run: RunFolder) -> None:
    if not run.path.is_dir():
        raise ValueError(f"{run.path} is no folder; name the one that was given as --run-dir")
    marks = (run.arguments, run.origins, run.command, run.attempts, run.metrics, run.checkpoints, run.error)
    if not any(mark.exists() for mark in marks):
        names = ", ".join(mark.name for mark in marks[:-1])
        raise ValueError(f"{run.path} is no run folder: it has none of {names} and {marks[-1].name}")


def _object(path: Path) -> dict:
    """A JSON file's object; empty where there is none yet."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return value if isinstance(value, dict) else {}


def _rate(since: list[dict], arguments: dict) -> Rate | None:
    """None before the second logged step of this start."""
    times = {line["iteration"]: line["time"] for line in reversed(since) if "time" in line}  # a step's first line
    steps = sorted(times)[-_RECENT_STEPS - 1 :]
    if len(steps) < 2 or times[steps[-1]] <= times[steps[0]]:
        return None
    pairs = list(zip(steps, steps[1:], strict=False))
    pauses = [times[later] - times[earlier] for earlier, later in pairs]
    each = [pause / (later - earlier) for pause, (earlier, later) in zip(pauses, pairs, strict=True)]
    rate = (steps[-1] - steps[0]) / (times[steps[-1]] - times[steps[0]])
    batch, length = arguments.get("global_batch_size"), arguments.get("seq_length")
    tokens = rate * batch * length if batch and length else None
    return Rate(rate, tokens, statistics.median(each), max(pauses))


def _start(start: dict, ending: Ending | None) -> Start:
    text = None if ending is None else ending.text
    return Start(start.get("time", 0.0), start.get("iteration"), start.get("host"), start.get("world_size"), text)


def _state(
    traces: Traces, ends: list[Ending | None], stepped: bool, age: float | None, silent_after: float | None
) -> str:
    if traces.finished:
        return "finished"
    if not ends:
        return "never started" if traces.error is None else "failed"
    if ends[-1] is not None:
        return "stopped" if ends[-1].well and not traces.refused_since() else "failed"
    if not stepped:
        return "starting"
    return "silent" if silent_after is not None and age > silent_after else "running"


def _logged(steps: list[dict]) -> dict[str, float]:
    newest: dict[str, float] = {}
    for line in steps:
        newest.update(line)
    figures = ("tokens per second", "tflops per rank", "mfu", "mean split")
    return {name: value for name, value in newest.items() if _LOSSES.search(name) or name in figures}


def _warnings(
    run: RunFolder, traces: Traces, state: str, age: float | None, silent_after: float | None
) -> Iterator[str]:
    """One line for everything that somebody should look at."""
    for kind in _WARNED:
        told = [event for event in traces.events if event.get("event") == kind]
        if told:
            more = f" ({len(told)} of this kind)" if len(told) > 1 else ""
            yield f"{told[-1]['text']}{more}"
    aside = sorted(path.name for path in run.checkpoints.glob("damaged-iter_*")) if run.checkpoints.is_dir() else []
    if aside:
        yield f"damaged checkpoints lie in {run.checkpoints.name}: {', '.join(aside)}"
    if state == "silent":
        yield f"nothing was logged for {age:.0f} s, more than the {silent_after:.0f} s that the recent steps allow for"
    if run.stop.is_file():
        yield f"{run.stop.name}: the run is asked to write a checkpoint at the next step and to leave"
    if traces.error is not None:
        yield f"{run.error.name}: {traces.error[0]}"
