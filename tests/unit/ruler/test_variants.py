"""Position grids and shuffled slots: paired, placed where they say, and never under RULER's names."""

from __future__ import annotations

import json

import pytest

from megatron_rpsd.ruler.generate import Recipe, generate
from megatron_rpsd.ruler.sources import Sources
from megatron_rpsd.ruler.synthetic import SyntheticSources
from megatron_rpsd.ruler.tasks import RULER_TASKS, SHUFFLE_TASKS, find_task

DEPTHS = (0.0, 0.25, 0.5, 0.9, 1.0)
NAMES = ("niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3")
NAMES += ("niah_multivalue", "niah_multiquery", "vt")


@pytest.fixture(scope="module")
def synthetic() -> SyntheticSources:
    return SyntheticSources()


def made(name: str, counter, synthetic, number: int, depths=(), length: int = 3000) -> list[tuple[dict, dict]]:
    task = RULER_TASKS[name.split("@")[0]]
    source = synthetic if task.source in ("essay", "squad", "hotpotqa") else Sources(None)
    wanted = name.replace("@", "@synthetic@", 1) if source is synthetic else name
    wanted = f"{wanted}@synthetic" if source is synthetic and "@" not in name else wanted
    recipe = Recipe(find_task(wanted, grid=bool(depths)), length, number, depths=tuple(depths))
    return list(generate(recipe, counter, source))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("counted", ["ws", "pieces"])
def test_one_item_at_every_depth(name: str, counted: str, request, synthetic) -> None:
    counter = request.getfixturevalue(counted)
    rows = made(name, counter, synthetic, 3, DEPTHS)
    assert [(where["item"], where["depth"]) for _, where in rows] == [(i, d) for i in range(3) for d in DEPTHS]
    assert [where["sample"] for _, where in rows] == list(range(15)) and len({w["id"] for _, w in rows}) == 15
    haystacks = set()
    for item in range(3):
        without, asked, places = set(), set(), []
        for fields, where in rows[item * 5 : item * 5 + 5]:
            text = fields["input"] + fields["answer_prefix"]
            assert counter.whole(text) == where["prompt_tokens"] <= 3000 - RULER_TASKS[name].generated_tokens
            spans = sorted(span for entry in where["evidence"] for span in entry["characters"])
            for entry in where["evidence"]:
                ((start, stop),) = entry["characters"]
                needle = text[start:stop]
                assert (
                    needle.startswith("VAR " if name == "vt" else "One of the special") and entry["reference"] in needle
                )
            start, stop = spans[0][0], spans[-1][1]
            # The block of evidence goes, with the blanks on one side of it.
            before, after = text[:start], text[stop:].lstrip(" ") if name == "vt" else text[stop:]
            without.add(before + after[1:] if where["depth"] < 1 else before[:-1] + after)
            asked.add((tuple(fields["outputs"]), text[text.rindex("mentioned in") :] if name != "vt" else ""))
            places.append(where["evidence"][0]["tokens"][0][0])
        assert len(without) == len(asked) == 1, "the depths differ in more than the evidence's place"
        assert places == sorted(set(places))
        haystacks |= without
    assert len(haystacks) == 3, "items have needles of their own"


def test_depths_are_shares_of_the_haystack(ws, synthetic) -> None:
    for _, where in made("niah_multikey_2", ws, synthetic, 2, (0.0, 0.5, 1.0)):
        share = where["evidence"][0]["tokens"][0][0] / where["prompt_tokens"]
        assert share == pytest.approx(where["depth"], abs=0.06)


def test_an_item_follows_from_seed_and_number_alone(ws, synthetic) -> None:
    for name, depths in (("niah_multikey_1", DEPTHS[:2]), ("cwe@shuffle", ())):
        few, many = made(name, ws, synthetic, 2, depths), made(name, ws, synthetic, 4, depths)
        assert json.dumps(many[: len(few)]) == json.dumps(few)


def slots(name: str, counter, synthetic) -> list[float]:
    """Where the first reference's first evidence starts, as a share of the prompt, of 8 samples."""
    rows = made(name, counter, synthetic, 8, length=4096)
    for fields, where in rows:
        text = fields["input"] + fields["answer_prefix"]
        for entry in where["evidence"]:
            for start, stop in entry["characters"]:
                assert name.startswith("qa") or text[start:stop] == entry["reference"]
        held = "".join(text[start:stop] for entry in where["evidence"] for start, stop in entry["characters"])
        assert fields["outputs"][0] in held
    return [where["evidence"][0]["tokens"][0][0] / where["prompt_tokens"] for _, where in rows]


@pytest.mark.parametrize("name", ["qa_1", "qa_2", "cwe", "fwe"])
def test_golds_slot_is_frozen_in_rulers_tasks_and_varies_in_ours(name: str, ws, synthetic) -> None:
    frozen, varied = slots(name, ws, synthetic), slots(name + "@shuffle", ws, synthetic)
    # Texts differ in length, and so do shares of one slot. The first place of a word that stands often is always early.
    spread = max(frozen) - min(frozen)
    assert spread < 0.1
    assert max(varied) - min(varied) > 3 * spread + 0.005


def test_names_and_dialects() -> None:
    assert set(SHUFFLE_TASKS) == {
        *(f"{name}@shuffle" for name in ("qa_1", "qa_2", "cwe", "fwe")),
        *(f"{name}@synthetic@shuffle" for name in ("qa_1", "qa_2")),
    }
    assert find_task("vt", grid=True).name == "vt@grid" and find_task("vt", grid=True).dialect == "RULER@grid"
    assert find_task("qa_1@synthetic@shuffle").dialect == "RULER@synthetic@shuffle"
    assert find_task("qa_1").dialect == "RULER"
    for name in ("qa_1", "cwe", "fwe"):
        with pytest.raises(ValueError, match="only niah and vt"):
            find_task(name, grid=True)
    with pytest.raises(ValueError, match="ascending"):
        Recipe(find_task("vt", grid=True), 4096, 1, depths=(0.5, 0.2))


def test_a_grid_that_does_not_fit_is_one_line(ws, synthetic) -> None:
    with pytest.raises(ValueError, match="--length 200 cannot hold a sample of niah_multikey_2@grid"):
        made("niah_multikey_2", ws, synthetic, 1, DEPTHS, length=200)
