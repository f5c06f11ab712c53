"""Arms as command lines: what each settles on, and which options belong to another one."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from examples.arms.run import ARMS, FOLDER, arm_flags, read_flags
from megatron_rpsd.positions import POSE_CHUNKS, StepShape
from tests.chat_tokenizer import assistant, user, write_chats

LENGTH = 64
MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --vocab-size 97 --max-position-embeddings 64 "
    "--position-embedding-type rope --normalization RMSNorm --attention-dropout 0 --hidden-dropout 0 "
    f"--micro-batch-size 1 --global-batch-size 2 --lr 1e-3 --train-iters 10 --seq-length {LENGTH} --mock-data"
).split()


@pytest.fixture
def parsed(monkeypatch, tmp_path):
    """Arguments of a command line, completed and checked as training does, without starting anything."""
    from megatron.training.arguments import parse_args

    from megatron_rpsd.training import arguments

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def parse(*flags: str) -> argparse.Namespace:
        words = ["main", *MODEL, *flags]
        if "--sft" in flags:  # what mock data cannot stand in for
            words.remove("--mock-data")
            words += ["--data-path", str(write_chats(tmp_path / "chats.jsonl", [[user("a"), assistant("b")]]))]
        monkeypatch.setattr(sys, "argv", words)
        args = parse_args(arguments.add_rpsd_arguments)
        arguments._complete(args)
        arguments.check_arguments(args)
        return args

    return parse


EXPECTED = {
    "standard": ("standard", "skip"),
    "pose": ("pose", "skip"),
    "pose-chunks": ("pose", POSE_CHUNKS),
    "rpsd-skip": ("rpsd", "skip"),
    "rpsd-cyclic": ("rpsd", "cyclic"),
    "rpsd-nope": ("rpsd", "nope"),
    "rpsd-chunk-permutation": ("rpsd", "chunk-permutation"),
    "hard-label": ("hard-label", "skip"),
    "longce": ("standard", "skip"),
    "rpsd-longce": ("rpsd", "skip"),
    "rpsd-sft": ("rpsd", "skip"),
}
SHORT_WINDOWS = ["--longce-context", "24", "--longce-stride", "8"]  # the paper's are longer than these sequences


def test_every_arm_of_the_comparison_has_a_folder_and_no_other():
    assert set(ARMS) == set(EXPECTED)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_parses_and_means_what_it_says(arm: str, parsed):
    from megatron_rpsd.training.arms import sampler_from_args

    args = parsed(*arm_flags(arm), "--lr", "3e-4", *(SHORT_WINDOWS if "longce" in arm else []))
    assert args.longce == ("longce" in arm) and args.conversations == ("sft" in arm) and not args.sft
    sampler = sampler_from_args(args, StepShape(2, 1, 1))
    assert (args.objective, sampler.perturbation) == EXPECTED[arm]
    assert args.rpsd_kl_weight == 1.0 and sampler.length == LENGTH and sampler.view(3).position_ids(LENGTH) is not None
    assert args.lr == 3e-4 and args.train_iters == 1000  # what is typed behind an arm wins over common.txt
    text = (FOLDER / arm / "args.txt").read_text()
    assert text.startswith("# ") and "arXiv" in text.splitlines()[0] and len(read_flags(FOLDER / arm / "args.txt")) >= 2


def test_the_arms_script_prints_the_flags_and_refuses_in_one_line():
    script = [sys.executable, "-m", "examples.arms.run"]
    printed = subprocess.run(
        [*script, "pose", "--print", "--lr", "1"], capture_output=True, text=True, cwd=FOLDER.parents[1]
    )
    assert printed.returncode == 0 and printed.stdout.split()[-6:] == [*arm_flags("pose")[-4:], "--lr", "1"]
    refused = subprocess.run([*script, "twist"], capture_output=True, text=True, cwd=FOLDER.parents[1])
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and "rpsd-skip" in refused.stderr


def test_defaults_are_those_of_the_paper(parsed):
    args = parsed()
    assert (args.objective, args.rpsd_perturbation, args.rpsd_kl_weight) == ("rpsd", "skip", 1.0)
    assert (args.rpsd_max_shift, args.rpsd_split_range, args.rpsd_split_density) == (LENGTH, (0.0, 1.0), 0.0)
    assert (args.rpsd_execution, args.rpsd_split_sampling) == ("shared-prefix", "stratified")
    assert args.rpsd_apply_probability == 1.0 and args.rpsd_kl_direction == "reverse-kl"


def test_pose_reaches_as_far_as_skip_by_default(parsed):
    assert parsed("--objective", "pose", "--pose-sampling", "chunks").pose_target_length == LENGTH + LENGTH


@pytest.mark.parametrize("flags", [("--objective", "standard"), ("--objective", "pose", "--pose-sampling", "chunks")])
def test_arms_without_splits_take_growing_batches(flags, parsed):
    growing = ("--rampup-batch-size", "1", "1", "10")
    assert parsed(*flags, *growing).rpsd_split_sampling == "independent"
    with pytest.raises(ValueError, match="--rpsd-split-sampling stratified .*use independent"):
        parsed(*growing)


RPSD, POSE, STANDARD, HARD = (("--objective", name) for name in ("rpsd", "pose", "standard", "hard-label"))
CHUNKS = (*POSE, "--pose-sampling", "chunks")
CYCLIC, NOPE, PERMUTED = (("--rpsd-perturbation", name) for name in ("cyclic", "nope", "chunk-permutation"))
OTHERS = [  # (the arm, another arm's option): the option equals its default wherever it can, being typed is enough
    (STANDARD, "--rpsd-kl-weight 1"),
    (POSE, "--rpsd-kl-weight 1"),
    (POSE, "--rpsd-execution full"),
    (POSE, "--rpsd-apply-probability 1"),
    (POSE, "--rpsd-split-density 0"),
    (STANDARD, "--rpsd-perturbation skip"),
    (CHUNKS, "--rpsd-perturbation skip"),
    (STANDARD, "--rpsd-max-shift 64"),
    (CHUNKS, "--rpsd-max-shift 64"),
    (CYCLIC, "--rpsd-max-shift 64"),
    (NOPE, "--rpsd-max-shift 64"),
    (PERMUTED, "--rpsd-max-shift 64"),
    (CYCLIC, "--rpsd-split-range 0 1"),
    (NOPE, "--rpsd-split-range 0 1"),
    (PERMUTED, "--rpsd-split-range 0 1"),
    (CHUNKS, "--rpsd-split-range 0 1"),
    (NOPE, "--rpsd-split-density 0.5"),
    (RPSD, "--rpsd-permutation-chunks 8"),
    (CYCLIC, "--rpsd-permutation-chunks 8"),
    (RPSD, "--pose-sampling skip"),
    (RPSD, "--pose-chunks 2"),
    (POSE, "--pose-chunks 2"),
    (POSE, "--pose-target-length 128"),
    (HARD, "--rpsd-kl-direction reverse-kl"),
    (POSE, "--rpsd-kl-temperature 1"),
    (HARD, "--rpsd-kl-top-k 5"),
    (STANDARD, "--longce-context 8"),
    (RPSD, "--longce-max-weight 5"),
]


@pytest.mark.parametrize(("arm", "option"), OTHERS, ids=[f"{' '.join(arm)}-{option}" for arm, option in OTHERS])
def test_an_option_of_another_arm_is_refused(arm, option, parsed):
    with pytest.raises(ValueError) as refused:
        parsed(*arm, *option.split())
    line = str(refused.value)
    flag, *value = option.split()
    shown = {"--rpsd-split-range": "0 1"}.get(flag, value[0])
    assert line.startswith(f"{flag} {shown}") and "\n" not in line
    assert "leave it out" in line and " ".join(arm) in line.split("this run is")[1]


@pytest.mark.parametrize(
    ("arm", "option"),
    [
        (HARD, "--rpsd-kl-weight 0.5 --rpsd-execution full --rpsd-apply-probability 0.5 --rpsd-split-density 0.5"),
        (POSE, "--rpsd-max-shift 9 --rpsd-split-range 0.25 1 --rpsd-perturbation skip --pose-sampling skip"),
        ((*POSE, *CYCLIC), "--rpsd-split-granule 4"),
        (PERMUTED, "--rpsd-permutation-chunks 3 --rpsd-execution full"),
        (CYCLIC, "--rpsd-split-density 0.5"),
        (CHUNKS, "--pose-chunks 5 --pose-target-length 65"),
        (STANDARD, "--rpsd-seed 3 --rpsd-split-granule 1 --rpsd-split-sampling independent"),
    ],
)
def test_an_option_of_the_arm_is_taken(arm, option, parsed):
    args = parsed(*arm, *option.split())
    flag, value = option.split()[:2]
    assert str(getattr(args, flag[2:].replace("-", "_"))) == value or flag == "--rpsd-kl-weight"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--length-mix 0.5:64 0.4:8", "--length-mix 0.5:64 0.4:8: the shares sum to 0.9, not 1"),
        ("--length-mix 0.5", "--length-mix 0.5: write SHARE:LENGTH"),
        ("--length-mix 1:8 --sft", "--length-mix 1:8 cuts windows of documents; under --sft"),
        (
            "--length-mix 0.5:64 0.5:8 --rpsd-perturbation chunk-permutation --rpsd-permutation-chunks 9",
            "--length-mix 0.5:64 0.5:8: at length 8, --rpsd-permutation-chunks 9 must lie in 2..--seq-length 8",
        ),
        (
            "--length-mix 0.5:64 0.5:2 --context-parallel-size 2",
            r"2 must divide by 2 x CP \(x TP under sequence parallelism\) = 4",
        ),
        ("--objective pose --longce", "--longce weighs the CLM of --objective standard or rpsd"),
        ("--longce", "--longce-context 4096 must be .* shorter than --seq-length 64"),
        ("--longce --longce-context 8 --longce-stride 0", "--longce-stride 0"),
        ("--longce --longce-context 8 --pipeline-model-parallel-size 2", "--pipeline-model-parallel-size 2 must be 1"),
        (
            "--longce --longce-context 9 --longce-stride 4 --context-parallel-size 2",
            r"--longce-context 9 \+ --longce-stride 4 = 13 .* = 4; the next width is 16",
        ),
        ("--rpsd-kl-temperature 0", "--rpsd-kl-temperature 0.0 must be a positive"),
        ("--rpsd-kl-top-k 0", "--rpsd-kl-top-k 0 must be at least 1"),
        ("--loss-chunk-bytes 0", "--loss-chunk-bytes 0 must be at least 1"),
        ("--loss-implementation unfused --rpsd-kl-direction jsd", "--loss-implementation unfused knows the reverse KL"),
        ("--fp16", "--fp16: .*--bf16, or --loss-implementation unfused"),
        ("--rpsd-split-range 0.3 0.4 --rpsd-split-granule 32", "--rpsd-split-range 0.3 0.4 .*19.2 <= s < 25.6.* 32 "),
        ("--rpsd-split-range 0.6 0.4", "--rpsd-split-range 0.6 0.4.*LOW < HIGH"),
        ("--rpsd-perturbation chunk-permutation --rpsd-permutation-chunks 65", "--rpsd-permutation-chunks 65 .*64"),
        ("--objective pose --pose-sampling chunks --pose-chunks 1", "--pose-chunks 1 "),
        ("--objective pose --pose-sampling chunks --pose-target-length 64", "--pose-target-length 64 "),
        ("--objective pose --pose-sampling chunks --pose-target-length 16777217", "--pose-target-length .*16777216"),
        ("--rope-parameters {", "--rope-parameters {: "),
        ("--rope-parameters [1]", r"--rope-parameters \[1\]: it must be a JSON object"),
        ('--rope-parameters {"rope_type":"dynamic"}', "--rope-parameters .*dynamic.*choose one of"),
        (
            '--rope-parameters {"rope_type":"yarn","factor":0.5,"original_max_position_embeddings":8}',
            "--rope-parameters .*factor 0.5",
        ),
    ],
)
def test_values_out_of_range_are_refused(flags: str, message: str, parsed, monkeypatch):
    if "parallel-size 2" in flags:
        monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=message):
        parsed(*flags.split())


def test_a_short_sequence_keeps_typed_ranges_and_follows_its_length_otherwise(parsed):
    from megatron_rpsd.training.lengths import mixed_lengths_from_args

    mix = ("--length-mix", "0.5:64", "0.5:8")
    samplers = mixed_lengths_from_args(parsed(*mix), StepShape(2, 1, 1)).samplers
    assert {length: sampler.max_shift for length, sampler in samplers.items()} == {64: 64, 8: 8}
    assert {length: sampler.granule for length, sampler in samplers.items()} == {64: 2, 8: 2}
    assert samplers[8].step == StepShape(16, 8, 1) and samplers[64].step == StepShape(2, 1, 1)
    samplers = mixed_lengths_from_args(parsed(*mix, "--rpsd-max-shift", "64"), StepShape()).samplers
    assert {length: sampler.max_shift for length, sampler in samplers.items()} == {64: 64, 8: 64}
    samplers = mixed_lengths_from_args(parsed(*CHUNKS, *mix), StepShape()).samplers
    assert {length: sampler.target_length for length, sampler in samplers.items()} == {64: 128, 8: 16}
    assert parsed(*STANDARD, *mix).rpsd_split_sampling == "stratified"  # so that ranks of a micro-step cost the same
    assert mixed_lengths_from_args(parsed(), StepShape()) is None
