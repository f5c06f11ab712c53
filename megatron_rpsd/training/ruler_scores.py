"""Teacher-forced scores of RULER's prompts as a validation metric of a run, in the layout that it trains in.

At every evaluation the model reads each prompt with its gold answer behind it, under the standard view and without
gradients. Logged for each prepared file: the answer's negative log-likelihood (nats per answer token, mean over the
answer's tokens, then over samples) and the share of samples whose whole answer greedy decoding would have written.
They cost one forward pass a sample and need no generation; they are not RULER's scores.

    file ──> tokens of prompt + answer, padded to one length that the layout divides
         ──> dealt to data-parallel replicas, sharded zigzag over context-parallel ranks
         ──> last stage, answer tokens only: vocabulary-parallel cross-entropy and argmax
         ──> [samples, 3]: sum of losses, tokens, tokens that argmax misses; added over all ranks
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training import get_args
from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer
from megatron.training.utils.common_utils import print_rank_last
from torch import Tensor

from megatron_rpsd.loss import vocab_parallel_argmax, vocab_parallel_cross_entropy
from megatron_rpsd.positions import View
from megatron_rpsd.ruler.answers import bos_of_tokenizer, forced_tokens, gold_answer
from megatron_rpsd.ruler.counting import TokenCounter
from megatron_rpsd.ruler.generate import beside
from megatron_rpsd.training.arms import suffix_unit
from megatron_rpsd.training.batch import ViewBatch, make_view_batch
from megatron_rpsd.training.forward_step import ForwardStep
from megatron_rpsd.training.objective import OutputLayer
from megatron_rpsd.training.packing import CONCATENATED
from megatron_rpsd.training.phases import PhasedForwardStep

DEFAULT_SAMPLES = 32


def add_ruler_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags to the parser's group."""
    group.add_argument(
        "--eval-ruler", type=Path, nargs="+", default=None, metavar="FILE.jsonl",
        help="At every evaluation also score the gold answers of these prompts (made by tools/make_ruler.py with the "
        "run's tokenizer): their NLL, and the share that greedy decoding would give.",
    )  # fmt: skip
    group.add_argument(
        "--eval-ruler-samples", type=int, default=None, metavar="K",
        help=f"The first K samples of each file. Default: {DEFAULT_SAMPLES}.",
    )  # fmt: skip


@dataclass(frozen=True)
class AnswerFile:
    """A prepared file's prompts with their answers, ready for the model.

    Attributes:
        name: TASK-LENGTH, of the file's name.
        tokens, labels: int64 [N, length], padded behind the answer.
        loss_mask: fp32 [N, length], 1 where the label is a token of the answer.
    """

    name: str
    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor

    @property
    def length(self) -> int:
        """Tokens that a sample takes in the model."""
        return self.tokens.shape[1]

    def sample(self, row: int) -> dict[str, Tensor]:
        """A micro-batch of one sample; of no answer where `row` is -1."""
        rows = slice(max(row, 0), max(row, 0) + 1)
        return {
            "tokens": self.tokens[rows],
            "labels": self.labels[rows],
            "loss_mask": self.loss_mask[rows] * (row >= 0),
        }


def _records(path: Path, tokenizer_sha256: str, limit: int) -> tuple[dict, list[dict]]:
    """A prepared file's manifest and first records.

    Raises:
        ValueError: a missing file, one that is not what its manifest says, or prompts of another tokenizer.
    """
    for place in (path, beside(path, ".manifest.json")):
        if not place.is_file():
            raise ValueError(f"--eval-ruler {path}: {place} does not exist: prepare it with tools/make_ruler.py")
    manifest, content = json.loads(beside(path, ".manifest.json").read_bytes()), path.read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
        raise ValueError(f"--eval-ruler {path}: its sha256 is not that of its manifest: prepare it again")
    if manifest["tokenizer_sha256"] != tokenizer_sha256:
        raise ValueError(
            f"--eval-ruler {path} was prepared with tokenizer.json {manifest['tokenizer_sha256'][:16]}..., the run's "
            f"is {tokenizer_sha256[:16]}...: prepare prompts with --tokenizer of the run's own"
        )
    return manifest, [json.loads(line) for line in content.splitlines()[:limit]]


def read_answers(path: Path, counter: TokenCounter, bos_id: int | None, limit: int, unit: int, most: int) -> AnswerFile:
    """The first `limit` samples of a prepared file.

    Args:
        bos_id: what the tokenizer puts before every text, or None.
        unit: what a sequence's length must divide by.
        most: tokens that a sequence may have, a multiple of `unit`.

    Raises:
        ValueError: as `_records`, or a prompt that is too long.
    """
    manifest, records = _records(path, counter.sha256, limit)
    forced = []
    for number, record in enumerate(records):
        name = f"{path.name}, sample {number}"
        answer, spans = gold_answer(manifest["task"], record["outputs"])
        both = forced_tokens(counter, name, record["input"] + record["answer_prefix"], answer, spans, bos_id)
        if len(both.ids) - 1 > most:
            raise ValueError(
                f"--eval-ruler {path}: with its answer sample {number} takes {len(both.ids) - 1} tokens, --seq-length "
                f"is {most}; prepare shorter prompts, or leave the file out"
            )
        forced.append(both)
    longest = max(len(both.ids) for both in forced) - 1
    length = -(-longest // unit) * unit
    tokens, labels = (torch.zeros(len(forced), length, dtype=torch.int64) for _ in range(2))
    loss_mask = torch.zeros(len(forced), length)
    for row, both in enumerate(forced):
        ids = torch.tensor(both.ids)
        tokens[row, : len(ids) - 1], labels[row, : len(ids) - 1] = ids[:-1], ids[1:]
        loss_mask[row, both.start - 1 : len(ids) - 1] = 1
    return AnswerFile(path.name.removesuffix(".jsonl"), tokens, labels, loss_mask)


def answer_files(args: argparse.Namespace) -> list[AnswerFile]:
    """What --eval-ruler names, read and checked; nothing without it.

    Raises:
        ValueError: in one line.
    """
    if args.eval_ruler is None:
        if args.eval_ruler_samples is not None:
            raise ValueError("--eval-ruler-samples needs --eval-ruler to name prepared files")
        return []
    limit = DEFAULT_SAMPLES if args.eval_ruler_samples is None else args.eval_ruler_samples
    if limit < 1:
        raise ValueError(f"--eval-ruler-samples {limit} must be at least 1")
    if not args.eval_iters:
        raise ValueError("--eval-ruler with --eval-iters 0: no evaluation would run; set --eval-iters to at least 1")
    if args.split and args.valid_data_path is None and not any(map(float, args.split.split(",")[1:2])):
        raise ValueError(
            f"--eval-ruler with --split {args.split}: without validation data Megatron runs no evaluation; leave a "
            "share for it, such as --split 99,1,0, or give --valid-data-path"
        )
    if args.tokenizer_model is None or not (Path(args.tokenizer_model) / "tokenizer.json").is_file():
        raise ValueError(
            f"--eval-ruler: --tokenizer-model {args.tokenizer_model} holds no tokenizer.json, which prompts are "
            "prepared with; name the model's Hugging Face folder, with --tokenizer-type HuggingFaceTokenizer"
        )
    names = [path.name for path in args.eval_ruler]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"--eval-ruler: two files are called {twice[0]}; the log could not tell them apart")
    folder = Path(args.tokenizer_model)
    reading = TokenCounter(folder), bos_of_tokenizer(folder), limit, suffix_unit(args), args.seq_length
    files = [read_answers(path, *reading) for path in args.eval_ruler]
    for file in files:
        if (largest := int(file.tokens.max())) >= args.vocab_size:
            raise ValueError(f"--eval-ruler: {file.name} has token {largest}, the model's vocabulary {args.vocab_size}")
    return files


def answer_sums(vocab_size: int, *, hidden_states: Tensor, context: ViewBatch, **given) -> Tensor:
    """GPTModel's `output_processor` hook: hidden states to this rank's sums over answer tokens, fp64 [3]: losses in
    nats, tokens, and tokens that are not the model's first choice. The same on every tensor-parallel rank.
    """
    layer = OutputLayer.of_hook(vocab_size, context, **given)
    hidden, _ = layer.readings(hidden_states)
    kept = context.loss_mask.T.flatten() > 0
    logits = torch.nn.functional.linear(hidden[kept], layer.weight) * layer.logit_scale
    labels = context.labels.T.flatten()[kept]
    losses = vocab_parallel_cross_entropy(logits, labels, layer.shard)
    missed = vocab_parallel_argmax(logits, layer.shard) != labels
    return torch.stack([losses.double().sum(), kept.sum().double(), missed.sum().double()])


def score_file(model: Sequence, step: ForwardStep, file: AnswerFile) -> Tensor:
    """Sums of every sample of a file, fp64 [N, 3] as `answer_sums`, the same on every rank; collective over all."""
    step = copy.copy(step)
    step.packing = CONCATENATED  # a prompt is one document
    layout = step.layout(None, file.length)
    processor = functools.partial(answer_sums, step.objective.vocab_size)

    def forward(iterator, stage):
        batch = make_view_batch(next(iterator), [View.identity()], "standard", layout)
        return step._forward(stage, batch.to(torch.cuda.current_device()), processor), _keep

    replicas, stages = (
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    rounds = -(-len(file.tokens) // replicas)
    rounds = -(-rounds // stages) * stages if len(model) > 1 else rounds  # what interleaved stages ask for
    mine = range(parallel_state.get_data_parallel_rank(), rounds * replicas, replicas)
    rows = [row if row < len(file.tokens) else -1 for row in mine]
    found = get_forward_backward_func()(
        forward_step_func=forward, data_iterator=[map(file.sample, rows) for _ in model], model=list(model),
        num_microbatches=rounds, seq_length=file.length, micro_batch_size=1, forward_only=True,
        collect_non_loss_data=True,
    )  # fmt: skip
    sums = torch.zeros(len(file.tokens), 3, dtype=torch.float64, device=torch.cuda.current_device())
    if found and parallel_state.get_tensor_model_parallel_rank() == 0:
        for row, values in zip(rows, found, strict=True):
            if row >= 0:
                sums[row] += values
    dist.all_reduce(sums)
    return sums


def _keep(sums: Tensor, non_loss_data: bool = False) -> Tensor:
    assert non_loss_data
    return sums


class RulerScores:
    """Megatron's `non_loss_data_func`: scores of all files at every evaluation, logged as its own losses are."""

    def __init__(self, files: Sequence[AnswerFile], forward_step: ForwardStep | PhasedForwardStep) -> None:
        self.files, self.forward_step = files, forward_step
        self.scored: int | None = None

    def current_step(self) -> ForwardStep:
        """The forward step of the present moment: in phases, the one that trained last."""
        step = self.forward_step
        if isinstance(step, PhasedForwardStep):
            return step.steps[step.current_phase()]
        return step

    def __call__(self, model: Sequence) -> None:
        args = get_args()
        # Megatron counts an iteration when it begins, and evaluates behind it.
        iteration = args.iteration if args.skip_train else max(args.iteration, args.curr_iteration + 1)
        if iteration == self.scored:  # Megatron evaluates twice behind the last step: in its loop and when it ends
            return
        self.scored = iteration
        log_scores(args, iteration, self.scores(model))

    @torch.no_grad()
    def scores(self, model: Sequence) -> dict[str, float]:
        """By what is logged: nats per answer token, and a share from 0 to 1. The same on every rank."""
        values = {}
        for file in self.files:
            losses, tokens, missed = score_file(model, self.current_step(), file).T
            values[f"{file.name} answer nll"] = (losses / tokens).mean().item()
            values[f"{file.name} greedy exact"] = (missed == 0).double().mean().item()
        return values


def log_scores(args: argparse.Namespace, iteration: int, values: dict[str, float]) -> None:
    """A line of the log, and scalars where Megatron writes its own: tensorboard, the run folder's metrics, wandb."""
    print_rank_last(f" ruler at iteration {iteration} | " + "".join(f"{k}: {v:.6E} | " for k, v in values.items()))
    writer, wandb = get_tensorboard_writer(), get_wandb_writer()
    for name, value in values.items():
        if writer:
            writer.add_scalar(f"{name} validation", value, iteration)
            writer.add_scalar(f"{name} validation vs samples", value, args.consumed_train_samples)
        if wandb:
            wandb.log({f"{name} validation": value}, iteration)


def ruler_scores_from_args(
    args: argparse.Namespace, forward_step: ForwardStep | PhasedForwardStep
) -> RulerScores | None:
    """What --eval-ruler describes, or None without it.

    Raises:
        ValueError: in one line, as `answer_files`.
    """
    files = answer_files(args)
    return RulerScores(files, forward_step) if files else None
