"""Preparation killed anywhere and started again gives the bytes of a run that nobody touched."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "unit" / "data"))
from tiny_tiktoken import PATTERN, save_tiktoken  # noqa: E402

from megatron_rpsd.data import tokenization  # noqa: E402
from megatron_rpsd.data.mixture import prepare_mixture  # noqa: E402
from megatron_rpsd.data.preprocess import PreprocessConfig, preprocess  # noqa: E402
from tests.unit.data.hard_death import contents, die_at  # noqa: E402

LINES = 12000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    draw = random.Random(1)
    with (folder / "in.jsonl").open("w") as file:
        for number in range(LINES):
            file.write(json.dumps({"text": "".join(draw.choices("abc de.\né", k=draw.randrange(300)))}) + "\n")
            if number % 2000 == 500:
                file.write("{broken\n")
    save_tiktoken(folder / "bytes.tiktoken")
    return folder


def command(folder: Path, prefix: Path, workers: int, mode: str) -> list[str]:
    tool = ROOT / "tools" / "preprocess_data.py"
    flags = f"--seq-length 256 --on-error skip --shard-tokens 40000 --no-histogram --workers {workers} --mode {mode}"
    paths = {"--input": folder / "in.jsonl", "--tokenizer": folder / "bytes.tiktoken", "--output-prefix": prefix}
    typed = [str(word) for pair in paths.items() for word in pair]
    return [sys.executable, str(tool), *typed, "--tiktoken-pattern", PATTERN, *flags.split()]


def interrupted(folder: Path, prefix: Path, workers: int, kills: int, draw: random.Random) -> int:
    """Kills the tool at random moments of its work, then lets it end; how many kills hit it alive."""
    hit = 0
    for _ in range(kills):
        shards = draw.randrange(1, 10)
        process = subprocess.Popen(
            command(folder, prefix, workers, "pack"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        work = prefix.parent / f".{prefix.name}.partial"
        while process.poll() is None and len(list(work.glob("tokens/0*.bin"))) < shards:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.05)
        hit += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command(folder, prefix, workers, "pack"), check=True, capture_output=True)
    return hit


@pytest.fixture(scope="module")
def untouched(folder: Path) -> dict[str, bytes]:
    prefix = folder / "untouched"
    subprocess.run(command(folder, prefix, 1, "pack"), check=True, capture_output=True)
    found = contents(prefix)
    assert set(found) == {".bin", ".idx", ".sources", ".json", ".skipped.jsonl"}
    assert json.loads(found[".json"])["skipped"] == 6
    return found


def test_killed_three_times(folder: Path, untouched: dict[str, bytes]) -> None:
    assert interrupted(folder, folder / "three", 2, 3, random.Random(3)) >= 2
    assert contents(folder / "three") == untouched
    assert not (folder / ".three.partial").exists()


def test_a_mended_line_keeps_the_shards_before_it(folder: Path, tmp_path: Path) -> None:
    lines = (folder / "in.jsonl").read_bytes().replace(b"{broken\n", b"").splitlines(keepends=True)
    broken = [*lines[:11000], b"{broken\n", *lines[11000:]]
    (tmp_path / "in.jsonl").write_bytes(b"".join(broken))
    save_tiktoken(tmp_path / "bytes.tiktoken")
    typed = [word.replace("skip", "stop") for word in command(tmp_path, tmp_path / "p", 1, "concatenate")]
    stopped = subprocess.run(typed, capture_output=True, text=True)
    assert stopped.returncode == 2 and "in.jsonl:11001 is not JSON" in stopped.stderr
    assert len(stopped.stderr.splitlines()) == 1
    (tmp_path / "in.jsonl").write_bytes(b"".join(lines))
    mended = subprocess.run(typed, capture_output=True, text=True, check=True)
    taken, left = map(int, mended.stderr.split("taking ")[1].split(" finished")[0].split(" of "))
    assert taken == left >= 4
    other = subprocess.run(command(tmp_path, tmp_path / "q", 1, "concatenate"), capture_output=True)
    assert other.returncode == 0 and contents(tmp_path / "p") == contents(tmp_path / "q")


@pytest.mark.slow
def test_killed_twenty_times(folder: Path, untouched: dict[str, bytes]) -> None:
    draw, hit = random.Random(20), 0
    for number in range(20):
        prefix = folder / f"run{number}"
        hit += interrupted(folder, prefix, 1 + number % 2, 1, draw)
        assert contents(prefix) == untouched, f"run {number} differs"
    assert hit >= 15


RECIPE = """
[[source]]
name = "long"
inputs = ["in.jsonl"]
mode = "whole"
share = 3
[[source]]
name = "short"
inputs = ["in.jsonl"]
max_tokens = 30
share = 2
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty documents, blank and broken lines among them, and a repository."""
    folder, draw = tmp_path_factory.mktemp("small"), random.Random(2)
    lines = [json.dumps({"text": "".join(draw.choices("ab c.", k=draw.randrange(60)))}) for _ in range(30)]
    lines[7] = lines[20] = "{broken"
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "mix.toml").write_text(RECIPE)
    for name in ("one", "two", "three"):
        (folder / name).mkdir()
        (folder / name / "a.py").write_text(f"# {name}\n" * 9)
    save_tiktoken(folder / "bytes.tiktoken")
    return folder


def prepare(folder: Path, prefix: Path, mode: str) -> None:
    """One of the modes, with many shards."""
    inputs = [folder / name for name in ("one", "two", "three")] if mode == "repo" else [folder / "in.jsonl"]
    settings = {
        "tokenizer": folder / "bytes.tiktoken", "tiktoken_pattern": PATTERN, "output_prefix": prefix, "seq_length": 16,
        "on_error": "skip", "shard_tokens": 150,
    }  # fmt: skip
    if mode == "mix":
        prepare_mixture(folder / "mix.toml", settings)
    else:
        preprocess(PreprocessConfig(inputs, mode=mode, **settings))


def killed_at_writes(folder: Path, prefix: Path, mode: str, stride: int) -> int:
    """Kills preparation at every `stride`-th write, each time starting it again; how many kills there were."""
    prepare(folder, prefix, mode)
    untouched, kills = contents(prefix), 0
    while die_at(kills * stride, lambda: prepare(folder, prefix, mode)):
        kills += 1
        prepare(folder, prefix, mode)
        assert contents(prefix) == untouched, f"{mode}, kill {kills}"
        assert not list(prefix.parent.glob(".*"))
    return kills


def many_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches; and no waiting for the disk, which a killed process does not take with it."""
    monkeypatch.setattr(tokenization, "BATCH_BYTES", 200)
    monkeypatch.setattr(os, "fsync", lambda file: None)


MODES = ("concatenate", "whole", "pack", "repo", "mix")


@pytest.mark.parametrize("mode", MODES)
def test_killed_at_writes_of_every_kind(small: Path, tmp_path: Path, mode: str, monkeypatch) -> None:
    many_writes(monkeypatch)
    assert killed_at_writes(small, tmp_path / "p", mode, 9) >= 3


@pytest.mark.slow
def test_killed_at_every_write(small: Path, tmp_path: Path, monkeypatch) -> None:
    many_writes(monkeypatch)
    counts = {mode: killed_at_writes(small, tmp_path / mode, mode, 1) for mode in MODES}
    print("kills by mode:", counts)
    assert min(counts.values()) > 20


@pytest.mark.slow
def test_killed_twice_at_any_two_writes(small: Path, tmp_path: Path, monkeypatch) -> None:
    """The run that goes on is killed, too."""
    many_writes(monkeypatch)
    draw, prefix, pairs = random.Random(9), tmp_path / "p", 0
    prepare(small, prefix, "pack")
    untouched = contents(prefix)
    for _ in range(100):
        hit = [die_at(draw.randrange(60), lambda: prepare(small, prefix, "pack")) for _ in range(2)]
        prepare(small, prefix, "pack")
        assert contents(prefix) == untouched
        pairs += all(hit)
    print("pairs of kills:", pairs)
    assert pairs > 30
