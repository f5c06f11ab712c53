"""The engine that `--backend` names."""

from __future__ import annotations

import argparse
import json

from megatron_rpsd.evaluation.engines.base import Engine
from megatron_rpsd.evaluation.engines.model_facts import ModelFacts
from megatron_rpsd.evaluation.engines.names import BACKENDS, FORCING, LOCAL_MODEL
from megatron_rpsd.evaluation.engines.prompt_tokens import PromptTokens
from megatron_rpsd.evaluation.engines.reference import Blind, Oracle, RandomAnswers
from megatron_rpsd.evaluation.engines.replay import Replay

_NEEDS = {"openai": ("endpoint", "model"), "replay": ("predictions",)}
_ONLY_FOR = {
    "endpoint": ("openai",),
    "model": ("openai",),
    "concurrency": ("openai",),
    "timeout": ("openai",),
    "predictions": ("replay",),
    "predictions_order": ("replay",),
    "prefill_chunk": ("transformers",),
    "attention": ("transformers",),
    "device": ("transformers",),
    "batch_size": LOCAL_MODEL,
    "dtype": LOCAL_MODEL,
    "yarn_factor": LOCAL_MODEL,
    "vllm_options": ("vllm",),
}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_backend(args: argparse.Namespace) -> None:
    """ValueError for an unknown backend, one that lacks what it needs, or an option that it does not read."""
    kind, colon, _ = args.backend.partition(":")
    known = [backend.partition(":")[0] for backend in BACKENDS]
    if kind not in known or bool(colon) != (kind == "blind"):
        raise ValueError(f"--backend {args.backend}: the backends are {', '.join(BACKENDS)}")
    for name in _NEEDS.get(kind, ()):
        if getattr(args, name) is None:
            raise ValueError(f"--backend {kind} needs {' and '.join(map(_flag, _NEEDS[kind]))}")
    for name, backends in _ONLY_FOR.items():
        if getattr(args, name) is not None and kind not in backends:
            raise ValueError(f"{_flag(name)} is read by --backend {' and '.join(backends)}, not by {kind}")
    if kind in LOCAL_MODEL and args.hf is None:
        raise ValueError(f"--backend {kind} needs --hf, a Hugging Face model folder")
    if args.teacher_forced and kind not in FORCING:
        raise ValueError(f"--teacher-forced needs probabilities of a given answer: --backend {' or '.join(FORCING)}")


def _transformers(args: argparse.Namespace, facts: ModelFacts, tokens: PromptTokens, factor: float | None) -> Engine:
    import torch

    from megatron_rpsd.evaluation.engines.transformers_engine import TransformersEngine

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no GPU here; use --device cpu")
    return TransformersEngine(
        facts, tokens, factor, device, args.dtype or "auto", args.prefill_chunk, args.batch_size or 1,
        args.attention or "sdpa",
    )  # fmt: skip


def make_engine(
    args: argparse.Namespace,
    facts: ModelFacts | None,
    tokens: PromptTokens | None,
    factor: float | None,
    longest: int,
) -> Engine:
    """The engine, not loaded yet. `facts` is there for local models; `longest` length in tokens."""
    kind, _, rest = args.backend.partition(":")
    if kind == "transformers":
        return _transformers(args, facts, tokens, factor)
    if kind == "vllm":
        from megatron_rpsd.evaluation.engines.vllm_engine import VllmEngine

        more = {} if args.batch_size is None else {"batch_size": args.batch_size}
        options = _json_object("--vllm-options", args.vllm_options or "{}")
        return VllmEngine(facts, tokens, factor, longest, args.dtype or "auto", options=options, **more)
    if kind == "openai":
        from megatron_rpsd.evaluation.engines.endpoint import Endpoint

        return Endpoint(args.endpoint, args.model, tokens, args.concurrency or 4, args.timeout or 600.0)
    if kind == "replay":
        return Replay(args.predictions, args.predictions_order == "lines")
    if kind == "random":
        return RandomAnswers(args.seed)
    return Blind.parse(rest) if kind == "blind" else Oracle()


def _json_object(flag: str, text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"""{flag} {text}: give a JSON object such as '{{"tensor_parallel_size": 8}}'""")
    return value
