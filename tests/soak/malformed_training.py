"""Malformed command lines of the training's entry point."""

from __future__ import annotations

import argparse
import functools
import json
import random
from pathlib import Path

from megatron.training.arguments import add_megatron_arguments

from megatron_rpsd.training.arguments import add_rpsd_arguments
from tests.distributed.models import LENGTH, VOCABULARY
from tests.soak.forked import TRAIN
from tests.soak.malformed import Malformed, table
from tests.soak.workspace import overwrite
from tests.unit.runs.test_checkpoints import flip, remove, truncate

_NOT_WHOLE, _NOT_A_NUMBER = ("four", "1.5", "1e3", "0x20", "8k"), ("much", "1,5", "1e", "0x1p", "1/2")


@functools.cache
def _options() -> list[argparse.Action]:
    """Every option of the real parser that takes one value."""
    parser = add_rpsd_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    return [action for action in parser._actions if action.option_strings and action.nargs is None]


def wrong_type(dice: random.Random) -> Malformed:
    """A word where a number belongs."""
    action = dice.choice([action for action in _options() if action.type in (int, float) and not action.choices])
    value = dice.choice(_NOT_WHOLE if action.type is int else _NOT_A_NUMBER)
    flag = action.option_strings[0]
    return Malformed("wrong type", TRAIN, (flag, value), (flag, value))


def unknown_choice(dice: random.Random) -> Malformed:
    """A word that an option does not know."""
    ours = ("--objective", "--packing", "--loss-implementation", "--on-nonfinite", "--pose", "--rpsd", "--distill")
    actions = [action for action in _options() if action.choices and action.type in (None, str)]
    if dice.random() < 0.5:
        actions = [action for action in actions if action.option_strings[0].startswith(ours)]
    flag = dice.choice(actions).option_strings[0]
    value = dice.choice(("twisted", "RPSD", "none-of-these", "reverse_kl"))
    return Malformed("unknown choice", TRAIN, (flag, value), (flag, value))


# Flag: values out of its range, and what makes a run read it.
RANGES = {
    "--rpsd-kl-weight": ("-1 -0.5 nan inf", ""),
    "--rpsd-max-shift": ("0 -3 16777216 99999999", ""),
    "--rpsd-kl-temperature": ("0 -1 nan inf", ""),
    "--rpsd-kl-top-k": ("0 -5", ""),
    "--loss-chunk-bytes": ("0 -1", ""),
    "--rpsd-apply-probability": ("0 -0.1 1.5 nan", ""),
    "--rpsd-split-density": ("1 -0.1 2 nan", ""),
    "--rpsd-split-granule": ("0 -4 64 33", ""),
    "--rpsd-seed": ("-1 99999999999999999999", ""),
    "--rpsd-permutation-chunks": ("0 1 -2 33", "--rpsd-perturbation chunk-permutation"),
    "--pose-chunks": ("0 1 -2 33", "--objective pose --pose-sampling chunks"),
    "--pose-target-length": ("16 31 0 -1 99999999", "--objective pose --pose-sampling chunks"),
    "--longce-context": ("0 32 100 -1", "--longce --longce-stride 4"),
    "--longce-stride": ("0 -1", "--longce --longce-context 8"),
    "--longce-max-weight": ("0 -1 nan", "--longce --longce-context 8 --longce-stride 4"),
    "--keep-checkpoints": ("0 -1", "--run-dir {here}/new"),
    "--keep-every": ("0 -2", "--run-dir {here}/new --keep-checkpoints 1"),
    "--max-nonfinite-steps": ("0 -1", ""),
    "--step-timeout-minutes": ("0 -1 nan inf", ""),
    "--distill-kl-weight": ("-1 nan inf", "--objective distill --teacher-checkpoint {here}/checkpoint"),
    "--distill-ce-weight": ("-1 nan", "--objective distill --teacher-checkpoint {here}/checkpoint"),
    "--distill-temperature": ("0 -1 nan", "--objective distill --teacher-checkpoint {here}/checkpoint"),
    "--distill-top-k": ("0 -3", "--objective distill --teacher-checkpoint {here}/checkpoint"),
}
MEGATRON_RANGES = {
    "--seq-length": ("0 -32", ""),
    "--micro-batch-size": ("0 -1", ""),
    "--global-batch-size": ("0 -4", ""),
    "--train-iters": ("-1 -10", ""),
    "--lr": ("-1 nan", ""),
    "--min-lr": ("1 -1", ""),
    "--weight-decay": ("-1 nan", ""),
    "--clip-grad": ("-1 nan", ""),
    "--adam-beta1": ("-1 1.5", ""),
    "--adam-eps": ("-1", ""),
    "--lr-warmup-iters": ("-1 2 50", ""),
    "--lr-warmup-fraction": ("-1 2", "--lr-warmup-iters 0"),
    "--lr-decay-iters": ("0 -1", "--lr-warmup-iters 0"),
    "--log-interval": ("0 -1", ""),
    "--save-interval": ("0 -1", "--save {here}/save"),
    "--exit-interval": ("-1 -5", ""),
    "--eval-iters": ("-1", ""),
    "--eval-interval": ("0 -1", "--eval-iters 1"),
    "--num-workers": ("-1 -2", ""),
    "--seed": ("-1 0", ""),
    "--tensor-model-parallel-size": ("0 -1", ""),
    "--context-parallel-size": ("0 -1", ""),
    "--pipeline-model-parallel-size": ("0 -2", ""),
    "--rotary-base": ("0 -5", ""),
    "--max-position-embeddings": ("0 -1", ""),
    "--split": ("a,b,c 0,0,0 50,60,-10 100,0,0,0", ""),
    "--num-dataset-builder-threads": ("0 -1", ""),
    "--exit-duration-in-mins": ("-1 -3", ""),
    "--make-vocab-size-divisible-by": ("0 -1", ""),
    "--distributed-timeout-minutes": ("0 -1", ""),
}


def _out_of(ranges: dict[str, tuple[str, str]], family: str, dice: random.Random) -> Malformed:
    flag = dice.choice(list(ranges))
    values, needed = ranges[flag]
    value = dice.choice(values.split())
    return Malformed(family, TRAIN, (*needed.split(), flag, value), (flag, value))


def out_of_range(dice: random.Random) -> Malformed:
    """A value that one of our flags does not take."""
    return _out_of(RANGES, "out of range", dice)


def megatron_out_of_range(dice: random.Random) -> Malformed:
    """A value that one of Megatron's flags should not take."""
    return _out_of(MEGATRON_RANGES, "out of range, Megatron's", dice)


def split_range(dice: random.Random) -> Malformed:
    """An interval of splits that is empty, or not one of fractions."""
    words = dice.choice(("0.5 0.5", "0.6 0.2", "-0.1 1", "0 1.2", "nan 1", "0.97 0.99")).split()
    return Malformed("out of range", TRAIN, ("--rpsd-split-range", *words), ("--rpsd-split-range", words[0]))


def other_arm(dice: random.Random) -> Malformed:
    """An option that the chosen arm does not read."""
    paired = ("--rpsd-kl-weight 2", "--rpsd-apply-probability 0.5", "--rpsd-execution full", "--rpsd-kl-direction jsd")
    foreign = {
        "standard": (*paired, "--rpsd-perturbation cyclic", "--rpsd-max-shift 8", "--distill-ce-weight 1"),
        "pose": (*paired, "--rpsd-kl-top-k 4", "--pose-chunks 3", "--rpsd-split-density 0.5", "--teacher-cache x"),
        "hard-label": ("--rpsd-kl-top-k 4", "--rpsd-kl-temperature 2", "--pose-sampling chunks", "--longce-stride 8"),
        "rpsd": ("--pose-target-length 64", "--distill-top-k 4", "--longce-context 8", "--rpsd-permutation-chunks 4"),
        "distill": ("--rpsd-kl-weight 2", "--rpsd-max-shift 8", "--pose-chunks 3", "--longce-max-weight 2"),
    }
    objective = dice.choice(list(foreign))
    flag, value = dice.choice(foreign[objective]).split()
    words = ("--objective", objective, flag, value)
    return Malformed("an option of another arm", TRAIN, words, (flag, value, f"--objective {objective}"))


conflicts = table("flags that exclude each other", [
    ("--run-dir {here}/new --save {here}/save", "--save {here}/save --run-dir"),
    ("--run-dir {here}/new --load {here}/save", "--load {here}/save --run-dir"),
    ("--run-dir {here}/new --tensorboard-dir {here}/t", "--tensorboard-dir {here}/t --run-dir"),
    ("--keep-every 5 --run-dir {here}/new", "--keep-every 5 --keep-checkpoints"),
    ("--keep-checkpoints 2", "--keep-checkpoints --run-dir"),
    ("--fp16", "--fp16 --bf16"),
    ("--fp16 --bf16", "--fp16 --bf16"),
    ("--loss-implementation unfused --rpsd-kl-top-k 4", "--loss-implementation --rpsd-kl-top-k"),
    ("--loss-implementation unfused --rpsd-kl-direction jsd", "--loss-implementation --rpsd-kl-direction"),
    ("--packing concatenate --reset-attention-mask", "--packing --reset-attention-mask"),
    ("--packing concatenate --reset-position-ids", "--packing --reset-position-ids"),
    ("--perturb-documents", "--perturb-documents --packing"),
    ("--perturb-documents --packing document-mask --rpsd-perturbation nope", "--perturb-documents nope"),
    ("--perturb-documents --packing document-mask --rpsd-execution shared-prefix", "--perturb-documents"),
    ("--train-samples 8", "--train-samples 8 --train-iters 2"),
    ("--mock-data", "--mock-data --data-path"),
    ("--train-data-path {here}/data", "--train-data-path --data-path"),
    ("--data-args-path {here}/file", "--data-args-path --data-path"),
    ("--overlap-param-gather", "--overlap-param-gather"),
    ("--objective pose --longce", "--longce --objective"),
    ("--rope-phases a:theta=10000,seq=32 --rotary-base 20000", "--rope-phases --rotary-base 20000"),
    ("--rope-phases a:theta=10000,seq=32 --length-mix 1:32", "--rope-phases --length-mix"),
    ("--objective distill", "--objective distill --teacher-checkpoint"),
    ("--objective distill --teacher-checkpoint {here}/checkpoint --teacher-cache {here}/empty", "--teacher-cache"),
    ("--lr-warmup-fraction 0.5", "--lr-warmup-fraction 0.5 --lr-warmup-iters 1"),
    ("--rampup-batch-size 2 2 8", "--rampup-batch-size --rpsd-split-sampling"),
])  # fmt: skip

_TP, _CP, _PP = "--tensor-model-parallel-size", "--context-parallel-size", "--pipeline-model-parallel-size"


def sizes(dice: random.Random) -> Malformed:
    """Sizes that do not divide."""
    ranks, words, names = dice.choice([
        (3, f"{_TP} 3", f"{_TP} 3 4"),
        (4, f"{_TP} 4", f"{_TP} 4 2"),
        (8, f"{_TP} 8", f"{_TP} 8"),
        (3, f"{_TP} 2", "world 3 2"),
        (6, f"{_TP} 2 {_CP} 2", "world 6 4"),
        (2, f"{_CP} 2 --seq-length 30", "--seq-length 30"),
        (3, f"{_CP} 3", "--seq-length 32"),
        (4, f"{_TP} 2 {_CP} 2 --sequence-parallel --seq-length 36", "--seq-length 36"),
        (2, f"{_TP} 2 --sequence-parallel --seq-length 33", "--seq-length 33"),
        (2, f"{_CP} 2 --rpsd-split-granule 6", "--rpsd-split-granule 6"),
        (3, f"{_PP} 3", f"{_PP} 3 4"),
        (8, f"{_PP} 8", f"{_PP} 8 4"),
        (2, "--global-batch-size 5", "--global-batch-size 5 --micro-batch-size"),
        (1, "--micro-batch-size 3", "--global-batch-size 4 --micro-batch-size 3"),
        (3, "--global-batch-size 4", "--global-batch-size 4 --micro-batch-size"),
        (8, "--global-batch-size 4", "--global-batch-size 4 --micro-batch-size"),
        (4, f"{_PP} 2 --micro-batch-size 4 --global-batch-size 4", "--global-batch-size 4 --micro-batch-size 4"),
        (2, f"{_PP} 2 --num-layers-per-virtual-pipeline-stage 3", "--num-layers-per-virtual-pipeline-stage 3"),
        (2, f"{_CP} 2 --longce --longce-context 7 --longce-stride 4", "--longce-context 7"),
        (2, f"{_PP} 2 --longce --longce-context 8 --longce-stride 4", f"--longce {_PP} 2"),
        (2, f"{_PP} 2 --objective distill --teacher-checkpoint {{here}}/checkpoint", f"--teacher-checkpoint {_PP} 2"),
    ])  # fmt: skip
    return Malformed("sizes that do not divide", TRAIN, tuple(words.split()), tuple(names.split()), ranks)


def paths(dice: random.Random) -> Malformed:
    """A file or folder that is not there, or is of the other kind."""
    place = dice.choice(("{here}/nowhere", "{here}/file/below", "{here}/empty", "{here}/file"))
    flag, needed = dice.choice([
        ("--data-path", ""), ("--pretrained-checkpoint", ""), ("--teacher-checkpoint", "--objective distill"),
        ("--teacher-cache", "--objective distill"), ("--tokenizer-model", "--tokenizer-type HuggingFaceTokenizer"),
        ("--data-path", "--sft"), ("--save", "--save-interval 1"), ("--run-dir", "--save-interval 1"),
        ("--tensorboard-dir", ""), ("--data-cache-path", ""),
    ])  # fmt: skip
    if flag in ("--save", "--run-dir", "--tensorboard-dir", "--data-cache-path"):  # these make their folder
        place = dice.choice(("{here}/file/below", "{here}/file"))
    words = (*needed.split(), *(("--teacher-tokenizer", "{here}/tokenizer") if "teacher-ch" in flag else ()))
    return Malformed("bad path", TRAIN, (*words, flag, place), (flag, place))


def data(dice: random.Random) -> Malformed:
    """A .bin or an .idx that is cut, empty, gone or something else."""
    suffix, harm = dice.choice(("bin", "idx")), dice.choice((truncate, remove, _emptied, overwrite))
    if suffix == "bin" and harm is overwrite:
        harm = truncate  # other tokens are data, too

    def prepare(here: Path, dice: random.Random) -> None:
        harm(here / f"damaged.{suffix}", dice)

    prepare.__name__ = f"{harm.__name__}_{suffix}"
    names = ("--data-path", "{here}/damaged")
    return Malformed(f"damaged .{suffix}", TRAIN, ("--data-path", "{here}/damaged"), names, prepare=prepare)


def _emptied(path: Path, dice: random.Random) -> None:
    path.write_bytes(b"")


def manifest(dice: random.Random) -> Malformed:
    """A P.json that is none, or speaks of another vocabulary."""
    text = dice.choice(("", "{", "[]", '{"format": 7}', '{"format": 1}', "null"))

    def prepare(here: Path, dice: random.Random) -> None:
        (here / "damaged.json").write_text(text)

    prepare.__name__ = f"manifest {text}"
    return Malformed("bad manifest", TRAIN, ("--data-path", "{here}/damaged"), ("damaged.json",), prepare=prepare)


def checkpoint(dice: random.Random) -> Malformed:
    """A checkpoint to start from that is damaged."""
    name = dice.choice((".metadata", "metadata.json", "__0_0.distcp", "tracker"))
    harm = dice.choice((truncate, remove, _emptied))
    if name == "tracker":
        harm = dice.choice((overwrite, remove, _emptied))

    def prepare(here: Path, dice: random.Random) -> None:
        folder = here / "checkpoint"
        tracker = folder / "latest_checkpointed_iteration.txt"
        harm(tracker if name == "tracker" else folder / tracker.read_text().strip() / name, dice)

    prepare.__name__ = f"{harm.__name__} {name}"
    return Malformed("damaged checkpoint", TRAIN, (), ("--pretrained-checkpoint", "{here}/checkpoint"), prepare=prepare)


def phases(dice: random.Random) -> Malformed:
    """Phases that are no phases."""
    text = dice.choice((
        "", "short", "short:", "a:theta=10000", "a:seq=32", "a:theta=x,seq=32", "a:theta=1,seq=32",
        "a:theta=10000,seq=1", "a:theta=10000,seq=32,samples=0", "a:theta=10000,seq=32,colour=3",
        "a:theta=10000,seq=16,samples=4;a:theta=20000,seq=32", "a:theta=10000,seq=16;b:theta=20000,seq=32",
        "a:theta=10000,seq=32,samples=4;b:theta=20000,seq=16", "a:theta=10000,seq=16,samples=3;b:theta=20000,seq=32",
        "a:theta=10000,seq=24,samples=4;b:theta=20000,seq=32", "a:theta=10000,seq=16,samples=8;b:theta=20000,seq=32",
        "a:theta=10000,seq=16", "a:theta=10000,seq=16,samples=4;;b:theta=20000,seq=32",
        "a:theta=10000,seq=32,data={here}/nowhere", "a:theta=10000,theta=20000,seq=32",
    ))  # fmt: skip
    first = text.split(":")[0].split(";")[0]
    return Malformed("bad phases", TRAIN, ("--rope-phases", text), ("--rope-phases", first))


def freezing(dice: random.Random) -> Malformed:
    """A list of frequencies that is none; the head has four."""
    text = dice.choice(("", "a", "4", "0-4", "3-1", "1,,2", "0-", "-1", "1.5", "0;1", "0-1-2", "99", "1, x"))
    return Malformed("bad list of frequencies", TRAIN, (f"--freeze-rope-dims={text}",), ("--freeze-rope-dims", text))


def rope(dice: random.Random) -> Malformed:
    """RoPE scaling that is no JSON, or no scaling."""
    linear = {"rope_type": "linear", "factor": 4.0}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 16}  # fmt: skip
    text = dice.choice((
        "", "{", "linear", "[]", "3", "null", "{'rope_type': 'linear'}", json.dumps({"rope_type": "linear"}),
        json.dumps({"factor": 4.0}), json.dumps({**linear, "rope_type": "longest"}),
        *(json.dumps({**linear, "factor": value}) for value in (0, -1, "4", None, 0.5, float("nan"), [4])),
        *(json.dumps({key: value for key, value in yarn.items() if key != left}) for left in ("factor",)),
        json.dumps({**yarn, "original_max_position_embeddings": "x"}), json.dumps({**yarn, "beta_fast": -1}),
        json.dumps({**yarn, "factor": True}), json.dumps({**llama3, "low_freq_factor": 4.0}),
        json.dumps({key: value for key, value in llama3.items() if key != "high_freq_factor"}),
    ))  # fmt: skip
    return Malformed("bad RoPE scaling", TRAIN, ("--rope-parameters", text), ("--rope-parameters", text))


def tokenizers(dice: random.Random) -> Malformed:
    """A tokenizer that does not go with the model or the run."""
    folder, words, names = dice.choice([
        ("large_tokenizer", "", f"--tokenizer-model {VOCABULARY + 23} {VOCABULARY}"),
        ("large_tokenizer", "--packing document-mask", f"--tokenizer-model {VOCABULARY + 23}"),
        ("endless_tokenizer", "--packing document-mask", "--packing EOD"),
        ("endless_tokenizer", "--reset-attention-mask", "--reset-attention-mask EOD"),
        ("tokenizer", "--sft --data-path {here}/chats.jsonl", "--sft template"),
        ("hf", "", "--tokenizer-model {here}/hf"),
    ])  # fmt: skip
    typed = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", f"{{here}}/{folder}", *words.split())
    return Malformed("a tokenizer that does not match", TRAIN, typed, tuple(names.split()))


def run_folders(dice: random.Random) -> Malformed:
    """A run's folder that is finished, or whose every checkpoint is damaged."""
    harm = dice.choice((truncate, flip, remove))
    name = dice.choice(("common.pt", ".metadata", "__0_0.distcp"))

    def spoil(here: Path, dice: random.Random) -> None:
        for iteration in (1, 2):
            harm(here / "run" / "checkpoints" / f"iter_{iteration:07d}" / name, dice)

    if dice.random() < 0.3:
        return Malformed("a finished run", TRAIN, ("--run-dir", "{here}/finished"), ("--run-dir", "{here}/finished"))
    spoil.__name__ = f"{harm.__name__} {name}"
    names = ("{here}/run", name, "iteration 1", "iteration 2")
    return Malformed("a run without a whole checkpoint", TRAIN, ("--run-dir", "{here}/run"), names, prepare=spoil)


def mixed_lengths(dice: random.Random) -> Malformed:
    """A mix of lengths whose shares or lengths do not fit."""
    text = dice.choice(("0.5:64 0.5:32", "0.5:32", "x:32", "0.5", "1:7", "0:32", "1:0", "0.5:32 0.6:16",
                        "1/0:32", "0.5:32 0.5:32", "nan:32", "1:32:16"))  # fmt: skip
    words = text.split()
    return Malformed("bad mix of lengths", TRAIN, ("--length-mix", *words), ("--length-mix", words[0]))


def chats(dice: random.Random) -> Malformed:
    """Lines that are no conversations."""
    good = '{"messages": [{"role": "user", "content": "t1"}, {"role": "assistant", "content": "t2"}]}'
    line = dice.choice((
        "{", "[]", '{"messages": []}', '{"text": "t1"}', '{"messages": [{"role": "user", "content": "t1"}]}',
        '{"messages": [{"role": "judge", "content": "t1"}]}', '{"messages": [{"role": "assistant", "content": ""}]}',
        '{"messages": [{"role": "assistant", "content": 3}]}', '{"messages": ["t1"]}', "\x00",
    ))  # fmt: skip
    number = dice.randrange(1, 9)

    def prepare(here: Path, dice: random.Random) -> None:
        lines = [good] * 9
        lines[number - 1] = line
        (here / "chats.jsonl").write_text("\n".join(lines) + "\n")

    prepare.__name__ = line
    typed = ("--sft", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "{here}/tokenizer")
    words = (*typed, "--data-path", "{here}/chats.jsonl")
    return Malformed("bad conversations", TRAIN, words, (f"{{here}}/chats.jsonl:{number}",), prepare=prepare)


def others(dice: random.Random) -> Malformed:
    """A flag that there is not, a value that is left out, and what no sound command line stands in front of."""
    model = (
        f"--device cpu --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length {LENGTH} --mock-data "
        "--position-embedding-type rope --normalization RMSNorm --attention-dropout 0 --hidden-dropout 0 "
        "--max-position-embeddings 64 --tokenizer-type NullTokenizer --vocab-size 97 --lr 1e-3"
    )
    words, names, whole = dice.choice([
        ("--rpsd-shift 4", "--rpsd-shift", False),
        ("--objectiv rpsd", "--objectiv", False),
        ("--rpsd-kl-weight", "--rpsd-kl-weight", False),
        ("stray", "stray", False),
        ("--rpsd-split-range 0.5", "--rpsd-split-range", False),
        ("--device cpu", "--num-layers", True),
        ("--device cpu --use-checkpoint-args", "--use-checkpoint-args --load --pretrained-checkpoint", True),
        (f"{model} --num-query-groups 3 --group-query-attention --micro-batch-size 1 --train-iters 1",
         "--num-query-groups 3", True),
        (f"{model} --kv-channels 7 --micro-batch-size 1 --train-iters 1", "--kv-channels 7", True),
        (f"{model} --train-iters 1", "--micro-batch-size", True),
        (f"{model.replace('--hidden-size 32', '--hidden-size 30')} --micro-batch-size 1", "--hidden-size 30", True),
    ])  # fmt: skip
    return Malformed("no such flag, no value", TRAIN, tuple(words.split()), tuple(names.split()), whole=whole)


TRAINING = {
    wrong_type: 14, unknown_choice: 8, others: 7, out_of_range: 26, split_range: 3, megatron_out_of_range: 20,
    conflicts: 14, other_arm: 8, sizes: 12, paths: 9, data: 5, manifest: 2, checkpoint: 7, phases: 7, freezing: 5,
    rope: 7, tokenizers: 3, run_folders: 3, mixed_lengths: 4, chats: 4,
}  # fmt: skip
