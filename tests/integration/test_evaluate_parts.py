"""An evaluation in parts leaves what one process leaves; a part that failed is named, and asked again alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_rpsd.evaluation.ruler_options import evaluation_parser
from megatron_rpsd.evaluation.ruler_parts import merge_parts, parts_left
from megatron_rpsd.report.ruler_commands import run_evaluation
from tests.ruler_prompts import tiny_reader

NAMES = ["vt-896", "niah_single_1-896", "vt-1024", "niah_single_1-1024"]
GIVEN = ["--tasks", "vt", "niah_single_1", "--lengths", "1024", "896", "--num-samples", "2", "--device", "cpu"]
GIVEN += ["--teacher-forced", "--batch-size", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_reader(tmp_path_factory.mktemp("model"))


def options(model: Path, output: Path, *more: object):
    words = ["--hf", model, *GIVEN, "--cache", model.parent / "cache", "--output", output, *more]
    return evaluation_parser("").parse_args(list(map(str, words)))


def files(output: Path) -> dict[str, bytes]:
    """Everything that one process leaves, but for seconds and the command."""
    found = {}
    for path in sorted(output.rglob("*")):
        name = str(path.relative_to(output))
        if path.is_file() and not name.startswith("parts/") and path.name not in (".lock", "timing.json"):
            content = path.read_bytes()
            if path.suffix == ".html":
                content = re.sub(rb"<tr><td>(command|seconds)</td>.*?</tr>", b"", content)
            elif name in ("run.json", "scores.json"):
                value = json.loads(content)
                for holder in (value, value.get("provenance", {})):
                    for key in ("command", "seconds"):
                        holder.pop(key, None)
                content = json.dumps(value).encode()
            found[name] = content
    return found


def test_parts_put_together_are_the_whole(model: Path, tmp_path: Path, capsys) -> None:
    run_evaluation(options(model, tmp_path / "whole"))
    output = tmp_path / "parts"
    assert parts_left(options(model, output)) == list(enumerate(NAMES)) and not output.exists()
    for number in (3, 0, 1):  # in any order, on any host
        assert run_evaluation(options(model, output, "--part", number)) == 0
    assert parts_left(options(model, output)) == [(2, "vt-1024")]
    (output / "parts" / "2.log").write_text("error: no room\nsrun: error: node1: task 0: Exited with exit code 2\n")
    with pytest.raises(
        ValueError, match=r"1 of 4 parts are not whole: part 2, vt-1024 \(0 samples answered: error: no"
    ):
        merge_parts(options(model, output, "--merge"))
    assert not (output / "scores.json").exists() and not (output / "run.json").exists()
    run_evaluation(options(model, output, "--part", 2))
    # A kill between the last answer and its sorting: the lines are all there, in another order.
    place = output / "parts" / "vt-896" / "predictions" / "vt-896.jsonl"
    place.write_bytes(b"".join(reversed(place.read_bytes().splitlines(keepends=True))))
    capsys.readouterr()
    assert run_evaluation(options(model, output, "--merge")) == 0
    assert "report.html" in capsys.readouterr().out
    merged, whole = files(output), files(tmp_path / "whole")
    assert {"report.html", "scores.json", "samples.jsonl", "run.json", "predictions/vt-1024.jsonl"} <= merged.keys()
    assert merged.keys() == whole.keys()
    assert [name for name in whole if merged[name] != whole[name]] == []


def test_parts_of_another_run_are_refused(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "parts"
    run_evaluation(options(model, output, "--part", 0, "--bos", "add"))
    for number in (1, 2, 3):
        run_evaluation(options(model, output, "--part", number))
    with pytest.raises(ValueError, match="holds another run: bos was"):
        merge_parts(options(model, output, "--merge"))
    with pytest.raises(ValueError, match="holds another run: vt-896 was"):
        merge_parts(options(model, output, "--merge", "--num-samples", 4))
    with pytest.raises(ValueError, match="--part 4: this evaluation has 4 parts, 0 to 3"):
        run_evaluation(options(model, output, "--part", 4))
