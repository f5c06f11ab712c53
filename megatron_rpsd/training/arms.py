"""The arms of the paper's comparison: which options belong to which, their defaults, and the sampler they describe.

An option without a typed value is None until `settle_arm` completes it, so that what was typed can be told from what
is the default: an option that the chosen arm would not read is refused rather than ignored. --rpsd-seed and how splits
are drawn (--rpsd-split-sampling, --rpsd-split-granule) are settings of a comparison, which all of its arms may carry.
"""

from __future__ import annotations

import argparse
import math

from megatron_rpsd.positions import (
    EXACT_FP32_INTEGERS,
    PERTURBATIONS,
    POSE_CHUNKS,
    SPLIT_SAMPLINGS,
    SPLIT_VIEWS,
    StepShape,
    ViewSampler,
)
from megatron_rpsd.training.batch import TWO_VIEWS
from megatron_rpsd.training.distillation import DISTILL_DEFAULTS, DISTILL_OPTIONS, DISTILLING
from megatron_rpsd.training.forward_step import EXECUTIONS

OBJECTIVES = ("standard", "pose", *TWO_VIEWS, *DISTILLING)
POSE_SAMPLINGS = ("skip", "chunks")

_DEFAULTS = {
    "rpsd_perturbation": "skip",
    "rpsd_kl_weight": 1.0,
    "rpsd_kl_direction": "reverse-kl",
    "rpsd_kl_temperature": 1.0,
    "rpsd_execution": "shared-prefix",
    "rpsd_apply_probability": 1.0,
    "rpsd_split_density": 0.0,
    "rpsd_split_range": (0.0, 1.0),
    "rpsd_permutation_chunks": 8,
    "pose_sampling": "skip",
    "pose_chunks": 2,
    "longce_context": 4096,
    "longce_stride": 1024,
    "longce_max_weight": 5.0,
    **DISTILL_DEFAULTS,
}


def add_arm_arguments(group) -> None:
    """Add the flags that choose and shape an arm to the parser's group."""
    group.add_argument(
        "--objective", choices=OBJECTIVES, default="rpsd",
        help="standard: CLM; pose: CLM on the perturbed view alone; rpsd: CLM plus the views' reverse KL; hard-label: "
        "CLM plus the perturbed view's CLM over the suffix; distill: a teacher's divergence, and CLM by weight; "
        "distill-rpsd: that plus rpsd's KL on the student.",
    )  # fmt: skip
    group.add_argument(
        "--rpsd-kl-weight", type=float, default=None,
        help="Weight of the perturbed view's loss (the KL; hard-label: its CLM) beside the CLM loss. Default: 1.",
    )  # fmt: skip
    group.add_argument(
        "--rpsd-execution", choices=EXECUTIONS, default=None,
        help="shared-prefix (default): run the perturbed view from its split on; full: a whole second view. The same "
        "gradient.",
    )  # fmt: skip
    group.add_argument(
        "--rpsd-apply-probability", type=float, default=None,
        help="p: take the second view on a share p of the micro-steps, its KL weighing 1 / p. Unbiased, cheaper, "
        "noisier. Default: 1.",
    )  # fmt: skip
    group.add_argument(
        "--pose-sampling", choices=POSE_SAMPLINGS, default=None,
        help="Positions of --objective pose. skip (default): RPSD's perturbed view; chunks: the original PoSE's (arXiv "
        "2309.10400), N chunks with skips that never fall; content stays contiguous.",
    )  # fmt: skip
    group.add_argument("--pose-chunks", type=int, default=None, help="N of --pose-sampling chunks. Default: 2.")
    group.add_argument(
        "--pose-target-length", type=int, default=None,
        help="L_t of --pose-sampling chunks: every position stays below it. Default: 2 x --seq-length, the range that "
        "skip views reach with their default --rpsd-max-shift.",
    )  # fmt: skip
    group.add_argument(
        "--longce", action="store_true",
        help="Weigh the tokens of the CLM by what the long context does for them (LongCE, arXiv 2410.23771), with "
        "--objective standard or rpsd.",
    )  # fmt: skip
    group.add_argument(
        "--longce-context", type=int, default=None, help="K: tokens that a short reading sees at least. Default: 4096."
    )
    group.add_argument(
        "--longce-stride", type=int, default=None, help="Tokens that a short reading scores. Default: 1024."
    )
    group.add_argument("--longce-max-weight", type=float, default=None, help="Largest weight. Default: 5.")
    _add_view_arguments(group)


def _add_view_arguments(group) -> None:
    group.add_argument(
        "--rpsd-perturbation", choices=PERTURBATIONS, default=None,
        help="How the perturbed view's positions differ: skip (default), cyclic, or one of the ablations.",
    )  # fmt: skip
    group.add_argument(
        "--rpsd-max-shift", type=int, default=None, help="Y, largest shift of the skip view. Default: --seq-length."
    )
    group.add_argument(
        "--rpsd-permutation-chunks", type=int, default=None,
        help="C: chunks that --rpsd-perturbation chunk-permutation puts into another order. Default: 8.",
    )  # fmt: skip
    group.add_argument("--rpsd-seed", type=int, default=None, help="Seed of the views. Default: --seed.")
    group.add_argument(
        "--rpsd-split-sampling", choices=SPLIT_SAMPLINGS, default=None,
        help="stratified (default): one split for all data-parallel ranks of a micro-step, spread over the micro-steps "
        "of a step; independent: every micro-batch draws its own.",
    )  # fmt: skip
    group.add_argument(
        "--rpsd-split-granule", type=int, default=None,
        help="Splits are rounded down to multiples of this many tokens. Default: 2 x CP x TP x 16, at most about "
        "L / 32.",
    )  # fmt: skip
    group.add_argument(
        "--rpsd-split-range", type=float, nargs=2, metavar=("LOW", "HIGH"), default=None,
        help="Draw skip's splits from LOW <= s/L < HIGH, fractions in [0, 1]; the KL is not reweighed. Default: 0 1.",
    )  # fmt: skip
    group.add_argument(
        "--rpsd-split-density", type=float, default=None,
        help="a in [0, 1): draw splits with density 1 - a + 2 a s/L (short suffixes more often), the KL weighing its "
        "inverse. Unbiased, cheaper, noisier. Default: 0.",
    )  # fmt: skip


def settle_arm(args: argparse.Namespace) -> None:
    """Refuse options of other arms, then fill in the arm's defaults.

    Raises:
        ValueError: an option was typed that the chosen arm does not read.
    """
    typed = {name: value for name, value in vars(args).items() if value is not None}
    for name, default in _DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    for name, (owner, applies) in _owners(args).items():
        if name in typed and not applies:
            raise ValueError(
                f"{_flag(name)} {_written(typed[name])} belongs to {owner}; this run is {_arm(args)}: leave it out"
            )
    args.rpsd_split_range = tuple(args.rpsd_split_range)
    if args.rpsd_split_sampling is None:  # where nothing is drawn, nothing needs a global batch of one size
        drawn = _has_perturbed_view(args) or args.length_mix
        args.rpsd_split_sampling = "stratified" if drawn else "independent"
    args.rpsd_follows_length = [name for name in ("rpsd_max_shift", "pose_target_length") if name not in typed]
    if args.rpsd_max_shift is None:
        args.rpsd_max_shift = args.seq_length
    if args.pose_target_length is None and args.seq_length:
        args.pose_target_length = 2 * args.seq_length


def check_arm(args: argparse.Namespace) -> None:
    """Refuse values out of range.

    Raises:
        ValueError: one line with the flag, the value and the arithmetic.
    """
    if args.pose_target_length > EXACT_FP32_INTEGERS:
        raise ValueError(
            f"--pose-target-length {args.pose_target_length} must be at most 2**24 = {EXACT_FP32_INTEGERS}, where fp32 "
            "stops holding every position"
        )
    sampler_from_args(args, StepShape())
    if args.longce:
        _check_longce(args)


def _check_longce(args: argparse.Namespace) -> None:
    if args.objective not in ("standard", "rpsd"):
        raise ValueError(f"--longce weighs the CLM of --objective standard or rpsd; this run is {_arm(args)}")
    if args.pipeline_model_parallel_size > 1:
        raise ValueError(
            f"--longce reads windows before each micro-batch, which a pipeline cannot: --pipeline-model-parallel-size "
            f"{args.pipeline_model_parallel_size} must be 1; split the model by tensor and context parallelism"
        )
    if not 1 <= args.longce_context < args.seq_length:
        raise ValueError(
            f"--longce-context {args.longce_context} must be at least 1 and shorter than --seq-length {args.seq_length}"
        )
    if args.longce_stride < 1 or not args.longce_max_weight > 0:
        raise ValueError(
            f"--longce-stride {args.longce_stride} must be at least 1 and --longce-max-weight "
            f"{args.longce_max_weight:g} positive"
        )
    unit = suffix_unit(args)
    width = args.longce_context + args.longce_stride
    if width % unit:
        raise ValueError(
            f"--longce-context {args.longce_context} + --longce-stride {args.longce_stride} = {width} tokens of a "
            f"window must divide by {unit_in_words(args)} = {unit}; the next width is "
            f"{-(-width // unit) * unit}"
        )


def suffix_unit(args: argparse.Namespace) -> int:
    """Tokens by which a sequence of its own must divide: 2 x CP chunks, each shared out under sequence parallelism; in
    FP8 so that a rank's share divides by what its matrix products take.
    """
    cp, tp = args.context_parallel_size, args.tensor_model_parallel_size
    shares = tp if args.sequence_parallel else 1
    return math.lcm((2 * cp if cp > 1 else 1) * shares, cp * shares * fp8_multiple(args))


def unit_in_words(args: argparse.Namespace) -> str:
    """What `suffix_unit` multiplies."""
    if (multiple := fp8_multiple(args)) > 1:
        return f"{multiple} x CP (x TP under sequence parallelism, FP8)"
    return "2 x CP (x TP under sequence parallelism)"


def fp8_multiple(args: argparse.Namespace) -> int:
    """Tokens by which a rank's share must divide for FP8 matrix products, as Megatron pads them; 1 without FP8.

    Transformer Engine itself asks for 8 in the product of a tensor's leading sizes; the transposed operand of the
    weight's gradient asks for 16, MXFP8's blocks for 32.
    """
    if not getattr(args, "fp8", None):
        return 1
    return 32 if args.fp8_recipe == "mxfp8" else 16


def granule_unit(args: argparse.Namespace) -> int:
    """The finest default granule: 2 x CP x TP, and what FP8 asks for."""
    unit = 2 * args.context_parallel_size * args.tensor_model_parallel_size
    return math.lcm(unit, suffix_unit(args)) if fp8_multiple(args) > 1 else unit


def default_granule(args: argparse.Namespace, length: int) -> int:
    """2 x CP x TP x 16 tokens, which keeps kernels' shapes even; less where sequences are short, so that splits stay
    many. A resumed run keeps the unit of its first start (`training.resuming`).
    """
    drawn_for = getattr(args, "rpsd_drawn_for", None)
    unit = drawn_for[2] if drawn_for else granule_unit(args)
    return min(max(unit, min(16 * unit, length // 32 // unit * unit)), max(length, 1))


def sampler_from_args(args: argparse.Namespace, step: StepShape, length: int | None = None) -> ViewSampler:
    """The sampler of the arm's views of sequences of `length` tokens, --seq-length by default.

    On shorter sequences, ranges that were typed stay, default ones follow the length, and splits are at least as fine
    as that length's default.

    Raises:
        ValueError: as `ViewSampler`.
    """
    length = args.seq_length if length is None else length
    granule, shorter = args.rpsd_split_granule, length < args.seq_length
    follows = args.rpsd_follows_length if shorter else []
    return ViewSampler(
        seed=args.rpsd_seed,
        perturbation=POSE_CHUNKS if _poses_chunks(args) else args.rpsd_perturbation,
        length=length,
        max_shift=None if "rpsd_max_shift" in follows else args.rpsd_max_shift,
        granule=min(granule, default_granule(args, length)) if shorter else granule,
        split_sampling=args.rpsd_split_sampling,
        step=step,
        apply_probability=args.rpsd_apply_probability,
        split_density=args.rpsd_split_density,
        split_range=args.rpsd_split_range,
        permutation_chunks=args.rpsd_permutation_chunks,
        pose_chunks=args.pose_chunks,
        target_length=None if "pose_target_length" in follows else args.pose_target_length,
    )


def views_of(args: argparse.Namespace) -> str:
    """The objective whose views the student reads: --objective itself, or the one that distillation stands on."""
    return DISTILLING.get(args.objective, args.objective)


def _poses_chunks(args: argparse.Namespace) -> bool:
    return args.objective == "pose" and args.pose_sampling == "chunks"


def _has_perturbed_view(args: argparse.Namespace) -> bool:
    """Whether the arm reads samples under one of RPSD's perturbations."""
    return views_of(args) != "standard" and not _poses_chunks(args)


def _owners(args: argparse.Namespace) -> dict[str, tuple[str, bool]]:
    """Option -> (whose it is, whether the arm reads it)."""
    kind, views = args.rpsd_perturbation, _has_perturbed_view(args)
    paired = (" or ".join(f"--objective {name}" for name in TWO_VIEWS), views_of(args) in TWO_VIEWS)
    rpsd = ("--objective rpsd or distill-rpsd", views_of(args) == "rpsd")
    distilling = (" or ".join(f"--objective {name}" for name in DISTILLING), args.objective in DISTILLING)
    perturbed = ("an objective with a perturbed view", views)
    skip = ("--rpsd-perturbation skip", views and kind == "skip")
    chunks = ("--objective pose --pose-sampling chunks", _poses_chunks(args))
    longce = ("--longce", args.longce)
    split = (f"--rpsd-perturbation {' or '.join(SPLIT_VIEWS)} under {paired[0]}", paired[1] and kind in SPLIT_VIEWS)
    return {
        "rpsd_kl_weight": paired,
        "rpsd_kl_direction": rpsd,
        "rpsd_kl_temperature": rpsd,
        "rpsd_kl_top_k": rpsd,
        "rpsd_execution": paired,
        "rpsd_apply_probability": paired,
        "rpsd_split_density": split,
        "rpsd_perturbation": perturbed,
        "rpsd_max_shift": skip,
        "rpsd_split_range": skip,
        "rpsd_permutation_chunks": ("--rpsd-perturbation chunk-permutation", views and kind == "chunk-permutation"),
        "pose_sampling": ("--objective pose", args.objective == "pose"),
        "pose_chunks": chunks,
        "pose_target_length": chunks,
        "longce_context": longce,
        "longce_stride": longce,
        "longce_max_weight": longce,
        **dict.fromkeys(DISTILL_OPTIONS, distilling),
    }


def _arm(args: argparse.Namespace) -> str:
    """The flags that choose the arm."""
    if views_of(args) == "standard":
        return f"--objective {args.objective}"
    if args.objective == "pose" and args.pose_sampling == "chunks":
        return "--objective pose --pose-sampling chunks"
    return f"--objective {args.objective} --rpsd-perturbation {args.rpsd_perturbation}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _written(value) -> str:
    return " ".join(f"{part:g}" for part in value) if isinstance(value, list | tuple) else str(value)
