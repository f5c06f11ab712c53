"""`--objective distill`: a student learns from the logits of a separate, frozen teacher (arXiv 2604.06070).

    L = mean over kept tokens of [ ce_weight x CE_i + kl_weight x D(student_i || teacher_i) ]

on the standard view, D by default the forward KL, sum_v q (log q - log p) with q the teacher. `distill-rpsd` adds
RPSD's term on the student (arXiv 2604.14339): --rpsd-kl-weight x KL(perturbed || standard, detached), mean over the
suffix. The teacher has its own layers, hidden size and RoPE; student and teacher share what a column of the logits
means, so tokenizer and vocabulary must agree.

A teacher is read live (`training.teacher`), or beforehand into its likeliest tokens (`training.teacher_cache`).
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from dataclasses import dataclass

from torch import Tensor

from megatron_rpsd.loss import DIRECTIONS, Divergence, KnownTopK, Teacher
from megatron_rpsd.parallel import VocabularyShard

DISTILLING = {"distill": "standard", "distill-rpsd": "rpsd"}
"""Objectives with a teacher, and the objective whose views the student reads beside it."""

TEACHER_DTYPES = ("fp32", "bf16", "fp8")

DISTILL_DEFAULTS = {
    "distill_kl_weight": 1.0,
    "distill_ce_weight": 0.0,
    "distill_direction": "forward-kl",
    "distill_temperature": 1.0,
}
DISTILL_OPTIONS = (
    *DISTILL_DEFAULTS, "distill_top_k", "teacher_checkpoint", "teacher_cache", "teacher_dtype", "teacher_tokenizer",
    "teacher_document_mask",
)  # fmt: skip
"""Options that no other objective reads."""


@dataclass(frozen=True)
class Distillation:
    """What of the teacher enters the loss.

    Attributes:
        kl_weight: of the divergence from the teacher.
        ce_weight: of the labels' cross-entropy.
        divergence: of the student from the teacher, its T^2 included.
    """

    kl_weight: float = 1.0
    ce_weight: float = 0.0
    divergence: Divergence = Divergence("forward-kl")


@dataclass(frozen=True)
class TeacherReading:
    """A live teacher's reading of this rank's standard tokens, n = L/cp x b.

    Attributes:
        hidden: [n, h'], whole along tensor parallelism.
        weight: [v/tp, h'], this rank's rows of its output layer.
        shard: the columns that they are.
        logit_scale: multiplies its logits.
    """

    hidden: Tensor
    weight: Tensor
    shard: VocabularyShard
    logit_scale: float = 1.0

    def compared(self, divergence: Divergence, weights: Tensor) -> Teacher:
        """For the fused loss, with weights [n]."""
        return Teacher(self.hidden, self.weight, divergence, weights, self.logit_scale)


@dataclass(frozen=True)
class KeptReading:
    """What was kept of a teacher's reading of this rank's standard tokens; as `KnownTopK`.

    Attributes:
        log_probs: [n, K].
        tokens: int64 [n, K].
        log_rest: [n].
    """

    log_probs: Tensor
    tokens: Tensor
    log_rest: Tensor

    def compared(self, divergence: Divergence, weights: Tensor) -> KnownTopK:
        """For the fused loss, with weights [n]."""
        return KnownTopK(self.log_probs, self.tokens, self.log_rest, divergence, weights)


def add_distillation_arguments(group) -> None:
    """Add the flags to the parser's group."""
    group.add_argument(
        "--teacher-checkpoint", type=str, default=None, metavar="DIR",
        help="The frozen teacher of --objective distill: a Megatron checkpoint as tools/convert_checkpoint.py import "
        "or a run writes it, of any size, with the student's tokenizer.",
    )  # fmt: skip
    group.add_argument(
        "--teacher-cache", type=str, default=None, metavar="DIR",
        help="In place of --teacher-checkpoint: its likeliest tokens, written by tools/cache_teacher.py. The only way "
        "under pipeline parallelism.",
    )  # fmt: skip
    group.add_argument(
        "--teacher-dtype", choices=TEACHER_DTYPES, default=None,
        help="Precision of the teacher's weights and products; fp8 needs Transformer Engine. Default: the run's.",
    )  # fmt: skip
    group.add_argument(
        "--teacher-tokenizer", type=str, default=None, metavar="DIR",
        help="Folder of the teacher's tokenizer.json, where its checkpoint names none that is here.",
    )  # fmt: skip
    group.add_argument(
        "--teacher-document-mask", action="store_true", default=None,
        help="Cut the teacher's attention at the borders of the documents packed into a window (an EOD token ends "
        "one), whatever the student's does: what it then says holds nothing of another document. Default: as the "
        "student's.",
    )  # fmt: skip
    group.add_argument(
        "--distill-kl-weight", type=float, default=None, help="Weight of the divergence from the teacher. Default: 1."
    )
    group.add_argument(
        "--distill-ce-weight", type=float, default=None, help="Weight of the labels' cross-entropy. Default: 0."
    )
    group.add_argument(
        "--distill-direction", choices=DIRECTIONS, default=None,
        help="Divergence of the student p from the teacher q: KL(q || p) (forward-kl, default), KL(p || q), or JSD.",
    )  # fmt: skip
    group.add_argument(
        "--distill-temperature", type=float, default=None, help="T: both logits / T, the divergence x T^2. Default: 1."
    )
    group.add_argument(
        "--distill-top-k", type=int, default=None,
        help="Compare the teacher's K likeliest tokens and all others as one. Default: the whole vocabulary, or the "
        "K of --teacher-cache.",
    )  # fmt: skip


def check_distillation(args: argparse.Namespace) -> None:
    """Refuse what cannot run, from the flags alone.

    Raises:
        ValueError: one line with the flag, the value and the way out.
    """
    if args.objective not in DISTILLING:
        return
    _check_sources(args)
    for name in ("distill_kl_weight", "distill_ce_weight"):
        value = getattr(args, name)
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: a weight must be a finite number of at least 0")
    if not args.distill_kl_weight and not args.distill_ce_weight:
        raise ValueError(
            "--distill-kl-weight 0 --distill-ce-weight 0: nothing of the standard view would be learnt; give one of "
            "them a weight above 0"
        )
    if not math.isfinite(args.distill_temperature) or args.distill_temperature <= 0:
        raise ValueError(f"--distill-temperature {args.distill_temperature} must be a positive number")
    if args.distill_top_k is not None and args.distill_top_k < 1:
        raise ValueError(f"--distill-top-k {args.distill_top_k} must be at least 1")
    if args.loss_implementation != "fused":
        raise ValueError(
            f"--loss-implementation {args.loss_implementation} has no teacher: use fused with --objective distill"
        )
    if args.teacher_dtype == "fp8" and importlib.util.find_spec("transformer_engine") is None:
        raise ValueError(
            "--teacher-dtype fp8 needs Transformer Engine, which is not installed: install it, or use bf16"
        )


def _check_sources(args: argparse.Namespace) -> None:
    given = [flag for flag in ("teacher_checkpoint", "teacher_cache") if getattr(args, flag) is not None]
    if len(given) != 1:
        raise ValueError(
            f"--objective {args.objective} needs a teacher from one place: give --teacher-checkpoint DIR, or "
            "--teacher-cache DIR with what tools/cache_teacher.py kept of it"
        )
    pp = args.pipeline_model_parallel_size
    if args.teacher_checkpoint is not None and pp > 1:
        raise ValueError(
            f"--teacher-checkpoint with --pipeline-model-parallel-size {pp}: a live teacher runs beside a student of "
            "one stage; write its likeliest tokens with tools/cache_teacher.py and train with --teacher-cache DIR, or "
            "split the model by tensor and context parallelism"
        )
    if args.teacher_cache is None:
        return
    for name in ("teacher_dtype", "teacher_tokenizer", "teacher_document_mask"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} belongs to --teacher-checkpoint; --teacher-cache holds what the teacher "
                "said: leave it out"
            )


def distillation_from_args(args: argparse.Namespace) -> Distillation | None:
    """What the settled arguments describe; None without a teacher."""
    if args.objective not in DISTILLING:
        return None
    divergence = Divergence(args.distill_direction, args.distill_temperature, args.distill_top_k)
    return Distillation(args.distill_kl_weight, args.distill_ce_weight, divergence)
