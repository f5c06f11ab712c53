"""Samples as Megatron's loader gives them, and the way back from a token to its file."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tiny_tiktoken import EOD, PATTERN, save_tiktoken  # noqa: E402

from megatron_rpsd.data.audit import Reading, audit  # noqa: E402
from megatron_rpsd.data.manifest import check_files  # noqa: E402
from megatron_rpsd.data.preprocess import PreprocessConfig, preprocess  # noqa: E402
from megatron_rpsd.data.samples import Order, Samples  # noqa: E402
from megatron_rpsd.positions import ViewSampler, draw_document_views  # noqa: E402

LENGTH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file, JSONL under gzip, and a repository; packed, concatenated, joined."""
    folder = tmp_path_factory.mktemp("samples")
    (folder / "a.txt").write_text("".join(f"line {number} é\n" for number in range(12)))
    lines = [json.dumps({"text": f"\n{number}: ünï" * (1 + number % 5)}, ensure_ascii=number % 2 == 0)
             for number in range(20)]  # fmt: skip
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "c.jsonl").write_text("\n".join(lines))
    (folder / "repo").mkdir()
    for name in "xyz":
        (folder / "repo" / f"{name}.py").write_text(f"# {name}\n" * 5 + f"{name} = 'é'\n")
    tokenizer = save_tiktoken(folder / "bytes.tiktoken")
    files = [folder / name for name in ("a.txt", "b.jsonl.gz", "c.jsonl")]
    for mode, inputs in (("pack", files), ("concatenate", files), ("repo", [folder / "repo"])):
        preprocess(PreprocessConfig(inputs, tokenizer, folder / mode, LENGTH, tiktoken_pattern=PATTERN, mode=mode))
    return folder


@pytest.mark.parametrize("mode", ["pack", "concatenate", "repo"])
def test_every_token_is_found_in_its_file(folder: Path, mode: str) -> None:
    samples = Samples(folder / mode, LENGTH)
    encoder = samples.encoder(folder / "bytes.tiktoken", PATTERN)
    seen, headers = set(), 0
    for sample in range(len(samples)):
        for token, value in enumerate(samples.ids(sample)[:LENGTH].tolist()):
            try:
                origin = samples.trace(sample, token, encoder)
            except ValueError as error:
                assert "is padding" in str(error) and value == EOD
                continue
            if value == EOD:
                assert origin.text == ""
                continue
            path = Path(origin.path)
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            assert value in origin.text.encode() and origin.text in origin.around
            if path.suffix in (".gz", ".jsonl"):
                line = raw[origin.byte :].split(b"\n")[0]
                assert raw[: origin.byte].count(b"\n") == origin.line - 1
                assert json.loads(line)["text"][slice(*origin.characters)] == origin.text
            elif raw[origin.byte :].startswith(origin.text.encode()):
                assert raw[: origin.byte].count(b"\n") == origin.line - 1
            else:  # the header before a repository's file, which stands in no file
                headers += 1
                assert mode == "repo"
            seen.add(path.name)
    assert len(seen) == 3
    assert (headers > 0) == (mode == "repo")


def test_training_order_is_megatrons(folder: Path) -> None:
    from types import SimpleNamespace

    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    prefix = str(folder / "concatenate")
    tokenizer = SimpleNamespace(eod=EOD, pad=-1, vocab_size=257, unique_identifiers={})
    config = GPTDatasetConfig(
        random_seed=7, sequence_length=LENGTH, blend=([prefix], None), split="90,5,5", tokenizer=tokenizer,
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        path_to_cache=str(folder / "cache"),
    )  # fmt: skip
    indexed = IndexedDataset(prefix)
    documents = np.arange(round(0.9 * len(indexed)), dtype=np.int32)
    dataset = GPTDataset(indexed, prefix, documents, 80, Split.train, config)
    samples = Samples(prefix, LENGTH, Order(7, "90,5,5", 80))
    assert len(samples) == len(dataset) >= 80
    for index in range(len(samples)):
        theirs = dataset[index]
        assert samples.ids(index)[:-1].tolist() == theirs["tokens"].tolist()
        assert samples.ids(index)[1:].tolist() == theirs["labels"].tolist()


def test_a_changed_file_is_noticed(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("what was there before" * 3)
    tokenizer = save_tiktoken(tmp_path / "bytes.tiktoken")
    preprocess(PreprocessConfig([source], tokenizer, tmp_path / "p", LENGTH, tiktoken_pattern=PATTERN))
    samples = Samples(tmp_path / "p", LENGTH)
    encoder = samples.encoder(tokenizer, PATTERN)
    assert samples.trace(1, 3, encoder).text == "r"  # character 19
    source.write_text("what is there now" * 3)
    with pytest.raises(ValueError, match=r"a\.txt gives other tokens than those stored"):
        samples.trace(1, 3, encoder)
    for sample, token, words in ((9, 0, "sample 9 does not exist"), (0, 17, "token 17 does not exist")):
        with pytest.raises(ValueError, match=words):
            samples.trace(sample, token, encoder)
    with pytest.raises(ValueError, match="is not the one"):
        samples.encoder(tokenizer, r"\w")


def test_damage_is_found_by_checksum(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text" * 9)
    tokenizer = save_tiktoken(tmp_path / "bytes.tiktoken")
    preprocess(PreprocessConfig([tmp_path / "a.txt"], tokenizer, tmp_path / "p", 8, tiktoken_pattern=PATTERN))
    check_files(tmp_path / "p")
    raw = bytearray((tmp_path / "p.bin").read_bytes())
    raw[5] ^= 1
    (tmp_path / "p.bin").write_bytes(raw)
    (tmp_path / "p.sources").unlink()
    with pytest.raises(ValueError, match=r"p\.bin is damaged.*; .*p\.sources is missing"):
        check_files(tmp_path / "p")


def test_audit_shows_the_views_of_training(folder: Path) -> None:
    samples = Samples(folder / "pack", LENGTH)
    encoder = samples.encoder(folder / "bytes.tiktoken", PATTERN)
    sampler = ViewSampler(3, "skip", LENGTH)
    shown = audit(samples, 5, encoder, Reading(sampler))
    view = sampler.view(5)
    assert shown.facts["split"] == view.split and shown.facts["mean shift"] == view.shift
    assert shown.facts["tokens with a KL"] == LENGTH - view.split
    assert shown.png.startswith(b"\x89PNG") and sum(count for _, count, _ in shown.documents) == LENGTH
    ends = np.flatnonzero(samples.ids(5)[:-1] == EOD)
    masked = audit(samples, 5, encoder, Reading(sampler, True, True, True))
    assert masked.facts["tokens with a CLM loss"] == LENGTH - len(ends)
    lengths = [count for _, count, _ in masked.documents]
    views = draw_document_views(sampler, 5, lengths)
    assert masked.facts["mean shift"] == round(views.mean_shift(LENGTH), 2)
    with pytest.raises(ValueError, match="--perturb-documents knows"):
        Reading(ViewSampler(3, "nope", LENGTH), perturb_documents=True)
