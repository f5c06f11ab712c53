"""Plans against Megatron's dry run at their world size, the plan of memory against live tensors, and the recipes."""

from __future__ import annotations

import argparse
import dataclasses
import random
import re
from itertools import batched
from pathlib import Path

import pytest

from examples.arms.run import read_flags
from megatron_rpsd.planning.activations import LOCAL
from megatron_rpsd.planning.gpus import GPUS, Assumptions
from megatron_rpsd.planning.known_models import KNOWN_MODELS, of_config, planned_model
from megatron_rpsd.planning.layout_search import default_global_batch_size, search
from megatron_rpsd.planning.layouts import Layout, Workload, every_layout, refusal
from megatron_rpsd.planning.memory import dynamic_items, peak_memory, static_items
from megatron_rpsd.planning.roofline import step_time
from megatron_rpsd.planning.scaling import scaling_markdown, scaling_rows
from megatron_rpsd.runs.attempts import command_words
from megatron_rpsd.training.arms import default_granule
from tests.chat_tokenizer import assistant, save_chat_tokenizer, user, write_chats
from tests.distributed import plan_job

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
H100 = GPUS["h100-80gb"]
RECIPES = {"llama3_8b_64k": ("llama3-8b", 65536), "qwen3_4b_256k": ("qwen3-4b", 262144)}
SIZES = (16, 32, 64)
ADAPTATION = ("standard", "pose", "longce", "rpsd-skip", "rpsd-longce")
TUNING = ("rpsd-sft", "standard")
SHORT_OF_MEMORY = ("bf16_moments", "offload_optimizer", "offload_activations")


def small(name: str, **more) -> dict:
    """A known model's configuration with sizes that many degrees divide."""
    return KNOWN_MODELS[name] | {
        "num_hidden_layers": 24, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 8, "vocab_size": 1000, **more,
    }  # fmt: skip


def case(config: dict, layout: Layout, work: Workload) -> tuple[dict, Layout, list[str]]:
    return config, layout, [*layout.arguments(), *work.arguments()]


def random_cases(count: int, seed: int, distinct: bool = False) -> list[tuple[dict, Layout, list[str]]]:
    """Allowed layouts of random world sizes up to 1,536, tied and untied, with and without biases and head norms.

    `distinct`: no world size twice.
    """
    draw, cases = random.Random(seed), []
    configs = [small(name) for name in ("llama3-8b", "qwen3-4b", "qwen2.5-7b", "smollm2-135m")]
    while len(cases) < count:
        config, world = draw.choice(configs), draw.choice((1, 2, 3)) * 2 ** draw.randrange(0, 10)
        work = Workload(2 ** draw.randrange(13, 18), world * draw.choice((1, 2)))
        layout = dataclasses.replace(
            draw.choice(list(every_layout(world))), recompute=draw.choice(("none", "selective", "full"))
        )
        again = distinct and world in {layout.gpus for _, layout, _ in cases}
        if not again and refusal(layout, of_config("small", config).dims, work) is None:
            cases.append(case(config, layout, work))
    return cases


def chosen(name: str, length: int, gpus: int) -> tuple[dict, Layout, list[str]]:
    """The layout that `tools/plan_run.py` prints."""
    work = Workload(length, default_global_batch_size(length))
    return case(KNOWN_MODELS[name], search(planned_model(name), work, gpus, H100).chosen.layout, work)


def agree(ranks, cases: list) -> None:
    found = [stages for some in batched(cases, 12) for stages in ranks.run(1, plan_job.shards, list(some))[0]]
    assert len(found) == len(cases)
    for (_, layout, _), stages in zip(cases, found, strict=True):
        assert len(stages) == min(layout.pp, 3)
        for rank, planned, built in stages:
            assert planned == built > 0, (layout.name, rank)


def test_megatron_builds_what_was_planned(ranks):
    recipes = [chosen("qwen3-4b", 262144, 32), chosen("llama3-8b", 65536, 16)]
    for recipe, (name, length) in RECIPES.items():
        for gpus in SIZES:
            recipes.append(
                case(KNOWN_MODELS[name], layout_of(recipe, gpus), Workload(length, default_global_batch_size(length)))
            )
    agree(ranks, [*recipes, *random_cases(10, seed=0, distinct=True)])


@pytest.mark.slow
def test_megatron_builds_what_was_planned_many(ranks):
    every = [chosen(name, length, gpus) for name in KNOWN_MODELS for length in (65536, 262144) for gpus in (64, 256)]
    agree(ranks, [*every, *random_cases(60, seed=1)])


MIB = 2**20
SHAPE = {"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1024}  # fmt: skip
PAIR, ONE_VIEW = Workload(512, 1, chunk_bytes=2 * MIB), Workload(512, 1, "standard", chunk_bytes=2 * MIB)
LIVE = {
    "pair": ("llama3-8b", Layout(1, 1, 1, 1), PAIR, 128),
    "one view": ("llama3-8b", Layout(1, 1, 1, 1), ONE_VIEW, None),
    "head norms, selective": ("qwen3-4b", Layout(1, 1, 1, 1, "selective"), PAIR, 0),
    "full": ("qwen3-4b", Layout(1, 1, 1, 1, "full"), dataclasses.replace(PAIR, chunk_bytes=MIB // 4), 128),
    "TP 2 x CP 2": ("llama3-8b", Layout(2, 2, 1, 1), PAIR, 128),
    "TP 2 x CP 2, full": (
        "llama3-8b",
        Layout(2, 2, 1, 1, "full"),
        dataclasses.replace(PAIR, chunk_bytes=MIB // 4),
        128,
    ),
}


@pytest.mark.parametrize("name", LIVE)
def test_tensors_alive_at_the_peak_are_those_planned(ranks, name):
    """By torch's dispatcher on the CPU: every storage from the operation that made it until its last tensor is gone."""
    model, layout, work, start = LIVE[name]
    config = KNOWN_MODELS[model] | SHAPE
    dims = of_config("small", config).dims
    planned = dynamic_items(dims, layout, work, 0, start, LOCAL)
    static = static_items(dims, layout, work, 0, LOCAL)
    for kept, peak in ranks.run(layout.gpus, plan_job.live_peak, config, layout, work, start):
        assert kept == pytest.approx(static["weights"] + static["gradients"], rel=1e-3)  # the buffer's alignment
        # On several ranks the plan takes the one that compares most tokens.
        off = 0.05 if layout.gpus == 1 else 0.08
        assert max(sum(items.values()) for items in planned.values()) == pytest.approx(peak, rel=off), (name, planned)


def files_of(recipe: str, gpus: int, arm: str, tuning: bool) -> list[Path]:
    """The args files of a run, in the order in which docs/full_size.md gives them."""
    shared, mine = EXAMPLES / "full_size", EXAMPLES / recipe
    files = [EXAMPLES / "arms" / "common.txt", shared / "adaptation.txt", mine / "model.txt", mine / f"gpus_{gpus}.txt"]
    files += [shared / "sft.txt"] if tuning else []
    return [*files, EXAMPLES / "arms" / arm / "args.txt"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_pass_the_check_before_a_job(ranks, recipe, tmp_path):
    name, length = RECIPES[recipe]
    chats = write_chats(tmp_path / "chats.jsonl", [[user("a?"), assistant("b")]] * 4)
    runs = [(gpus, arm, False) for gpus in SIZES for arm in ADAPTATION] + [(16, arm, True) for arm in TUNING]
    commands = []
    for number, (gpus, arm, tuning) in enumerate(runs):
        data = ["--data-path", str(chats)] if tuning else ["--mock-data"]
        commands.append((gpus, command_words(tmp_path / f"run{number}", files_of(recipe, gpus, arm, tuning), data)))
    if "recompute" not in files_of(recipe, 16, "standard", False)[3].read_text():  # offloading is refused beside it
        for option in SHORT_OF_MEMORY:
            runs.append((16, "rpsd-skip", False))
            files = [*files_of(recipe, 16, "rpsd-skip", False), EXAMPLES / "full_size" / f"{option}.txt"]
            commands.append((16, command_words(tmp_path / option, files, ["--mock-data"])))
    tokenizer = save_chat_tokenizer(tmp_path / "tokenizer")
    (found,) = ranks.run(1, plan_job.checked_commands, KNOWN_MODELS[name], tmp_path / "model", tokenizer, commands)
    model = planned_model(name)
    for (gpus, arm, tuning), args in zip(runs, found, strict=True):
        assert args["world_size"] == gpus and args["seq_length"] == args["max_position_embeddings"] == length
        assert args["num_layers"] == model.dims.num_layers and args["hidden_size"] == model.dims.hidden_size
        assert args["train_iters"] == (250 if tuning else 1000) and args["lr"] == (2e-5 if tuning else 1e-5)
        assert args["rotary_base"] > model.rope()[0] and args["bf16"] and args["conversations"] is tuning
        assert args["objective"] == ("pose" if arm == "pose" else "rpsd" if "rpsd" in arm else "standard")
        assert args["longce"] is ("longce" in arm)


def layout_of(recipe: str, gpus: int) -> Layout:
    """The layout that a recipe's file asks for."""
    flags = read_flags(EXAMPLES / recipe / f"gpus_{gpus}.txt")
    given = {flag: value for flag, value in zip(flags, [*flags[1:], ""], strict=True) if flag.startswith("--")}
    degrees = [int(given[f"--{name}-parallel-size"]) for name in ("tensor-model", "context", "pipeline-model")]
    layout = Layout(
        *degrees, gpus // degrees[0] // degrees[1] // degrees[2], given.get("--recompute-granularity", "none")
    )
    assert flags == layout.arguments()
    return layout


@pytest.mark.parametrize("gpus", SIZES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_run_what_the_plan_finds_good(recipe, gpus):
    name, length = RECIPES[recipe]
    model, layout = planned_model(name), layout_of(recipe, gpus)
    for longce in (False, True):
        work = Workload(length, default_global_batch_size(length), longce=longce)
        assert refusal(layout, model.dims, work) is None
        memory = peak_memory(model.dims, layout, work, H100, Assumptions())
        assert memory.total + 8 * 2**30 < H100.memory_bytes  # room for what the plan has wrong
    found = search(model, Workload(length, default_global_batch_size(length)), gpus, H100)
    (mine,) = [plan for plan in found.plans if plan.layout == layout]
    assert mine.time.total < 1.03 * found.chosen.time.total
    said = re.search(r"predicted (\d+) s a step, (\d+) GiB", (EXAMPLES / recipe / f"gpus_{gpus}.txt").read_text())
    assert (int(said[1]), int(said[2])) == (round(mine.time.total), round(mine.memory.total / 2**30))


def document(name: str) -> str:
    return (EXAMPLES.parent / "docs" / name).read_text()


def test_the_documents_hold_what_the_plan_says():
    for recipe, (name, length) in RECIPES.items():
        model, batch = planned_model(name), default_global_batch_size(length)
        for gpus in SIZES:
            layout = layout_of(recipe, gpus)
            arms = [(objective, longce) for objective in ("standard", "rpsd") for longce in (False, True)]
            works = [Workload(length, batch, objective, longce=longce) for objective, longce in arms]
            seconds = [step_time(model, layout, work, H100).total for work in works]
            memory = peak_memory(model.dims, layout, works[2], H100, Assumptions()).total / 2**30
            said = " | ".join(f"{second:.0f}" for second in [*seconds, seconds[2] * 1000 / 3600])
            row = f"| `{recipe}` | {gpus} | {layout.name} | {memory:.0f} | {said} |"
            assert row in document("full_size.md"), row
    rows = scaling_rows(
        planned_model("llama3-8b"), lambda length: Workload(length, default_global_batch_size(length)), H100,
        Assumptions(), lengths=(65536,),
    )  # fmt: skip
    table = scaling_markdown(rows, planned_model("llama3-8b"), H100, Assumptions()).splitlines()
    assert document("plan_llama3_8b.md").splitlines()[: len(table)] == table


def test_splits_are_as_coarse_as_the_training_draws_them():
    for tp in (1, 2, 4, 8):
        for cp in (1, 3, 8, 64):
            args = argparse.Namespace(tensor_model_parallel_size=tp, context_parallel_size=cp)
            for length in (96 * tp * cp, 65536, 2**20):
                assert Layout(tp, cp, 1, 1).granule(length) == default_granule(args, length)


def test_every_number_of_a_recipe_has_a_source():
    files = [*(EXAMPLES / "full_size").glob("*.txt"), *(path for r in RECIPES for path in (EXAMPLES / r).glob("*.txt"))]
    assert len(files) == 2 + len(SHORT_OF_MEMORY) + 2 * (1 + len(SIZES))
    for path in files:
        # A block is comment lines and the flags behind them.
        blocks = re.findall(r"((?:^#.*\n)+)((?:^--.*\n)+)", path.read_text(), re.MULTILINE)
        flags = "".join(flags for _, flags in blocks)
        assert flags.count("\n") == len(re.findall(r"^--", path.read_text(), re.MULTILINE)), path
        for comment, flags in blocks:
            assert re.search(r"arXiv|ProLong|config\.json|plan_run\.py|\(ours|are ours|is ours", comment), (path, flags)
