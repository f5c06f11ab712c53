"""Whole runs on packed documents: resume, what is logged, conversations, and refused command lines."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path
from transformers import AutoTokenizer

from megatron_rpsd.checkpoint.convert import import_hf
from megatron_rpsd.data.manifest import Manifest, write_manifest
from megatron_rpsd.loss.definitions import clm_per_token, reverse_kl_per_token
from megatron_rpsd.positions import ViewSampler, draw_document_views, keyed_generator
from tests.chat_tokenizer import MARKED, PLAIN, assistant, save_chat_tokenizer, system, user
from tests.distributed import document_job, training_job
from tests.distributed.corpus import run_arguments
from tests.distributed.models import LENGTH, VOCABULARY
from tests.distributed.plain_llama import PlainLlama
from tests.distributed.test_gradients import CP2
from tests.distributed.test_training import DISTRIBUTED_OPTIMIZER, scalars

EOD = VOCABULARY - 1  # NullTokenizer's
MASKED = ["--packing", "document-mask", "--perturb-documents"]


@pytest.fixture(scope="module")
def checkpoint(ranks, tiny_llama, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "checkpoint"
    ranks.run(1, import_hf, tiny_llama, folder)
    return folder


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    """Documents of 3 to 29 tokens, each closed by EOD."""
    path = tmp_path_factory.mktemp("documents") / "short"
    builder = IndexedDatasetBuilder(get_bin_path(str(path)), dtype=DType.optimal_dtype(VOCABULARY))
    generator = np.random.default_rng(4)
    for _ in range(80):
        ids = np.append(generator.integers(0, EOD, generator.integers(2, 29)), EOD)
        builder.add_document(torch.from_numpy(ids), [len(ids)])
    builder.finalize(get_idx_path(str(path)))
    return path


LOGGED = (
    "lm loss", "view kl", "mean split", "mean shift", "mean length", "documents per sequence", "masked border share",
    "long document share", "grad-norm",
)  # fmt: skip


def test_a_resumed_run_repeats_the_uninterrupted_one(ranks, checkpoint, prefix, tmp_path):
    """Over two lengths: windows are cut into rows whose first document may begin in the middle of one."""
    base = [*run_arguments(checkpoint, prefix, 6), *MASKED, "--length-mix", "0.5:32", "0.5:16", *DISTRIBUTED_OPTIMIZER]
    saved = ["--save", str(tmp_path / "run"), "--save-interval", "3", "--load", str(tmp_path / "run")]
    runs = {}
    for name, flags in (("whole", []), ("first", [*saved, "--exit-interval", "3"]), ("second", saved)):
        output = ranks.run(2, training_job.train, [*base, *flags, "--tensorboard-dir", str(tmp_path / name)])
        runs[name] = {key: scalars(tmp_path / name, key) for key in LOGGED}
        said = [line for line in output[0].splitlines() if line.startswith("packing: ")]
        assert len(said) == 1 and "attention cut at documents, positions reset" in said[0]
    for key, expected in runs["whole"].items():
        assert runs["first"][key] + runs["second"][key] == expected and len(expected) == 6, key
    documents, borders = runs["whole"]["documents per sequence"], runs["whole"]["masked border share"]
    assert min(documents) > 1.2 and min(runs["whole"]["view kl"]) > 0 and min(runs["whole"]["mean split"]) > 0
    for count, share in zip(documents, borders, strict=True):  # every border inside a row, and no other, is masked
        assert 0.9 * (count - 1) / LENGTH <= share <= 1.1 * (count - 1) / (LENGTH // 2)


def test_longce_reads_short_contexts_within_a_document(ranks, checkpoint, prefix, tmp_path):
    """No document is longer than the short context, so the long one brings nothing: every weight is 1."""
    longce = ["--objective", "standard", "--longce", "--longce-context", "32", "--longce-stride", "16"]
    weights = {}
    for name, flags in (("cut", MASKED[:2]), ("whole", [])):
        typed = [*run_arguments(checkpoint, prefix, 2), "--seq-length", "64", *longce, *flags]
        ranks.run(1, training_job.train, [*typed, "--tensorboard-dir", str(tmp_path / name)])
        weights[name] = scalars(tmp_path / name, "longce weight")
    assert weights["cut"] == pytest.approx([1, 1], abs=1e-5) and abs(weights["whole"][0] - 1) > 1e-3


L = 128
PACKED = [
    [system("be kind"), user("hi"), assistant("hello you"), system("be short"), user("bye"), assistant("bye bye")],
    [user("2+2?"), assistant("4"), user("3+3?"), assistant("6")],  # two conversations by STARTS
    [system("count"), user("to 3"), assistant("1 2 3"), system("spell"), user("no"), assistant("n o")],
    [user("a"), assistant("b"), system("x"), user("c"), assistant("d"), system("y"), user("e"), assistant("f")],
]
STARTS = {1: [0, 2]}


def conversations_alone(folder: Path, tmp_path: Path) -> dict[str, float]:
    """Mean CLM and KL over the assistant's tokens, every conversation read by itself by the written-out model."""
    model, tokenizer = PlainLlama(folder), AutoTokenizer.from_pretrained(save_chat_tokenizer(tmp_path / "m", MARKED))
    sums = torch.zeros(4, dtype=torch.float64)
    for index, line in enumerate(keyed_generator(1234, 0x52505350, 0).permutation(len(PACKED))):
        turns, parts = PACKED[line], []
        for turn in turns:
            if turn["role"] == "system" or not parts or sum(map(len, parts)) in STARTS.get(line, ()):
                parts.append([])
            parts[-1].append(turn)
        encoded = [
            tokenizer.apply_chat_template(part, return_dict=True, return_assistant_tokens_mask=True) for part in parts
        ]
        lengths = [len(part["input_ids"]) for part in encoded]
        assert sum(lengths) < L
        views = draw_document_views(ViewSampler(9, "skip", L), index, [*lengths, L - sum(lengths)]).views
        for part, length, view in zip(encoded, lengths, views, strict=False):
            ids, mask = torch.tensor(part["input_ids"]), torch.tensor(part["assistant_masks"])[1:]
            causal = torch.ones(length, length).tril().bool()
            one, other = (
                model.logits(ids, at, causal)[:-1] for at in (torch.arange(length), view.position_ids(length))
            )
            suffix = mask * (torch.arange(length - 1) >= view.split)
            clm, kl = clm_per_token(one, ids[1:]) * mask, reverse_kl_per_token(other, one) * suffix
            sums += torch.stack([clm.sum(), mask.sum(), kl.sum(), suffix.sum()]).detach()
    return {"lm loss": (sums[0] / sums[1]).item(), "view kl": (sums[2] / sums[3]).item()}


def test_conversations_of_a_line_do_not_see_each_other(ranks, checkpoint, tiny_llama, tmp_path):
    lines = [{"messages": turns} | ({"starts": STARTS[n]} if n in STARTS else {}) for n, turns in enumerate(PACKED)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    typed = [
        *run_arguments(checkpoint, tmp_path / "chats.jsonl", 2), "--sft", "--seq-length", str(L), "--rpsd-seed", "9",
        "--tokenizer-type", "HuggingFaceTokenizer",
        "--tokenizer-model", str(save_chat_tokenizer(tmp_path / "tokenizer", PLAIN)),
    ]  # fmt: skip
    losses, said = {}, {}
    for name, flags in (("cut", ["--perturb-documents", *CP2]), ("joined", ["--packing", "concatenate"])):
        log = ["--tensorboard-dir", str(tmp_path / name)]
        said[name] = ranks.run(2, training_job.train, [*typed, *flags, *log])[0]
        losses[name] = {key: scalars(tmp_path / name, key)[0] for key in ("lm loss", "view kl")}
    expected = conversations_alone(tiny_llama, tmp_path)
    assert losses["cut"] == pytest.approx(expected, rel=1e-5) and expected["view kl"] > 0.01
    assert abs(losses["joined"]["lm loss"] - expected["lm loss"]) > 1e-3
    assert "packed in one line do not see each other" in said["cut"] and "packing: " in said["cut"]
    assert "packed in one line see each other" in said["joined"] and "packing: " not in said["joined"]


REFUSED = [
    (["--perturb-documents"], ["--perturb-documents", "add --packing document-mask"]),
    (["--packing", "concatenate", "--reset-position-ids"], ["--packing concatenate --reset-position-ids"]),
    ([*MASKED, "--rpsd-execution", "shared-prefix"], ["--rpsd-execution shared-prefix", "leave it out"]),
    ([*MASKED, "--rpsd-perturbation", "nope"], ["--perturb-documents", "nope views have no split"]),
    ([*MASKED, "--objective", "standard"], ["--perturb-documents", "--objective standard"]),
    ([*MASKED, "--rpsd-split-range", "0", "0.5"], ["--rpsd-split-range", "--perturb-documents"]),
    (["--split", "969,30,1"], ["the 80 documents of --data-path", "test 0 (0 tokens) for 0", "use --split 969,30,0"]),
    (["--eval-iters", "1"], ["--eval-iters 1 evaluates on 8 validation samples", "--split 100,0,0 leaves no data"]),
    ([*MASKED, "--data-path", "UNENDED"], ["--packing document-mask", "end with none", f"EOD token is {EOD}"]),
]  # fmt: skip


def test_bad_packing_is_one_line_and_exit_code_2(ranks, checkpoint, prefix, tmp_path):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"unended{suffix}").write_bytes(Path(f"{prefix}{suffix}").read_bytes())
    needed = [field for field in dataclasses.fields(Manifest) if field.default is dataclasses.MISSING]
    fields = {field.name: () if "tuple" in str(field.type) else 1 for field in needed}
    write_manifest(tmp_path / "unended", Manifest(**{**fields, "eod_id": None}))
    places = {"UNENDED": str(tmp_path / "unended")}
    lines = [
        [*run_arguments(checkpoint, prefix, 2), *(places.get(flag, flag) for flag in flags)] for flags, _ in REFUSED
    ]
    answers = ranks.run(1, document_job.all_refused, lines)[0]
    for (_, parts), (code, text) in zip(REFUSED, answers, strict=True):
        assert code == 2 and len(text.splitlines()) == 1, text
        for part in parts:
            assert part in text
