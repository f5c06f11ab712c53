"""What every split of the data must hold, refused before Megatron's builder starts; Megatron itself is the oracle."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_rpsd.data.indexed import sequence_lengths
from megatron_rpsd.training.splits import check_splits
from tests.chat_tokenizer import assistant, user, write_chats

L, WINDOWS = 16, 352


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    """Packed windows; three documents of 1 to 3 tokens; three that are longer."""
    folder = tmp_path_factory.mktemp("windows")
    for name, lengths in (("packed", [L] * WINDOWS), ("short", [1, 2, 3]), ("few", [30, 40, 50])):
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.uint16)
        for length in lengths:
            builder.add_document(torch.arange(length), [length])
        builder.finalize(str(folder / f"{name}.idx"))
        assert sequence_lengths(folder / name).tolist() == lengths
    return folder / "packed"


def arguments(prefix: Path, **changed) -> SimpleNamespace:
    """Four steps of two samples, without evaluation."""
    paths = ("data_args_path", "train_data_path", "valid_data_path", "test_data_path", "per_split_data_args_path")
    given = {
        "data_path": [str(prefix)], "split": "969,30,1", "seq_length": L, "train_iters": 4, "train_samples": None,
        "global_batch_size": 2, "eval_global_batch_size": 2, "eval_iters": 0, "eval_interval": 2,
        "start_eval_at_iter": None, "full_validation": False, "skip_train": False, "rope_phases": None,
        "conversations": False, **dict.fromkeys(paths),
    }  # fmt: skip
    return SimpleNamespace(**{**given, **changed})


class _Nothing(int):
    """Tokens of an epoch without any; the hundredth addition ends what would not end."""

    added = 0

    def __radd__(self, other: int) -> int:
        _Nothing.added += 1
        if _Nothing.added == 100:
            raise TimeoutError
        return other


def test_megatron_counts_epochs_without_tokens_for_ever() -> None:
    """When this fails, Megatron ends by itself, and a split that is not read may be empty."""
    dataset = SimpleNamespace(num_samples=0, config=SimpleNamespace(sequence_length=L, add_extra_token_to_sequence=1))
    assert GPTDataset._get_num_epochs(dataset, 1) == 1
    with pytest.raises(TimeoutError):
        GPTDataset._get_num_epochs(dataset, _Nothing(0))


ALL = "train 341 (5456 tokens) for 8 samples, validation 11 (176 tokens) for"
REFUSED = {
    "empty test": ({}, [f"--split 969,30,1: the {WINDOWS} documents of --data-path", f"{ALL} 0 samples, "
                        "test 0 (0 tokens) for 0 samples; test has none", "use --split 969,30,0"]),
    "empty test that is read": ({"eval_iters": 1}, [f"{ALL} 6 samples", "test needs --seq-length 16 + 1 = 17 tokens"]),
    "too short a test": ({"split": "99,1,1", "eval_iters": 1, "seq_length": 56}, ["test 3 (48 tokens) for 2 samples",
                         "--seq-length 56 + 1 = 57", "use --split 99,1,0"]),
    "empty validation": ({"split": "999,1,0", "eval_iters": 2}, ["validation 0 (0 tokens) for 12 samples",
                         "use --split 999,0,0 --eval-iters 0"]),
    "no validation": ({"split": "1,0,0", "eval_iters": 2}, ["--eval-iters 2 evaluates on 12 validation samples",
                      "--split 1,0,0 leaves no data for it: add --eval-iters 0"]),
    "no training": ({"split": "0,1,0"}, ["--split 0,1,0 leaves no data for the 8 training samples"]),
    "too long": ({"split": "1,0,0", "seq_length": 6000}, ["train 352 (5632 tokens)", "6000 + 1 = 6001", "shorter"]),
    "no split": ({"split": None}, ["--split is not set", "add --split 100,0,0"]),
    "four shares": ({"split": "1,1,1,1"}, ["--split 1,1,1,1: up to three shares"]),
    "negative": ({"split": "50,60,-10"}, ["--split 50,60,-10: up to three shares"]),
    "no numbers": ({"split": "a,b,c"}, ["--split a,b,c: up to three shares"]),
    "no shares": ({"split": "0,0"}, ["--split 0,0: up to three shares"]),
    "one source": ({"data_path": ["1", "PACKED", "1", "FEW"], "split": "90,10,0"},
                   ["the 3 documents of --data-path", "validation 0 (0 tokens)", "use --split 90,0,0,"]),
    "by length": ({"data_path": ["PACKED", "PACKED", "SHORT"], "split": "1,0,0", "train_iters": 0},
                  ["train 3 (6 tokens) for 0 samples; train needs"]),
    "own file": ({"data_path": None, "split": None, "train_data_path": ["PACKED"], "valid_data_path": ["SHORT"],
                  "eval_iters": 1}, ["--valid-data-path: the 3 documents", "validation 3 (6 tokens) for 6 samples"]),
    "own file missing": ({"data_path": None, "split": None, "train_data_path": ["PACKED"], "full_validation": True},
                         ["--full-validation evaluates on all validation samples"]),
    "phase": ({"rope_phases": "a:theta=10000,seq=16,samples=4,data=SHORT;b:theta=20000,seq=16", "split": "1,0,0"},
              ["train 3 (6 tokens) for 4 samples"]),
    "recipe": ({"data_path": None, "data_args_path": "nowhere"}, ["--data-args-path nowhere: no such file"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_split_that_gives_too_little_is_refused_in_one_line(prefix, case) -> None:
    changed, words = REFUSED[case]
    typed = json.dumps(changed)
    for name in ("packed", "short", "few"):
        typed = typed.replace(name.upper(), str(prefix.parent / name))
    with pytest.raises(ValueError) as refused:
        check_splits(arguments(prefix, **json.loads(typed)))
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value), str(refused.value)


@pytest.mark.parametrize(
    ("split", "eval_iters", "source"),
    [("969,30,0", 1, 1), ("100,0,0", 0, 1), ("98,1,1", 1, 1), ("969,30,0", 1, 2)],
)
def test_what_is_let_through_is_built_as_counted(prefix, tmp_path, split, eval_iters, source) -> None:
    """By Megatron, with as many documents in each split as a refusal would have said."""
    paths = [str(prefix)] if source == 1 else ["3", str(prefix), "1", str(prefix)]
    args = arguments(prefix, split=split, eval_iters=eval_iters, data_path=paths)
    check_splits(args)
    tokenizer = SimpleNamespace(eod=-1, pad=-2, eos=-1, vocab_size=99, unique_identifiers={}, special_tokens_dict={})
    blend = ([str(prefix)] * source, None if source == 1 else [3.0, 1.0])
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=L, blend=blend, split=split, path_to_cache=str(tmp_path), tokenizer=tokenizer,
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    sizes = [8, 6 * eval_iters, 2 * eval_iters]
    built = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    for dataset, asked in zip(built, sizes, strict=True):
        assert dataset is None or len(dataset) >= asked
        assert dataset is not None or not asked or dataset is built[2]
    if split == "98,1,1":
        assert [len(dataset.indices) for dataset in built] == [345, 3, 4]
        with pytest.raises(ValueError, match=r"train 345 .* validation 3 .* test 4 "):
            check_splits(arguments(prefix, split=split, eval_iters=1, seq_length=60))


def test_lines_of_conversations_are_samples(tmp_path) -> None:
    path = write_chats(tmp_path / "chats.jsonl", [[user("a"), assistant("b")]] * 3)
    check_splits(arguments(path, conversations=True, split="90,5,5"))  # nothing is read of the empty ones
    with pytest.raises(ValueError, match=r"the 3 lines of .* give train 3 for 8 samples, validation 0 for 6 samples"):
        check_splits(arguments(path, conversations=True, split="90,10,0", eval_iters=1))


def test_little_of_a_large_index_is_read(prefix, monkeypatch) -> None:
    """Numbers of documents are in the head; of the lengths only as many are read as show that there is enough."""
    import megatron_rpsd.training.splits as splits

    lengths = np.broadcast_to(np.int32(20), math.prod([1 << 16, 1 << 16]))  # 16 GiB, were it an array
    monkeypatch.setattr(splits, "sequence_lengths", lambda prefix: lengths)
    check_splits(arguments(prefix, split="50,25,25", eval_iters=1))
