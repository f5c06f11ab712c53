"""A run over prepared prompts: every sample answered once, however often the run is killed and started again."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from megatron_rpsd.data.files import held, write_json
from megatron_rpsd.evaluation.engines.base import Engine
from megatron_rpsd.evaluation.prediction_files import PredictionFile
from megatron_rpsd.evaluation.samples import Sample, load_prepared

_NOT_COMPARED = ("command", "prepared")
_PLAIN = ("id", "prediction", "tokens", "finish")
_FORCED = ("nll", "greedy_exact", "answer_tokens")
_QUIET_SECONDS = 30.0


class Progress:
    """Samples done, their rate and the time left, on stderr: one line that changes, or in a log a line now and then."""

    def __init__(self, total: int, stream: TextIO | None = None, every: float = _QUIET_SECONDS) -> None:
        """`total`: samples of the run, those answered in earlier sessions included."""
        self.total, self.stream, self.every = total, stream or sys.stderr, every
        self.done = self.skipped = 0
        self._begun, self._told = time.monotonic(), -every
        self._live = self.stream.isatty()

    def skip(self, samples: int) -> None:
        """So many samples were answered before."""
        self.skipped += samples

    def advance(self, name: str) -> None:
        """One more sample of TASK-LENGTH is done."""
        self.done += 1
        now, left = time.monotonic() - self._begun, self.total - self.skipped - self.done
        if not self._live and left and now - self._told < self.every:
            return
        self._told = now
        rate = self.done / max(now, 1e-9)
        line = f"{name}: {self.done + self.skipped} of {self.total} samples, {rate:.3g}/s, {duration(left / rate)} left"
        begin, end = ("\r\x1b[K", "" if left else "\n") if self._live else ("", "\n")
        print(begin + line, end=end, file=self.stream, flush=True)


def duration(seconds: float) -> str:
    """2 h 05 min, 12 min or 8 s."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"


@contextlib.contextmanager
def only_run(output: Path) -> Iterator[None]:
    """Hold OUTPUT for this process; ValueError where another one holds it. A killed process holds nothing."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; give a folder")
    with held(output, f"--output {output}: another evaluation is writing there"):
        yield


def _first_difference(old: object, new: object, path: str = "") -> tuple[str, object, object] | None:
    """Dotted path and both values of the first place where two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(k for k in old if k not in new)]:
            found = _first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
            if found:
                return found
        return None
    return None if old == new else (path, old, new)


def fields_of(forced: bool) -> tuple[str, ...]:
    """Keys that a line of predictions has; `forced`: gold answers are scored too."""
    return _PLAIN + _FORCED * forced


def _compared(run: dict) -> dict:
    """What two sessions of one run have in common. A model that is known by its content may have been moved."""
    kept = {key: value for key, value in run.items() if key not in _NOT_COMPARED}
    if kept["model"].get("weights_sha256"):
        kept["model"] = {key: value for key, value in kept["model"].items() if key != "path"}
    return kept


def check_run(output: Path, provenance: dict) -> dict:
    """What OUTPUT/run.json shall hold, after a check that the run there, if there is one, is this one.

    A rerun may bring further tasks and lengths: run.json then lists the prompts of all. Everything else must be equal
    (model, tokenizer, engine, options, versions of the libraries that compute): predictions of two settings never mix.

    Args:
        provenance: "prepared" is {TASK-LENGTH: {"path", "sha256"}}.

    Raises:
        ValueError: OUTPUT holds another run, or files that are no run.
    """
    path, provenance = output / "run.json", json.loads(json.dumps(provenance))
    if not path.is_file():
        if (output / "predictions").exists():
            raise ValueError(f"--output {output} holds predictions without a run.json; give another folder")
        return provenance
    try:
        old = json.loads(path.read_bytes())
    except ValueError:
        raise ValueError(f"{path} is no JSON; give another --output") from None
    return join_runs(output, old, provenance)


def join_runs(output: Path, old: dict, new: dict) -> dict:
    """`old` with the prompts of both; ValueError, which names `output`, where they are not of one run."""
    kept, wanted = _compared(old), _compared(new)
    sums = [{name: entry["sha256"] for name, entry in run.get("prepared", {}).items()} for run in (old, new)]
    shared = [{name: by[name] for name in by if all(name in other for other in sums)} for by in sums]
    for one, other in ((kept, wanted), shared):
        difference = _first_difference(one, other)
        if difference:
            where, was, now = difference
            raise ValueError(
                f"--output {output} holds another run: {where} was {json.dumps(was)}, now {json.dumps(now)}; give "
                "another --output, or the same options as before"
            )
    return old | {"prepared": old["prepared"] | new["prepared"]}


def write_run(output: Path, run: dict) -> None:
    """OUTPUT/run.json, before the first prediction."""
    write_json(output / "run.json", run)


def ask(
    engine: Engine,
    paths: Sequence[Path],
    total: int,
    output: Path,
    forced: bool = False,
    stream: TextIO | None = None,
) -> None:
    """Answer every sample that OUTPUT/predictions lacks, one prepared file after another in memory.

    Each line is written when its answer is there. After the last sample of a task and length its file is put into the
    samples' order: a run that was killed and resumed leaves the bytes that an uninterrupted one does. Seconds of every
    session go to OUTPUT/timing.json.

    Args:
        total: samples of all files.
        forced: also score the gold answers.
    """
    progress = Progress(total, stream)
    for path in paths:
        prepared = load_prepared(path)
        file = PredictionFile(output / "predictions", prepared, fields_of(forced))
        pending = file.missing(engine.batch_size if engine.fixed_batches else 1)
        progress.skip(len(prepared.samples) - len(pending))
        begun, before = time.monotonic(), progress.done
        try:
            for start in range(0, len(pending), engine.batch_size):
                for line in _batch(engine, pending[start : start + engine.batch_size], forced):
                    file.append(line)
                    progress.advance(prepared.name)
        finally:
            file.close()
            if progress.done > before:
                seconds = time.monotonic() - begun
                _note_seconds(output / "timing.json", prepared.name, progress.done - before, seconds)
        file.finish()


def _batch(engine: Engine, samples: Sequence[Sample], forced: bool) -> Iterator[dict]:
    """Lines of a batch: as they come, or where gold answers are scored too, after both."""
    lines = {}
    for sample, answer in engine.complete(samples):
        values = (sample.id, answer.text, answer.tokens, answer.finish)
        lines[sample.id] = dict(zip(_PLAIN, values, strict=True))
        if not forced:
            yield lines[sample.id]
    if forced:
        for sample, score in engine.force(samples):
            line = lines[sample.id] | dict(zip(_FORCED, (score.nll, score.greedy_exact, score.tokens), strict=True))
            yield line | ({"references": list(score.references)} if score.references else {})


def _note_seconds(path: Path, name: str, samples: int, seconds: float) -> None:
    timing = json.loads(path.read_bytes()) if path.is_file() else {}
    entry = timing.setdefault(name, {"samples": 0, "seconds": 0.0})
    entry["samples"] += samples
    entry["seconds"] = round(entry["seconds"] + seconds, 3)
    write_json(path, timing)


def total_seconds(output: Path) -> float:
    """Seconds of all sessions that ended by themselves; those of killed ones are not known."""
    path = output / "timing.json"
    timing = json.loads(path.read_bytes()) if path.is_file() else {}
    return round(sum(entry["seconds"] for entry in timing.values()), 3)
