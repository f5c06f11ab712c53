"""Recipes: sources by share and length."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tiny_tiktoken import PATTERN, ids_of, save_tiktoken  # noqa: E402

from megatron_rpsd.data.mixture import prepare_mixture, read_recipe  # noqa: E402

RECIPE = """
tokens = 2000
[[source]]
name = "long"
inputs = ["*.jsonl"]
mode = "whole"
share = 3
[[source]]
name = "short"
inputs = ["*.jsonl"]
max_tokens = 15
share = 2
"""


def settings(folder: Path) -> dict:
    return {
        "tokenizer": save_tiktoken(folder / "bytes.tiktoken"),
        "tiktoken_pattern": PATTERN,
        "output_prefix": folder / "out" / "mix",
        "seq_length": 16,
        "inputs": [],
        "mode": "mix",
    }


def test_a_recipe_becomes_prefixes_and_megatrons_arguments(tmp_path: Path) -> None:
    texts = ["x" * (number % 40) + "." for number in range(80)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = tmp_path / "mix.toml"
    recipe.write_text(RECIPE)
    said: list[str] = []
    made = prepare_mixture(recipe, settings(tmp_path), said.append)
    prefix = tmp_path / "out" / "mix"
    long, short = made[Path(f"{prefix}-long")], made[Path(f"{prefix}-short")]
    sizes = [len(ids_of(text)) for text in texts]
    assert long.tokens == sum(size // 16 * 16 for size in sizes)
    assert short.tokens - short.padding_tokens == sum(size for size in sizes if size <= 15)
    assert sum("finished shards of an earlier run" in line for line in said) == 1  # tokenized once for both
    words = Path(f"{prefix}.data_args").read_text().split()
    assert words == ["0.6", f"{prefix}-long", "0.4", f"{prefix}-short"]
    blend = json.loads(Path(f"{prefix}.blend.json").read_text())
    assert blend["sources"][0]["epochs"] == pytest.approx(1200 / long.tokens)
    assert blend["tokens_without_repetition"] == min(int(long.tokens / 0.6), int(short.tokens / 0.4))
    assert not list(prefix.parent.glob(".*"))
    (tmp_path / "mix.json").write_text(json.dumps({"source": [{"name": "a", "inputs": ["a.jsonl"], "share": 1}]}))
    assert [source.share for source in read_recipe(tmp_path / "mix.json", settings(tmp_path))[0]] == [1.0]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("share = 3", "share = 0", "source 1: share = 0 must be greater than 0"),
        ("share = 3", "share = 3\nshares = 1", "source 1 has 'shares'"),
        ('name = "long"\n', "", "source 1 has no name"),
        ('name = "long"', 'name = "short"', "two sources are named 'short'"),
        ('"whole"', '"half"', "mode = 'half'"),
        ("max_tokens = 15", 'max_tokens = "15"', "max_tokens = '15' is of the wrong kind"),
        ('["*.jsonl"]\nmode', '["*.txt"]\nmode', "source 'long': '*.txt' finds nothing"),
        ("tokens = 2000", "tokens = 0", "tokens = 0 must be"),
        ("tokens = 2000", "token = 2000", "has 'token'"),
        ("[[source]]", "[source", "cannot be read"),
    ],
)
def test_a_bad_recipe_is_one_line(tmp_path: Path, old: str, new: str, words: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    recipe = tmp_path / "mix.toml"
    assert old in RECIPE
    recipe.write_text(RECIPE.replace(old, new))
    with pytest.raises(ValueError) as error:
        prepare_mixture(recipe, settings(tmp_path))
    assert words in str(error.value) and "\n" not in str(error.value) and "--recipe" in str(error.value)


def test_the_full_size_recipe_has_prolongs_shares(tmp_path: Path) -> None:
    recipe = Path(__file__).resolve().parents[3] / "examples" / "full_size" / "prolong.toml"
    copy = tmp_path / recipe.name
    copy.write_bytes(recipe.read_bytes())
    for line in recipe.read_text().splitlines():
        if line.startswith("inputs"):
            place = tmp_path / line.split('"')[1].replace("*", "one")
            place.parent.mkdir(parents=True)
            place.mkdir() if place.name == "one" else place.touch()
    sources, tokens = read_recipe(copy, settings(tmp_path))
    shares = [source.share for source in sources]
    assert shares == pytest.approx([0.3, 0.3, 0.1, 0.1, 0.04, 0.04, 0.03, 0.03, 0.03, 0.03])
    assert [source.config.mode for source in sources] == ["repo", "whole", *["pack"] * 8]
    assert tokens == 1000 * 64 * 65536
