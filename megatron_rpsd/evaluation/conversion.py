"""What `tools/convert_checkpoint.py` runs: import, export, and verify with its table."""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from megatron_rpsd.checkpoint import convert
from megatron_rpsd.evaluation.logits import LogitsComparison, compare_logits, megatron_logits, transformers_logits

LONGEST_PROMPT = 1024
"""Tokens of a prompt that are compared; whole logits of both models are in memory."""


def _dtype(args: argparse.Namespace) -> torch.dtype | None:
    return None if args.dtype is None else getattr(torch, args.dtype)


def run_import(args: argparse.Namespace) -> tuple[str, int]:
    """Run `import`; returns the line to print and the exit code."""
    layout = convert.ImportLayout(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.decoder_first_pipeline_num_layers,
        args.decoder_last_pipeline_num_layers,
    )
    parameters = convert.import_hf(args.hf, args.output, args.device, layout, _dtype(args))
    return f"imported {parameters:,} parameters to {args.output}", 0


def run_export(args: argparse.Namespace) -> tuple[str, int]:
    """Run `export`; returns the line to print and the exit code."""
    convert.export_hf(
        args.checkpoint, args.hf_reference, args.output, args.max_shard_gigabytes * 1e9,
        iteration=args.iteration, dtype=_dtype(args), yarn_factor=args.yarn_factor,
    )  # fmt: skip
    return f"exported {args.checkpoint} to {args.output}", 0


def run_verify(args: argparse.Namespace) -> tuple[str, int]:
    """Run `verify`: a table of what was compared, and exit code 1 when something differs."""
    if args.iteration is not None and args.checkpoint is None:
        raise ValueError(f"--iteration {args.iteration} names a checkpoint of a run: give --checkpoint")
    if args.checkpoint is not None:
        compared, different = convert.different_tensors(args.hf, args.checkpoint, args.iteration, _dtype(args))
    else:
        compared, different = convert.different_folders(args.hf, args.hf_exported, _dtype(args))
    rows = [("tensors compared", str(compared)), ("tensors that differ, bit by bit", str(len(different)))]
    rows += [("  first of them", different[0])] if different else []
    agree = True
    if args.prompt is not None:
        tokens = prompt_tokens(args.hf, args.prompt)
        logits = prompt_logits(args, tokens)
        agree = logits.agreement == 1.0
        rows += [
            ("prompt, tokens", str(len(tokens))),
            ("next tokens that agree", f"{logits.agreement:.2%}"),
            ("largest difference of a logit", f"{logits.max_difference:.3g}"),
            ("largest logit", f"{logits.largest_logit:.3g}"),
        ]
    width = max(len(name) for name, _ in rows)
    table = "\n".join(f"{name:{width}s}  {value}" for name, value in rows)
    equal = agree and not different
    return f"{table}\n{args.hf}: {'equal' if equal else 'DIFFERENT'}, verified", 0 if equal else 1


def prompt_tokens(hf: str | Path, prompt: str) -> np.ndarray:
    """Token ids int64 [s] of a text by the folder's tokenizer, at most `LONGEST_PROMPT`.

    Raises:
        ValueError: no tokenizer, or an empty prompt.
    """
    from transformers import AutoTokenizer

    if not (Path(hf) / "tokenizer_config.json").exists():
        raise ValueError(f"--prompt needs a tokenizer, and --hf {hf} has no tokenizer_config.json")
    tokens = AutoTokenizer.from_pretrained(str(hf))(prompt)["input_ids"][:LONGEST_PROMPT]
    if not tokens:
        raise ValueError("--prompt is empty; give a text of a few hundred tokens")
    return np.asarray(tokens, dtype=np.int64)


def prompt_logits(args: argparse.Namespace, tokens: np.ndarray) -> LogitsComparison:
    """Logits of the other model against transformers' on --hf; each in a process of its own, one after the other."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        theirs = pool.submit(transformers_logits, args.hf, tokens).result()
        if args.checkpoint is None:
            ours = pool.submit(transformers_logits, args.hf_exported, tokens).result()
        else:
            ours = pool.submit(megatron_logits, args.checkpoint, args.hf, tokens, args.iteration).result()
    return compare_logits(ours, theirs)
