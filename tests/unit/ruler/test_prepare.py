"""The cache: found again by what it depends on, and never half a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rpsd.ruler import prepare as module
from megatron_rpsd.ruler.prepare import cache_key, prepare
from megatron_rpsd.ruler.tasks import find_task


def test_made_once(ws_folder: Path, tmp_path: Path, monkeypatch) -> None:
    tasks, seen = [find_task("vt"), find_task("niah_single_2@synthetic")], []
    given = (tasks, [4096, 2048, 4096], 2, 42, ws_folder, None, tmp_path / "cache")
    first = prepare(*given, lambda name, done: seen.append((name, done)))
    assert list(first) == [(task.name, length) for length in (2048, 4096) for task in tasks]
    assert all(path.is_file() and path.name == f"{name}-{length}.jsonl" for (name, length), path in first.items())
    assert len(seen) == 8 and seen[:2] == [("vt 2048", 1), ("vt 2048", 2)]
    monkeypatch.setattr(module, "write_task", None)
    assert prepare(*given) == first


def test_what_was_made_before_a_refusal_is_kept(ws_folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match="--data-dir is not given"):
        prepare([find_task("vt"), find_task("qa_1")], [4096], 2, 42, ws_folder, None, cache)
    (folder,) = cache.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "vt-4096.evidence.jsonl",
        "vt-4096.jsonl",
        "vt-4096.manifest.json",
    ]


def test_the_key_holds_everything() -> None:
    task = find_task("vt")
    keys = {cache_key(task, 4096, 2, 42, "a"), cache_key(replace(task, name="x"), 4096, 2, 42, "a")}
    keys |= {cache_key(task, *changed) for changed in ((8, 2, 42, "a"), (4096, 3, 42, "a"), (4096, 2, 1, "a"))}
    keys |= {cache_key(task, 4096, 2, 42, "b"), cache_key(replace(task, name="vt@synthetic"), 4096, 2, 42, "a")}
    assert len(keys) == 7
