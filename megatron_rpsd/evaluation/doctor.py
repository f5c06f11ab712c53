"""What an evaluation needs, what is here of it, and the command that brings the rest. Nothing is fetched."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from megatron_rpsd.evaluation.engines.model_facts import read_model
from megatron_rpsd.evaluation.engines.prompt_tokens import PromptTokens
from megatron_rpsd.ruler.sources import Sources, english_sentences
from megatron_rpsd.ruler.words import VERSION, word_lists

_FETCH = "python tools/make_ruler.py fetch-data --output DIR, then --data-dir DIR"
_WORDS = (
    "python tools/make_ruler.py fetch-data --output DIR --words-dictionary words_dictionary.zip (dwyl/english-words)"
)


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        what: is wanted.
        here: what was found; empty where it is missing.
        purpose: what it is for, in a few words.
        remedy: the command that brings it.
        essential: whether nothing works without it.
    """

    what: str
    here: str
    purpose: str
    remedy: str
    essential: bool = False

    def line(self) -> str:
        """The finding as text: `ok`, or `MISSING` or `absent` with the remedy."""
        if self.here:
            return f"ok       {self.what}: {self.here}"
        return f"{'MISSING' if self.essential else 'absent '}  {self.what} ({self.purpose}): {self.remedy}"


def _package(name: str, purpose: str, remedy: str, essential: bool = False, module: str | None = None) -> Finding:
    """An installed package, not imported."""
    try:
        here = version(name)
    except PackageNotFoundError:
        here = "without metadata" if find_spec(module or name.replace("-", "_")) else ""
    return Finding(name, here, purpose, remedy, essential)


def _tried(what: str, attempt: Callable[[], str], purpose: str, remedy: str = "", essential: bool = False) -> Finding:
    """Whatever `attempt` says, or the ValueError that it ends in, beside the remedy."""
    try:
        return Finding(what, attempt(), purpose, remedy, essential)
    except ValueError as error:
        said = " ".join(str(error).split())
        return Finding(what, "", purpose, f"{said}; {remedy}" if remedy else said, essential)


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return ""
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _libraries() -> list[Finding]:
    found = [
        _package("torch", "everything", "pip install torch", True),
        _package("transformers", "--backend transformers", "pip install transformers", True),
        _package("tokenizers", "prompts", "pip install tokenizers", True),
        _package("vllm", "--backend vllm", "pip install megatron_rpsd[vllm]"),
        _package("flash-attn", "--attention flash_attention_2", "pip install flash-attn", module="flash_attn"),
    ]
    if find_spec("torch"):
        remedy = "torch sees none; --device cpu works, slowly"
        found.append(Finding("GPU", _gpu(), "models of billions of weights", remedy))
    return found


def _prompt_needs(data_dir: Path | None) -> list[Finding]:
    """Words, sentences and texts of RULER's prompts."""
    sources = Sources(data_dir)
    words = "pip install megatron_rpsd[ruler]"

    def text(name: str, purpose: str, remedy: str, count: Callable[[], int]) -> Finding:
        found = _tried(name, lambda: f"checksum right, {count():,} entries", purpose)
        # A file that is merely not there needs the command alone; one that is not the right one has to be named.
        return found if found.here or "SHA-256" in found.remedy else replace(found, remedy=remedy)

    return [
        _tried(
            f"wonderwords {VERSION}", lambda: f"{sum(map(len, word_lists().values())):,} words, the right ones",
            "keys, values and words of 11 tasks", words, True,
        ),
        _tried("punkt", lambda: f"cuts {len(english_sentences('One. Two.'))} of 2 sentences", "essay tasks", words),
        text("PaulGrahamEssays.json", "5 niah tasks", _FETCH, lambda: len(sources.essay_words)),
        text("squad.json", "qa_1", _FETCH, lambda: len(sources.squad["data"])),
        text("hotpotqa.json", "qa_2", _FETCH, lambda: len(sources.hotpotqa)),
        text("english_words.json", "cwe from about 128K on", _WORDS, lambda: len(sources.english_words)),
    ]  # fmt: skip


def _model_needs(folder: Path) -> list[Finding]:
    def model() -> str:
        facts = read_model(folder)
        if not facts.parameters:
            raise ValueError(f"{folder} holds no safetensors")
        return f"{facts.parameters:,} parameters, window {facts.window} tokens, rope_type {facts.rope_type}"

    def tokenizer() -> str:
        tokens = PromptTokens(folder)
        bos = "adds a BOS" if tokens.added_by_tokenizer else "adds no BOS"
        return f"{tokens.counter.sha256[:12]}, ids up to {tokens.vocab_size - 1}, {bos}"

    return [
        _tried("model", model, "--hf", "", True),
        _tried("tokenizer", tokenizer, "prompts", "", True),
    ]


def findings(data_dir: Path | None = None, hf: Path | None = None) -> list[Finding]:
    """Everything that was looked for, in the order of the report."""
    found = _libraries() + _prompt_needs(data_dir)
    if hf is not None:
        found += _model_needs(hf)
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    return [*found, Finding("disk", f"{free:.1f} GB free in this folder", "", "")]


def report(found: Sequence[Finding]) -> tuple[str, int]:
    """The text, and the exit code: 0 where all essentials are here."""
    missing = [finding.what for finding in found if finding.essential and not finding.here]
    last = f"cannot evaluate without {', '.join(missing)}" if missing else "ready"
    return "\n".join([*(finding.line() for finding in found), last]), int(bool(missing))
