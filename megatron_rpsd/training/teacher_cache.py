"""A teacher's likeliest tokens on disk, in the layout of Megatron's own cached distillation, written once, read often.

    DIR/cp{C}_dp{D}__{last iteration}.tar    _meta.json, then {iteration}.pt.zst: for every micro-batch of that rank
                                             values fp32, indices_low uint16 and bit_17 uint8 [L/cp, b, K],
                                             log_rest fp32 [L/cp, b], and tokens_crc32
    DIR/teacher_cache.json                   what it holds; written last, so that a folder without it is not whole

Files are named and written by `megatron.training.distillation`'s functions and read by its `TeacherTarDataset`, which
also deals them out where the data-parallel size changes by a whole factor. Three things are put beside Megatron's:

- `log_rest`, the probability of all other tokens, in logarithms. Megatron takes 1 - sum of K in fp32, which loses a
  confident teacher's rest, and with it the reverse KL.
- `tokens_crc32` of each micro-batch's whole sequences: Megatron compares names and sizes of the data, not the data.
- Ids of more than 17 bits: `bit_17` holds id >> 16 as a byte, which Megatron's reader adds up all the same; Qwen's
  vocabulary has 151,936 tokens. Its writer would refuse them.

Megatron's `LogitsSaverHooks` hooks the output layer's forward, which the fused loss never calls, and flushes with an
asynchronous checkpoint; its `CachedLogitsKDLoss` wants whole student logits. Neither fits, so those two are left out.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import io
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args
from megatron.training.distillation.cached_logits_loss import TeacherTarDataset
from megatron.training.distillation.logits_saver import LogitsSaverHooks
from megatron.training.distillation.utils_logits import (
    batched_tar_filename,
    compute_dataset_hash,
    unpack_indices,
)
from torch import Tensor

from megatron_rpsd.training.distillation import KeptReading
from megatron_rpsd.training.forward_step import ForwardStep
from megatron_rpsd.training.teacher import LiveTeacher, check_vocabulary, teacher_from_args
from megatron_rpsd.training.token_identity import TokenIdentity, check_same_tokens, token_identity

MANIFEST = "teacher_cache.json"

# Arguments of a run that decide which tokens stand where in the cache, by the manifest's key.
_SAME = (
    "seq_length", "micro_batch_size", "global_batch_size", "context_parallel_size", "reset_attention_mask",
    "reset_position_ids", "distill_temperature",
)  # fmt: skip


@dataclass(frozen=True)
class KeptMicroBatch:
    """One micro-batch on one context-parallel rank.

    Attributes:
        log_probs: fp32 [L/cp, b, K]; tokens: int64 [L/cp, b, K]; log_rest: fp32 [L/cp, b]; see `KeptReading`.
        checksum: of its whole sequences.
        iteration: the step that reads it.
    """

    log_probs: Tensor
    tokens: Tensor
    log_rest: Tensor
    checksum: int
    iteration: int


def tokens_checksum(sample: Mapping[str, Tensor]) -> int:
    """CRC-32 of a micro-batch's tokens [b, L]."""
    return zlib.crc32(sample["tokens"].to(torch.int64).contiguous().numpy().tobytes())


def require_compression() -> None:
    """Raise ValueError where Megatron's layout cannot be read or written."""
    if importlib.util.find_spec("zstandard") is None:
        raise ValueError(
            "--teacher-cache and tools/cache_teacher.py need the package zstandard, which Megatron's cached "
            "distillation compresses with: pip install zstandard"
        )


def check_cacheable(args: argparse.Namespace) -> None:
    """Refuse runs whose steps do not read the data's windows one by one, in one order.

    Raises:
        ValueError: one line with the flag.
    """
    require_compression()
    for name in ("length_mix", "rope_phases", "rampup_batch_size", "step_batch_size_schedule"):
        if getattr(args, name, None):
            raise ValueError(
                f"--{name.replace('_', '-')} changes what a step reads as the run goes on; a teacher's cache holds "
                "whole windows: use a live teacher (--teacher-checkpoint), or leave it out"
            )


def contents(args: argparse.Namespace, identity: TokenIdentity, iterations: int) -> dict:
    """The manifest of the cache that the settled arguments describe."""
    digest, identifiers = compute_dataset_hash()
    return {
        "teacher": args.teacher_checkpoint,
        "tokens": identity.digest,
        "tokenizer": identity.source,
        "vocab_size": args.vocab_size,
        "top_k": args.distill_top_k,
        "iterations": iterations,
        "data_parallel_size": args.data_parallel_size,
        "dataset_hash": digest,
        "dataset": identifiers,
        **{name: getattr(args, name) for name in _SAME},
    }


class CacheWriter:
    """Writes this rank's share; only tensor-parallel rank 0 does.

    Args:
        folder: exists.
        manifest: from `contents`.
        iterations_per_file: that many are held in memory.
    """

    def __init__(self, folder: Path, manifest: dict, iterations_per_file: int) -> None:
        self.folder, self.iterations_per_file = folder, iterations_per_file
        saver = {"k": manifest["top_k"], "p": None, "min_k": 1, "save_dtype": "fp32"}
        meta = {"hash": manifest["dataset_hash"], "identifiers": manifest["dataset"], "saver": saver}
        self._meta = json.dumps(meta).encode()
        self._pending: collections.OrderedDict[int, bytes] = collections.OrderedDict()

    def add(self, iteration: int, kept: list[KeptMicroBatch]) -> None:
        """One iteration's micro-batches, in their order."""
        if parallel_state.get_tensor_model_parallel_rank():
            return
        buffer = io.BytesIO()
        payload = {
            "values": [part.log_probs for part in kept],
            "indices_low": [(part.tokens & 0xFFFF).to(torch.uint16) for part in kept],
            "bit_17": [(part.tokens >> 16).to(torch.uint8) for part in kept],
            "log_rest": [part.log_rest for part in kept],
            "tokens_crc32": [part.checksum for part in kept],
        }
        torch.save(payload, buffer)
        self._pending[iteration] = buffer.getvalue()
        if len(self._pending) == self.iterations_per_file:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        if not self._pending:
            return
        cp, dp = parallel_state.get_context_parallel_rank(), parallel_state.get_data_parallel_rank()
        name = batched_tar_filename(cp, dp, max(self._pending))
        LogitsSaverHooks._write_batched_tar(str(self.folder / name), self._pending, self._meta)
        self._pending.clear()


class _Stream(TeacherTarDataset):
    """Megatron's reader of this rank's files, whose micro-batches carry what is put beside Megatron's."""

    def _decode_entry(self, entry):
        payload = _decompressed(entry.data)
        tokens = [unpack_indices(*parts) for parts in zip(payload["indices_low"], payload["bit_17"], strict=True)]
        kept = [
            KeptMicroBatch(*parts, iteration=entry.iteration)
            for parts in zip(payload["values"], tokens, payload["log_rest"], payload["tokens_crc32"], strict=True)
        ]
        return entry.iteration, kept, tokens


def _decompressed(data: bytes) -> dict:
    import zstandard

    return torch.load(io.BytesIO(zstandard.ZstdDecompressor().decompress(data)), weights_only=True)


class TeacherCache:
    """The source of a run's teacher: reads what `CacheWriter` wrote, micro-batch by micro-batch, on the last stage."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._stream, self._kept, self._next = None, [], 0

    @classmethod
    def open(cls, args: argparse.Namespace) -> TeacherCache:
        """The cache of --teacher-cache; settles --distill-top-k.

        Raises:
            ValueError: no whole cache, or one of other data, another layout, tokenizer or K.
        """
        check_cacheable(args)
        source = f"--teacher-cache {args.teacher_cache}"
        path = Path(args.teacher_cache) / MANIFEST
        if not path.is_file():
            raise ValueError(
                f"{source} holds no {MANIFEST}, so it is no whole cache: write one with tools/cache_teacher.py"
            )
        held = json.loads(path.read_text(encoding="utf-8"))
        check_same_tokens(
            token_identity(args.tokenizer_type, args.tokenizer_model), TokenIdentity(held["tokens"], held["tokenizer"])
        )
        _check_contents(args, source, held)
        args.distill_top_k = held["top_k"]
        check_vocabulary(args, held["vocab_size"], source)
        return cls(args.teacher_cache)

    def read(self, step: ForwardStep, student, sample: Mapping[str, Tensor]) -> KeptReading | None:
        """Of the step's next micro-batch; None on other stages, and in evaluation, of which nothing was kept."""
        if not student.training or not get_attr_wrapped_model(student, "post_process"):
            return None
        kept = self._following(get_args().curr_iteration)
        if kept.checksum != tokens_checksum(sample):
            raise ValueError(
                f"--teacher-cache {self.folder}: iteration {kept.iteration} was written of other tokens than this run "
                "reads: write it anew with the run's own flags and data"
            )
        device = torch.cuda.current_device()
        parts = (part.flatten(0, 1).to(device) for part in (kept.log_probs, kept.tokens, kept.log_rest))
        return KeptReading(*parts)

    def _following(self, iteration: int) -> KeptMicroBatch:
        if self._stream is None:
            ranks = parallel_state.get_context_parallel_rank(), parallel_state.get_data_parallel_rank()
            size = parallel_state.get_data_parallel_world_size()
            self._stream = iter(_Stream(self.folder, *ranks, size, start_iteration=iteration, decode_threads=2))
        while not self._kept or self._kept[0].iteration < iteration:  # steps may be skipped, but none is read twice
            self._kept, self._next = next(self._stream, ([], 0))[0], 0
            if not self._kept:
                break
        if not self._kept or self._kept[0].iteration != iteration:
            raise ValueError(
                f"--teacher-cache {self.folder} holds nothing of iteration {iteration}: write it anew with "
                "tools/cache_teacher.py"
            )
        kept = self._kept[self._next]
        self._next = (self._next + 1) % len(self._kept)  # Megatron may run a step again
        return kept


def _check_contents(args: argparse.Namespace, source: str, held: dict) -> None:
    digest, identifiers = compute_dataset_hash()
    if held["dataset_hash"] != digest:
        other = [f"{name} {held['dataset'].get(name)} and {value}" for name, value in identifiers.items()
                 if held["dataset"].get(name) != value]  # fmt: skip
        raise ValueError(
            f"{source} was written of another stream of samples: {', '.join(other)} (its and this run's); write it "
            "anew with the run's own flags"
        )
    for name in _SAME:
        if held[name] != getattr(args, name):
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{source} was written with {flag} {held[name]}, this run has {getattr(args, name)}: write it anew "
                f"with the run's own flags, or give {flag} {held[name]}"
            )
    if args.distill_top_k not in (None, held["top_k"]):
        raise ValueError(
            f"--distill-top-k {args.distill_top_k}: {source} holds the {held['top_k']} likeliest tokens; leave it out"
        )
    written, reading = held["data_parallel_size"], args.data_parallel_size
    if max(written, reading) % min(written, reading):
        raise ValueError(
            f"{source} was written by {written} data-parallel ranks, this run has {reading}: one must divide the other"
        )


def source_from_args(args: argparse.Namespace) -> LiveTeacher | TeacherCache | None:
    """Where the run's teacher is read; None without one.

    Raises:
        ValueError: as `teacher_from_args` and `TeacherCache.open`.
    """
    if args.teacher_checkpoint is not None:
        return teacher_from_args(args)
    return None if args.teacher_cache is None else TeacherCache.open(args)
