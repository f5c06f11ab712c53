"""Sources mixed by share and length, as in ProLong (arXiv 2410.02660: long documents whole, short ones packed).

A recipe names the sources; each becomes a prefix of its own, and Megatron's blended datasets mix them in training.
TOML, or JSON with the same names:

    tokens = 2_000_000_000          # optional: what the run will read; says how often each source is read

    [[source]]
    name = "code"                   # written as P-code
    inputs = ["repositories/*"]     # globs, relative to the recipe
    mode = "repo"                   # concatenate, whole, pack, or repo; default: pack
    share = 0.3

    [[source]]
    name = "books"
    inputs = ["books/*.jsonl.zst"]
    mode = "whole"
    min_tokens = 65536              # by default none; max_tokens likewise
    json_key = "text"
    share = 0.3

    [[source]]
    name = "short"
    inputs = ["web/*.parquet"]
    share = 0.4

Shares are of tokens; they are divided by their sum. Sources with the same inputs (long and short documents of one
collection) are tokenized once.
"""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rpsd.data.arrangement import Arrangement
from megatron_rpsd.data.manifest import Manifest
from megatron_rpsd.data.preprocess import (
    MODES,
    PreprocessConfig,
    load_tokenizer,
    publish,
    work_folder,
    write_arranged,
)
from megatron_rpsd.data.shards import write_durably
from megatron_rpsd.data.tokenization import tokenize

_KEYS = {
    "name": str,
    "inputs": list,
    "share": (int, float),
    "mode": str,
    "min_tokens": int,
    "max_tokens": int,
    "json_key": str,
}


@dataclass(frozen=True)
class MixtureSource:
    """One [[source]] of a recipe."""

    name: str
    share: float
    """of the run's tokens, of all shares 1"""
    config: PreprocessConfig


def read_recipe(path: Path, settings: Mapping[str, Any]) -> tuple[list[MixtureSource], int | None]:
    """The sources of a recipe, and its `tokens`.

    Args:
        settings: of all sources, by the names of `PreprocessConfig`; output_prefix P becomes P-NAME.

    Raises:
        ValueError: what is wrong with the recipe, by source.
    """
    try:
        raw = path.read_bytes().decode()
        recipe = json.loads(raw) if path.suffix == ".json" else tomllib.loads(raw)
    except (OSError, ValueError) as error:
        raise ValueError(f"--recipe {path} cannot be read: {error}") from None
    if not isinstance(recipe, dict) or not isinstance(recipe.get("source"), list) or not recipe["source"]:
        raise ValueError(f"--recipe {path} has no [[source]]")
    if unknown := sorted(recipe.keys() - {"source", "tokens"}):
        raise ValueError(f"--recipe {path} has {unknown[0]!r}; known are tokens and [[source]]")
    tokens = recipe.get("tokens")
    if tokens is not None and (not isinstance(tokens, int) or tokens < 1):
        raise ValueError(f"--recipe {path}: tokens = {tokens!r} must be a whole number of at least 1")
    for number, entry in enumerate(recipe["source"], start=1):
        _check_entry(path, number, entry)
    names = [entry["name"] for entry in recipe["source"]]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--recipe {path}: two sources are named {twice[0]!r}")
    total = math.fsum(entry["share"] for entry in recipe["source"])
    return [
        MixtureSource(entry["name"], entry["share"] / total, _config(path, entry, settings))
        for entry in recipe["source"]
    ], tokens


def _check_entry(path: Path, number: int, entry: Any) -> None:
    where = f"--recipe {path}, source {number}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is no table")
    if missing := [key for key in ("name", "inputs", "share") if key not in entry]:
        raise ValueError(f"{where} has no {missing[0]}")
    for key, value in entry.items():
        if key not in _KEYS:
            raise ValueError(f"{where} has {key!r}; known are {', '.join(_KEYS)}")
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            raise ValueError(f"{where}: {key} = {value!r} is of the wrong kind")
    if not entry["share"] > 0:
        raise ValueError(f"{where}: share = {entry['share']} must be greater than 0")
    if not entry["name"].replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"{where}: name = {entry['name']!r} becomes part of a file's name: letters, digits, - and _")


def _config(path: Path, entry: dict, settings: Mapping[str, Any]) -> PreprocessConfig:
    mode, inputs = entry.get("mode", "pack"), []
    if mode not in MODES:
        raise ValueError(f"--recipe {path}, source {entry['name']!r}: mode = {mode!r}; known are {', '.join(MODES)}")
    for pattern in entry["inputs"]:
        found = sorted(path.parent.glob(pattern)) if not Path(pattern).is_absolute() else [Path(pattern)]
        if not found:
            raise ValueError(f"--recipe {path}, source {entry['name']!r}: {pattern!r} finds nothing")
        inputs.extend(found)
    chosen = {key: entry[key] for key in ("min_tokens", "max_tokens", "json_key") if key in entry}
    prefix = Path(f"{settings['output_prefix']}-{entry['name']}")
    try:
        return PreprocessConfig(**{**settings, **chosen, "inputs": inputs, "mode": mode, "output_prefix": prefix})
    except ValueError as error:
        raise ValueError(f"--recipe {path}, source {entry['name']!r}: {error}") from None


def prepare_mixture(
    recipe: Path, settings: Mapping[str, Any], report: Callable[[str], None] = lambda line: None
) -> dict[Path, Manifest]:
    """Prepares every source of a recipe as P-NAME, and writes P.data_args (for Megatron's --data-args-path: shares and
    prefixes) and P.blend.json (what the shares mean in tokens). All appear together, P.blend.json last.

    Returns:
        the manifests by prefix.

    Raises:
        ValueError: as `read_recipe` and `preprocess`.
    """
    sources, wanted = read_recipe(recipe, settings)
    if len(str(settings["output_prefix"]).split()) > 1:
        raise ValueError(
            f"--output-prefix '{settings['output_prefix']}' has a blank, where Megatron would cut it in P.data_args"
        )
    first, target = sources[0].config, Path(settings["output_prefix"])
    modes = "pack" if any(source.config.mode == "pack" for source in sources) else "concatenate"
    spec = load_tokenizer(first.tokenizer, first.append_eod, modes, first.tiktoken_pattern)
    made: dict[Path, Manifest] = {}
    with work_folder(target) as folder:
        for source in sources:
            config = source.config
            shared = json.dumps([list(map(str, config.inputs)), config.source.recipe(spec)], sort_keys=True)
            tokens = folder / hashlib.sha256(shared.encode()).hexdigest()[:16]
            report(f"source {source.name}: {len(config.inputs)} inputs, share {source.share:.3f}")
            tokenized = tokenize(config.source, spec, tokens, config.workers, config.shard_tokens, report)
            arranged = "concatenate" if config.mode == "repo" else config.mode
            arrangement = Arrangement(arranged, config.seq_length, config.min_tokens, config.max_tokens)
            try:
                made[config.output_prefix] = write_arranged(
                    folder / source.name, tokenized, spec, arrangement, config.source, config.mode
                )
            except ValueError as error:
                raise ValueError(f"source {source.name!r}: {error}") from None
        target.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{target}.blend.json").unlink(missing_ok=True)
        for source in sources:
            publish(folder / source.name, source.config.output_prefix)
        blend = describe_blend(sources, list(made.values()), wanted)
        arguments = " ".join(f"{source.share:.9g} {source.config.output_prefix}" for source in sources)
        write_durably(Path(f"{target}.data_args"), (arguments + "\n").encode())
        write_durably(Path(f"{target}.blend.json"), (json.dumps(blend, indent=2) + "\n").encode())
    for line in _lines(blend):
        report(line)
    report(f"train on it with --data-args-path {target}.data_args --split 100,0,0, or --data-path {arguments}")
    return made


def describe_blend(sources: Sequence[MixtureSource], manifests: Sequence[Manifest], wanted: int | None) -> dict:
    """What a run reads of each source.

    Args:
        wanted: tokens of the run; None becomes the most that no source is read twice for.
    """
    once = min(int(manifest.tokens / source.share) for source, manifest in zip(sources, manifests, strict=True))
    tokens = once if wanted is None else wanted
    return {
        "seq_length": manifests[0].seq_length,
        "tokens": tokens,
        "tokens_without_repetition": once,
        "sources": [
            {
                "name": source.name,
                "prefix": str(source.config.output_prefix),
                "mode": manifest.mode,
                "share": source.share,
                "stored_tokens": manifest.tokens,
                "tokens_read": round(source.share * tokens),
                "epochs": source.share * tokens / manifest.tokens,
            }
            for source, manifest in zip(sources, manifests, strict=True)
        ],
    }


def _lines(blend: dict) -> list[str]:
    lines = [f"a run of {blend['tokens']} tokens reads"]
    for source in blend["sources"]:
        lines.append(
            f"  {source['share']:7.2%} {source['name']}: {source['tokens_read']} tokens, {source['epochs']:.2f} times "
            f"its {source['stored_tokens']} ({source['mode']})"
        )
    return lines
