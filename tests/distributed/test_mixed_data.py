"""A recipe prepared and trained on through Megatron's blended datasets: the shares seen, and every token's file."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from megatron_rpsd.checkpoint.convert import import_hf
from megatron_rpsd.data.audit import Reading, audit
from megatron_rpsd.data.mixture import prepare_mixture
from megatron_rpsd.data.samples import Order, Samples, read_samples
from megatron_rpsd.positions import ViewSampler
from tests.chat_tokenizer import CHARACTERS, save_chat_tokenizer
from tests.distributed import mixture_job
from tests.distributed.corpus import run_arguments
from tests.distributed.models import LENGTH

SHARES = {"long": 0.5, "short": 0.3, "code": 0.2}
# A sample's characters say its source; "File: p.py", before a repository's file, has none of them, nor has padding,
# which Megatron reads as token 0, "a".
LETTERS = {"long": "bcdg", "short": "vwxz", "code": "0123456789"}
RECIPE = "".join(
    f'[[source]]\nname = "{name}"\nshare = {share}\ninputs = ["{inputs}"]\nmode = "{mode}"\n'
    for (name, share), inputs, mode in zip(
        SHARES.items(), ("long.jsonl", "short.jsonl", "repository"), ("whole", "pack", "repo"), strict=True
    )
)
STEPS, BATCH, SEED = 5, 4, 1234


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder, draw = tmp_path_factory.mktemp("mixed"), random.Random(5)
    for name, low, high in (("long", 70, 200), ("short", 3, 20)):
        lines = ["".join(draw.choices(LETTERS[name], k=draw.randrange(low, high))) for _ in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (folder / "repository").mkdir()
    for name in "pqrs":
        (folder / "repository" / f"{name}.py").write_text("".join(draw.choices(LETTERS["code"], k=300)))
    (folder / "mix.toml").write_text(RECIPE)
    tokenizer = save_chat_tokenizer(folder / "tokenizer")
    settings = {"tokenizer": tokenizer, "output_prefix": folder / "mix", "seq_length": LENGTH}
    prepare_mixture(folder / "mix.toml", settings)
    return folder


def run(folder: Path, steps: int) -> list[str]:
    base = run_arguments(folder / "checkpoint", folder / "mix", steps)
    base[base.index("--data-path") : base.index("--data-path") + 2] = [
        "--data-args-path",
        str(folder / "mix.data_args"),
    ]
    base[base.index("NullTokenizer")] = "HuggingFaceTokenizer"
    return [*base, "--tokenizer-model", str(folder / "tokenizer"), "--packing", "document-mask", "--perturb-documents"]


def source_of(tokens: list[int]) -> str:
    text = "".join(CHARACTERS[token] for token in tokens if token < len(CHARACTERS))
    (name,) = {name for name, letters in LETTERS.items() if set(letters) & set(text)}
    return name


def test_a_run_sees_the_recipes_shares_and_every_token_is_traced_through_the_blend(
    ranks, tiny_llama, folder, tmp_path
) -> None:
    ranks.run(1, import_hf, tiny_llama, folder / "checkpoint")
    answers = ranks.run(2, mixture_job.train_telling, run(folder, STEPS))
    assert "packing: attention cut at documents" in answers[0][0] and answers[-1][0].count("lm loss: ") == STEPS
    told = [line for _, found in answers for line in found[-STEPS * BATCH // 2 :]]  # before: windows looked at
    read = {index: (dataset, tokens) for index, dataset, tokens in told}
    assert sorted(read) == list(range(STEPS * BATCH)) and len(told) == len(read)  # two replicas, no sample twice

    seen, names = Counter(), list(SHARES)
    samples = read_samples(str(folder / "mix.data_args"), LENGTH, Order(SEED, "100,0,0", STEPS * BATCH))
    encoder = samples.encoder(folder / "tokenizer")
    for index in range(STEPS * BATCH):
        dataset, tokens = read[index]
        seen[source_of(tokens)] += 1
        assert names[dataset] == source_of(tokens)
        for name, share in SHARES.items():
            assert abs(seen[name] - share * (index + 1)) <= 1, (index, seen)
        _check_trace(samples, index, tokens, encoder, folder)
    assert seen == {name: share * STEPS * BATCH for name, share in SHARES.items()}
    shown = audit(samples, 7, encoder, Reading(ViewSampler(SEED, "skip", LENGTH)))
    assert shown.facts["data"] == f"{folder / 'mix'}-{names[read[7][0]]}"
    with pytest.raises(ValueError, match="give its --train-samples N"):
        read_samples(str(folder / "mix.data_args"), LENGTH, None)
    assert isinstance(read_samples(f"{folder / 'mix'}-long", LENGTH, None), Samples)


def _check_trace(samples, index: int, tokens: list[int], encoder, folder: Path) -> None:
    """Two tokens of a sample, found in their files by hand."""
    stored = samples.ids(index)[:-1].tolist()
    padding = samples.at(index)[0].manifest.padding_id
    assert [0 if token == padding else token for token in stored] == tokens  # Megatron reads padding as token 0
    for place in (0, LENGTH // 2):
        if tokens[place] >= len(CHARACTERS) or stored[place] == padding:
            continue
        origin = samples.trace(index, place, encoder)
        assert origin.text == CHARACTERS[tokens[place]] and origin.prefix.startswith(str(folder / "mix-"))
        raw = Path(origin.path).read_bytes()
        if origin.path.endswith(".jsonl"):
            record = json.loads(raw[origin.byte :].split(b"\n")[0])
            assert raw[: origin.byte].count(b"\n") == origin.line - 1
            assert record["text"][slice(*origin.characters)] == origin.text
        elif origin.text in LETTERS["code"]:
            assert raw[origin.byte : origin.byte + 1] == origin.text.encode()
