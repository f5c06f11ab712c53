"""A run that is killed and started again ends with the bytes of one that was not."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rpsd.evaluation import ruler_run
from megatron_rpsd.evaluation.engines.base import Forced
from megatron_rpsd.evaluation.engines.reference import Oracle, RandomAnswers
from megatron_rpsd.evaluation.prediction_files import PredictionFile, count_lines
from megatron_rpsd.evaluation.ruler_run import Progress, ask, check_run, duration, only_run, write_run
from megatron_rpsd.evaluation.samples import load_prepared
from tests.unit.evaluation import slow_run
from tests.unit.evaluation.made_samples import Made, write_prepared

SAMPLES = 10
PROVENANCE = slow_run.PROVENANCE


def prompts(folder: Path) -> list[Path]:
    """Two files, whose samples come in groups of 3 with a group of 1 at the end."""
    made = [Made([str(1000000 + number)], [number]) for number in range(SAMPLES)]
    return [write_prepared(folder / "prompts", task, made) for task in ("niah_single_1", "niah_single_2")]


def predictions(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "output" / "predictions").iterdir())}


def kill_and_resume(folder: Path, times: int) -> list[int]:
    """Kill a run `times` times, each time when it has answered at least one more sample; then let it end.

    Returns the lines that each kill has left."""
    names, left, stream = [path.stem for path in prompts(folder)], [], random.Random(0)
    command = [sys.executable, slow_run.__file__, str(folder)]
    here = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    for _ in range(times):
        before = left[-1] if left else 0
        with subprocess.Popen([*command, "0.03"], env=here, stderr=subprocess.DEVNULL) as process:
            wanted = before + 1 + stream.randrange(3)
            while process.poll() is None:
                lines = sum(count_lines(folder / "output" / "predictions", name) for name in names)
                if lines >= min(wanted, 2 * SAMPLES - 1):
                    time.sleep(stream.uniform(0, 0.03))
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.002)
        left.append(sum(count_lines(folder / "output" / "predictions", name) for name in names))
    subprocess.run([*command, "0"], env=here, check=True, stderr=subprocess.DEVNULL)
    return left


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_runs_end_with_the_same_bytes(tmp_path: Path, kills: int) -> None:
    (tmp_path / "whole").mkdir()
    prompts(tmp_path / "whole")
    slow_run.run(tmp_path / "whole", 0.0)
    left = kill_and_resume(tmp_path / "killed", kills)
    assert 0 < left[0] < 2 * SAMPLES and predictions(tmp_path / "killed") == predictions(tmp_path / "whole")
    order = [
        json.loads(line)["id"] for line in predictions(tmp_path / "killed")["niah_single_1-4096.jsonl"].splitlines()
    ]
    assert order == [f"niah_single_1/4096/{number}" for number in range(SAMPLES)]


class Counting(Oracle):
    """The oracle, which remembers whom it was asked."""

    def __init__(self, batch_size: int = 1, fixed: bool = True) -> None:
        self.batch_size, self.fixed_batches, self.asked = batch_size, fixed, []

    def complete(self, samples) -> Iterator:
        self.asked += [sample.number for sample in samples]
        return super().complete(samples)

    def force(self, samples) -> Iterator:
        for sample in samples:
            yield sample, Forced(0.5, True, 3, ({"reference": "x", "nll": 0.5, "greedy_exact": True, "tokens": 3},))


def answer(paths: list[Path], output: Path, engine, forced: bool = False) -> dict[str, list[dict]]:
    ask(engine, paths, SAMPLES * len(paths), output, forced, io.StringIO())
    return {
        path.name: [json.loads(line) for line in (output / "predictions" / path.name).read_bytes().splitlines()]
        for path in paths
    }


@pytest.mark.parametrize(
    ("batch_size", "fixed", "asked"),
    [(1, True, [4, 5]), (3, True, [3, 4, 5]), (4, True, [4, 5, 6, 7]), (4, False, [4, 5])],
)
def test_what_is_missing_is_asked_in_its_batch(tmp_path: Path, batch_size: int, fixed: bool, asked: list[int]) -> None:
    path, output = prompts(tmp_path)[0], tmp_path / "output"
    whole = answer([path], output, Counting())[path.name]
    place = output / "predictions" / path.name
    lines = place.read_bytes().splitlines(keepends=True)
    torn = lines[5][:-20]
    place.write_bytes(b"".join([*lines[:4], *lines[6:], torn]))
    again = Counting(batch_size, fixed)
    assert answer([path], output, again)[path.name] == whole and again.asked == asked
    assert place.read_bytes() == b"".join(lines)
    done = Counting(batch_size)
    answer([path], output, done)
    assert done.asked == []


def test_lines_and_seconds(tmp_path: Path) -> None:
    paths, output = prompts(tmp_path), tmp_path / "output"
    lines = answer(paths, output, Counting(), forced=True)[paths[0].name]
    assert lines[2] == {
        "id": "niah_single_1/4096/2", "prediction": " 1000002", "tokens": 0, "finish": "stop",
        "nll": 0.5, "greedy_exact": True, "answer_tokens": 3,
        "references": [{"reference": "x", "nll": 0.5, "greedy_exact": True, "tokens": 3}],
    }  # fmt: skip
    timing = json.loads((output / "timing.json").read_text())
    assert {name: entry["samples"] for name, entry in timing.items()} == {path.stem: SAMPLES for path in paths}
    assert ruler_run.total_seconds(output) == pytest.approx(sum(entry["seconds"] for entry in timing.values()))


def test_an_engine_that_fails_keeps_what_it_answered(tmp_path: Path) -> None:
    class Failing(Counting):
        def complete(self, samples) -> Iterator:
            if samples[0].number == 4:
                raise ValueError("the server is gone")
            return super().complete(samples)

    path, output = prompts(tmp_path)[0], tmp_path / "output"
    with pytest.raises(ValueError, match="the server is gone"):
        answer([path], output, Failing())
    assert count_lines(output / "predictions", path.stem) == 4
    again = Counting()
    answer([path], output, again)
    assert again.asked == [4, 5, 6, 7, 8, 9]


def test_files_of_something_else(tmp_path: Path) -> None:
    path, folder = prompts(tmp_path)[0], tmp_path / "predictions"
    folder.mkdir()
    prepared, place = load_prepared(path), folder / path.name
    for content, said in (
        (b'{"id": "another", "prediction": "x"}\n', "line 1 answers another, none of these prompts"),
        (b'{"id": "niah_single_1/4096/0"}\n', "line 1 is no prediction with id, prediction"),
        (b"[]\n", "line 1 is no prediction"),
        (b"torn in the mid\nale\n", "line 1 is no prediction .*delete the file"),
    ):
        place.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            PredictionFile(folder, prepared, ("id", "prediction"))


def test_another_run_is_refused(tmp_path: Path) -> None:
    run = PROVENANCE | {"yarn_factor": None, "prepared": {"vt-64": {"path": "p", "sha256": "a"}}}
    write_run(tmp_path, check_run(tmp_path, run))
    assert check_run(tmp_path, run | {"command": ["y"]})["command"] == ["x"]
    more = {"cwe-64": {"path": "q", "sha256": "b"}}
    assert check_run(tmp_path, run | {"prepared": more})["prepared"] == run["prepared"] | more
    for changed, said in (
        ({"yarn_factor": 2.0}, "yarn_factor was null, now 2.0"),
        ({"engine": {"name": "oracle"}}, 'engine.name was "random", now "oracle"'),
        ({"engine": {"name": "random", "seed": 1}}, "engine.seed was null, now 1"),
        ({"prepared": {"vt-64": {"path": "p", "sha256": "c"}}}, 'vt-64 was "a", now "c"'),
    ):
        with pytest.raises(ValueError, match=f"holds another run: {said}; give another --output"):
            check_run(tmp_path, run | changed)
    known = run | {"model": {"path": "m", "weights_sha256": "w"}}
    write_run(tmp_path, known)
    moved = known | {"model": {"path": "n", "weights_sha256": "w"}}
    assert check_run(tmp_path, moved)["model"]["path"] == "m"
    with pytest.raises(ValueError, match='model.weights_sha256 was "w", now "v"'):
        check_run(tmp_path, known | {"model": {"path": "m", "weights_sha256": "v"}})
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is no JSON"):
        check_run(tmp_path, run)
    (tmp_path / "run.json").unlink()
    (tmp_path / "predictions").mkdir()
    with pytest.raises(ValueError, match="holds predictions without a run.json"):
        check_run(tmp_path, run)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with only_run(tmp_path / "output"):
        with pytest.raises(ValueError, match="another evaluation is writing there"), only_run(tmp_path / "output"):
            raise AssertionError("two at once")
    with only_run(tmp_path / "output"):
        (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file; give a folder"), only_run(tmp_path / "file"):
        raise AssertionError("a file is no folder")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress(monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(ruler_run.time, "monotonic", lambda: clock[0])
    log, terminal = io.StringIO(), Terminal()
    for stream in (log, terminal):
        clock[0] = 0.0
        progress = Progress(110, stream)
        progress.skip(10)
        for _ in range(100):
            clock[0] += 1.0
            progress.advance("vt-64")
    lines = log.getvalue().splitlines()
    assert lines[0] == "vt-64: 11 of 110 samples, 1/s, 2 min left" and len(lines) == 5
    assert (
        lines[1] == "vt-64: 41 of 110 samples, 1/s, 69 s left"
        and lines[-1] == "vt-64: 110 of 110 samples, 1/s, 0 s left"
    )
    shown = terminal.getvalue()
    assert shown.count("\r\x1b[K") == 100 and shown.endswith("0 s left\n") and shown.count("\n") == 1
    assert (duration(7.4), duration(89), duration(600), duration(7500)) == ("7 s", "89 s", "10 min", "2 h 05 min")


def test_random_answers_are_the_same_in_any_order(tmp_path: Path) -> None:
    path = prompts(tmp_path)[0]
    samples = load_prepared(path).samples
    forwards = dict(RandomAnswers(7).complete(samples))
    assert forwards == dict(RandomAnswers(7).complete(samples[::-1]))
