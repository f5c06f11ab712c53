"""The cache: found again by what it depends on, and never half a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rpsd.ruler import prepare as module
from megatron_rpsd.ruler.generate import Recipe
from megatron_rpsd.ruler.prepare import cache_key, prepare, prepared_files
from megatron_rpsd.ruler.prompts import ModelTemplate
from megatron_rpsd.ruler.tasks import find_task


def test_made_once(ws_folder: Path, tmp_path: Path, monkeypatch) -> None:
    tasks, seen = [find_task("vt"), find_task("niah_single_2@synthetic")], []
    given = (tasks, [4096, 2048, 4096], 2, 42, ws_folder, None, tmp_path / "cache")
    first = prepare(*given, lambda name, done: seen.append((name, done)))
    assert list(first) == [(task.name, length) for length in (2048, 4096) for task in tasks]
    assert all(path.is_file() and path.name == f"{name}-{length}.jsonl" for (name, length), path in first.items())
    assert len(seen) == 8 and seen[:2] == [("vt 2048", 1), ("vt 2048", 2)]
    monkeypatch.setattr(module, "write_prompts", None)
    assert prepare(*given) == first


@pytest.mark.parametrize("workers", [1, 2])
def test_what_was_made_before_a_refusal_is_kept(workers: int, ws_folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    tasks = [find_task("vt"), find_task("qa_1")]
    with pytest.raises(ValueError, match="lacks squad.json"):
        prepare(tasks, [4096], 2, 42, ws_folder, tmp_path, cache, workers=workers)
    kept = sorted(path.name for path in cache.glob("*/*")) if cache.exists() else []
    assert kept in ([], ["vt-4096.evidence.jsonl", "vt-4096.jsonl", "vt-4096.manifest.json"])
    assert workers > 1 or kept
    assert not [path for path in tmp_path.rglob(".*")]


def test_workers_change_nothing(ws_folder: Path, tmp_path: Path) -> None:
    tasks, seen = [find_task(name) for name in ("vt", "cwe", "niah_single_3@synthetic")], []
    given = (tasks, [2048], 3, 42, ws_folder, None)
    alone = prepare(*given, tmp_path / "alone")
    shared = prepare(*given, tmp_path / "shared", lambda name, done: seen.append((name, done)), workers=2)
    assert [path.read_bytes() for path in alone.values()] == [path.read_bytes() for path in shared.values()]
    assert sorted(seen) == sorted((f"{task.name} 2048", done) for task in tasks for done in (1, 2, 3))
    listed = dict(prepared_files(tmp_path / "shared"))
    assert sorted(listed) == sorted(shared.values())
    assert {manifest["task"] for manifest in listed.values()} == {task.name for task in tasks}
    assert all(manifest["samples"] == 3 and manifest["counted"] == "by pieces" for manifest in listed.values())


def test_the_key_holds_everything() -> None:
    plain = Recipe(find_task("vt"), 4096, 2)
    changes = {"task": find_task("fwe"), "length": 8, "samples": 3, "seed": 1, "edition": "2024-12", "depths": (0.5,)}
    changed = [replace(plain, **{name: value}) for name, value in changes.items()]
    keys = {cache_key(recipe, "a") for recipe in (plain, *changed)}
    keys |= {cache_key(plain, "b"), cache_key(plain, "a", ModelTemplate("chat", "x", "y"))}
    keys |= {cache_key(replace(plain, task=find_task(name)), "a") for name in ("qa_1", "qa_1@synthetic")}
    assert len(keys) == len(changed) + 5
