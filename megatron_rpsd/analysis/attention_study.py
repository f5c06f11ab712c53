"""Attention mass of one or two models over the prompts of a prepared file, as one JSON value."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_rpsd.analysis.attention_mass import GROUPS, MassSettings, attention_shares, load_model
from megatron_rpsd.checkpoint.hf_folder import HFFolder
from megatron_rpsd.evaluation.engines.prompt_tokens import PromptTokens
from megatron_rpsd.evaluation.samples import Prepared, Sample, load_prepared

SCHEMA = 1
DEPTH_BINS = 5
TOP_SHARE = 0.02
"""Share of all heads that are called evidence heads: those with the most mass on the evidence in the first model."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class MarkedPrompt:
    """A prompt's tokens, and which of them hold evidence.

    Attributes:
        ids: with a BOS before them where the model reads one.
        evidence: half-open spans of `ids`.
        depth: mean place of the evidence's tokens, from 0 (the beginning) to 1.
    """

    id: str
    ids: tuple[int, ...]
    evidence: tuple[tuple[int, int], ...]
    depth: float


def mark_prompt(sample: Sample, tokens: PromptTokens) -> MarkedPrompt:
    """Tokens of a sample's prompt and the evidence in them.

    Raises:
        ValueError: no evidence is known, or the tokens are not those that it was counted in.
    """
    before = int(tokens.adds_bos(sample.prompt))
    spans = sorted({(a + before, b + before) for part in sample.evidence for a, b in part.tokens})
    if not spans:
        raise ValueError(f"{sample.id} has no place of its evidence: attention mass is for niah and vt")
    ids = tokens.prompt_ids(sample)
    places = [token for a, b in spans for token in range(a, b)]
    return MarkedPrompt(sample.id, tuple(ids), tuple(spans), float(np.mean(places)) / max(1, len(ids) - 1))


def _marked(hf: str, prepared: Prepared, limit: int | None, bos: str) -> list[MarkedPrompt]:
    tokens, made_with = PromptTokens(Path(hf), bos), prepared.manifest["tokenizer_sha256"]
    if tokens.counter.sha256 != made_with:
        raise ValueError(
            f"--prepared {prepared.path} was made with tokenizer.json {made_with[:16]}..., {hf} has "
            f"{tokens.counter.sha256[:16]}...: its evidence stands at other tokens; prepare prompts with this one"
        )
    return [mark_prompt(sample, tokens) for sample in prepared.samples[:limit]]


def _rounded(values: np.ndarray) -> list:
    return np.round(values.astype(np.float64), 6).tolist()


def study_model(
    hf: str,
    prompts: Sequence[MarkedPrompt],
    settings: MassSettings,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> dict:
    """One model's entry of the study: mean shares by group [layers][heads], and every prompt's evidence by head.

    Raises:
        ValueError: a folder that this project does not read (mixture of experts, attention windows).
    """
    folder = HFFolder(hf)
    model, shares = load_model(hf, DTYPES[dtype], device), []
    for done, prompt in enumerate(prompts, start=1):
        shares.append(attention_shares(model, prompt.ids, prompt.evidence, settings).double().numpy())
        progress(done)
    mean = np.mean(shares, axis=0)
    return {
        "path": str(hf),
        "config_sha256": hashlib.sha256((folder.path / "config.json").read_bytes()).hexdigest(),
        "layers": mean.shape[0],
        "heads": mean.shape[1],
        "shares": {group: _rounded(mean[..., index]) for index, group in enumerate(GROUPS)},
        "prompts": [
            {
                "id": prompt.id,
                "tokens": len(prompt.ids),
                "evidence_tokens": sum(b - a for a, b in prompt.evidence),
                "depth": round(prompt.depth, 6),
                "shares": {group: round(float(one[..., index].mean()), 6) for index, group in enumerate(GROUPS)},
                "evidence_by_head": _rounded(one[..., 0]),
            }
            for prompt, one in zip(prompts, shares, strict=True)
        ],
    }


def evidence_heads(model: dict) -> list[tuple[int, int]]:
    """(layer, head) of the heads with the most mass on the evidence, the strongest first."""
    mass = np.asarray(model["shares"]["evidence"])
    order = np.argsort(-mass, axis=None, kind="stable")[: max(1, round(TOP_SHARE * mass.size))]
    return [(int(index) // mass.shape[1], int(index) % mass.shape[1]) for index in order]


def mass_by_depth(model: dict, heads: Sequence[tuple[int, int]]) -> dict:
    """Mass on the evidence in bins of equal width over its depth, of all heads and of `heads`, and its deviation.

    Returns:
        "bins": low, high, n, all_heads, evidence_heads (None where n is 0); "deviation_all_heads" and
        "deviation_evidence_heads": standard deviation over the bins that hold a prompt, divided by their mean.
    """
    depth = np.array([prompt["depth"] for prompt in model["prompts"]])
    mass = np.array([prompt["evidence_by_head"] for prompt in model["prompts"]])
    curves = {"all_heads": mass.mean(axis=(1, 2)), "evidence_heads": np.mean([mass[:, a, b] for a, b in heads], axis=0)}
    which = np.minimum((depth * DEPTH_BINS).astype(int), DEPTH_BINS - 1)
    bins = []
    for index in range(DEPTH_BINS):
        held = which == index
        means = {name: round(float(curve[held].mean()), 6) if held.any() else None for name, curve in curves.items()}
        bins.append({"low": index / DEPTH_BINS, "high": (index + 1) / DEPTH_BINS, "n": int(held.sum()), **means})
    deviations = {}
    for name in curves:
        values = np.array([entry[name] for entry in bins if entry["n"]])
        deviations[f"deviation_{name}"] = round(float(values.std() / values.mean()), 6) if values.mean() else None
    return {"bins": bins, **deviations}


def run_study(
    models: Sequence[str],
    prepared: Path,
    settings: MassSettings,
    limit: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    bos: str = "auto",
    progress: Callable[[str, int], None] = lambda model, done: None,
) -> dict:
    """The whole study of one model, or of two with the first one's evidence heads.

    Raises:
        ValueError: prompts of another tokenizer, without evidence, or a model that is not read.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--num-samples {limit} must be at least 1")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU is visible to this process; use --device cpu")
    loaded = load_prepared(prepared)
    marked = [_marked(hf, loaded, limit, bos) for hf in models]  # before the first model runs
    entries = [
        study_model(hf, prompts, settings, dtype, device, lambda done, hf=hf: progress(hf, done))
        for hf, prompts in zip(models, marked, strict=True)
    ]
    heads = evidence_heads(entries[0])
    if any((entry["layers"], entry["heads"]) != (entries[0]["layers"], entries[0]["heads"]) for entry in entries):
        raise ValueError(f"--compare-with {models[-1]}: its layers and heads are not those of {models[0]}")
    return {
        "schema": SCHEMA,
        "prepared": {"path": str(prepared), **{name: loaded.manifest[name] for name in ("task", "length", "sha256")}},
        "settings": {**asdict(settings), "dtype": dtype, "device": device, "bos": bos},
        "evidence_heads": [list(head) for head in heads],
        "models": [{**entry, "by_depth": mass_by_depth(entry, heads)} for entry in entries],
    }
