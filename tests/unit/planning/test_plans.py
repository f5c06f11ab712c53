"""Plans against published parameter counts, brute force and arithmetic done by hand; what the tools print."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import pytest

from megatron_rpsd.planning import step_flops
from megatron_rpsd.planning.activations import TE, core_attention, layer, layer_input, selective_layer
from megatron_rpsd.planning.gpus import GPU, GPUS, Assumptions
from megatron_rpsd.planning.known_models import KNOWN_MODELS, planned_model
from megatron_rpsd.planning.layout_search import default_global_batch_size, nothing_fits, search
from megatron_rpsd.planning.layouts import Layout, Workload, every_layout, parameters_of_stage, refusal
from megatron_rpsd.planning.memory import dynamic_items, peak_memory, static_items
from megatron_rpsd.planning.rank_shapes import rank_shape, suffix_starts
from megatron_rpsd.planning.roofline import link_of, model_flops, step_time
from megatron_rpsd.report.plan_figures import PlanBar, layout_bars

ROOT = Path(__file__).resolve().parents[3]
ONE = Layout(1, 1, 1, 1)
LLAMA, QWEN3 = planned_model("llama3-8b"), planned_model("qwen3-4b")
# Counted by transformers' own models of these configurations; no padding is needed for their vocabularies.
PARAMETERS = {
    "llama3-8b": 8030261248, "qwen3-4b": 4022468096, "qwen2.5-7b": 7615616512, "smollm2-135m": 134515008,
}  # fmt: skip


def test_parameters_are_those_of_the_published_models():
    for name, count in PARAMETERS.items():
        assert parameters_of_stage(planned_model(name).dims, ONE, 0) == count


def test_shards_and_stages_add_up_to_the_model():
    norms = (2 * LLAMA.dims.num_layers + 1) * LLAMA.dims.hidden_size
    layout = Layout(4, 1, 8, 1)
    held = sum(parameters_of_stage(LLAMA.dims, layout, stage) for stage in range(8))
    padding = 2 * (128512 - 128256) * 4096  # embedding and output weight, to a multiple of 128 x 4 rows
    assert 4 * held == PARAMETERS["llama3-8b"] + padding + 3 * norms  # norms stand on every tensor-parallel rank
    tied = [parameters_of_stage(QWEN3.dims, Layout(1, 1, 4, 1), stage) for stage in range(4)]
    assert sum(tied) == PARAMETERS["qwen3-4b"] + 151936 * 2560  # the last stage holds the embedding again


def test_every_factorisation_is_tried_once():
    layouts = list(every_layout(12))
    assert len(layouts) == len(set(layouts)) == 40  # 2^2 over four degrees: 10 ways, 3^1: 4
    assert all(layout.gpus == 12 for layout in layouts)


@pytest.mark.parametrize(
    "layout, more, said",
    [
        (Layout(16, 1, 1, 1), {}, "TP 16 > 8"),
        (Layout(3, 1, 1, 1), {}, "TP 3 does not divide 32 query heads: 32 % 3 = 2"),
        (Layout(1, 1, 5, 1), {}, "PP 5 does not divide 32 layers: 32 % 5 = 2"),
        (Layout(1, 3, 1, 1), {}, "2 x CP x TP = 6 does not divide 65536 tokens: 65536 % 6 = 4"),
        (Layout(1, 1, 1, 7), {}, "DP 7 does not divide the global batch: 64 % 7 = 1"),
        (Layout(1, 1, 2, 1), {"longce": True}, "PP must be 1, not 2"),
        (Layout(8, 1024, 1, 1), {}, "65536 tokens / a granule of 16384 = 4 splits, fewer than 8"),
        (Layout(8, 128, 1, 1), {"longce": True}, "2 x CP x TP = 2048 does not divide LongCE's windows of 5120 tokens"),
        (Layout(8, 4, 2, 1), {}, None),
    ],
)
def test_what_cannot_run_is_refused_with_the_arithmetic(layout, more, said):
    reason = refusal(layout, LLAMA.dims, Workload(65536, 64, **more))
    assert (reason is None) if said is None else (said in reason)


def test_operations_are_the_mean_over_splits():
    length = 240
    work = Workload(length, 1)
    for objective, execution, starts in (
        ("standard", "full", [None]), ("rpsd", "full", [0]), ("rpsd", "shared-prefix", range(length))
    ):  # fmt: skip
        counted = [step_flops(LLAMA.shape, length, start) for start in starts]
        step = dataclasses.replace(work, objective=objective, execution=execution)
        assert model_flops(LLAMA, step) == pytest.approx(sum(counted) / len(counted), rel=0.004)


def test_a_layer_by_hand():
    # L = 64, t = 16, CP 2, TP 2: 112 pair tokens, 56 on a rank, 28 between layers.
    layout, work = Layout(2, 2, 1, 1), Workload(64, 1)
    rank = rank_shape(LLAMA.dims, layout, work, 16)
    assert (rank.pair, rank.standard, rank.compared, rank.rows, rank.gathered) == (56, 32, 32, 28, 112)
    # Zigzag chunks of 16 and 12 tokens: standard [0, 16) and [48, 64), suffix [16, 28) and [52, 64).
    assert rank.standard_keys == (16, 64) and rank.suffix_keys == (28, 64) and rank.cut
    assert (rank.query, rank.key, rank.ffn) == (2048, 512, 7168)
    core = core_attention(rank, LLAMA.dims, TE)
    assert core["keys and values over CP"] == (112 + 28 + 64) * 2 * 512 * 2 + 8 * 112
    assert core["rotated queries"] == 56 * 2048 * 2 and core["attention output"] == 56 * 2048 * 2 + 56 * 16 * 4
    items = layer(rank, LLAMA.dims, TE)
    assert items["feed-forward"] == 56 * 3 * 7168 * 2 and items["norms of heads"] == 0
    assert items["layer input"] == items["second residual"] == layer_input(rank, TE) == 28 * 4096 * 2
    # A copy of the queries, beside the fused projection's output that the values keep.
    assert selective_layer(rank, LLAMA.dims, TE)["queries, keys, values"] == 56 * (2048 + 2048 + 2 * 512) * 2
    whole = rank_shape(LLAMA.dims, layout, work, 0)
    assert not whole.cut  # the suffix's keys are one range: nothing is copied
    assert core_attention(whole, LLAMA.dims, TE)["keys and values over CP"] == 128 * 2 * 512 * 2 + 8 * 128


def test_static_bytes_by_hand():
    work, layout = Workload(65536, 64), Layout(4, 2, 1, 2)
    parameters = parameters_of_stage(LLAMA.dims, layout, 0)
    assert static_items(LLAMA.dims, layout, work, 0) == {
        "weights": 2 * parameters, "gradients": 4 * parameters, "optimizer states": 12 * parameters // 4,
    }  # fmt: skip
    light = dataclasses.replace(work, optimizer_dtype="bf16")
    assert static_items(LLAMA.dims, layout, light, 0)["optimizer states"] == 8 * parameters // 4


def total(layout: Layout, work: Workload | None = None) -> int:
    work = Workload(65536, 64) if work is None else work
    return peak_memory(LLAMA.dims, layout, work, GPUS["h100-80gb"], Assumptions()).total


def test_memory_falls_where_it_should():
    base = Layout(4, 4, 1, 1)
    assert total(dataclasses.replace(base, recompute="full")) < total(dataclasses.replace(base, recompute="selective"))
    assert total(dataclasses.replace(base, recompute="selective")) < total(base)
    assert total(Layout(4, 8, 1, 1)) < total(base) and total(Layout(8, 4, 1, 1)) < total(base)
    assert total(base, Workload(65536, 64, "standard")) < total(base) < total(base, Workload(131072, 32))
    # A pipeline's first stage holds as many micro-batches as there are stages; one micro-batch alone does not fill it.
    assert total(Layout(4, 4, 4, 1), Workload(65536, 1)) < total(Layout(4, 4, 4, 1))


def test_the_worst_split_is_the_one_taken():
    layout, work = Layout(4, 4, 1, 1), Workload(65536, 64)
    granule = layout.granule(work.length)
    assert suffix_starts(layout, work) == (0, granule)
    for recompute in ("none", "full"):
        shape = dataclasses.replace(layout, recompute=recompute)
        worst = peak_memory(LLAMA.dims, shape, work, GPUS["h100-80gb"], Assumptions(fragmentation=0.0))
        static = sum(static_items(LLAMA.dims, shape, work, 0).values()) + Assumptions().reserved_bytes
        for start in range(0, work.length, 8 * granule):
            for items in dynamic_items(LLAMA.dims, shape, work, 0, start).values():
                assert static + sum(items.values()) <= worst.total


def test_links_and_bubbles_by_hand():
    assert link_of(8, 1) == ("nvlink", 8) and link_of(2, 4) == ("nvlink", 2)
    assert link_of(4, 4) == ("network", 2) and link_of(4, 8) == ("network", 1)
    slow = GPU("slow", 2**40, 1e12, 1e30, 1e9, 1e8, 1.0, "")
    free = Assumptions(1.0, 1.0, 1.0, 1.0, nvlink_latency=0.0, network_latency=0.0)
    work = Workload(65536, 8, "standard")
    alone = step_time(LLAMA, ONE, work, slow, free)
    assert alone.parts["matrix products"] + alone.parts["attention"] == pytest.approx(alone.model_flops / 1e12)
    assert alone.mfu == pytest.approx(1.0, abs=1e-3) and alone.link_bytes == {"nvlink": 0, "network": 0}
    split = step_time(LLAMA, Layout(1, 2, 1, 1), work, slow, free)
    keys = 65536 * 2 * 8 * 128 * 2 // 2  # half of the gathered keys and values, bf16
    assert split.parts["CP"] == pytest.approx(8 * 2 * 32 * keys / 1e9)
    piped = step_time(LLAMA, Layout(1, 1, 2, 1), work, slow, free)
    busy = sum(piped.parts[name] for name in ("matrix products", "attention", "memory-bound", "PP"))
    assert piped.parts["pipeline bubble"] == pytest.approx(busy / 8)


def test_nothing_fits_says_what_would_help():
    work = Workload(1048576, 4)
    gpu, assumptions = GPUS["h100-80gb"], Assumptions()
    found = search(LLAMA, work, 8, gpu, assumptions)
    line = nothing_fits(found, LLAMA, work, 8, gpu, assumptions)
    assert found.chosen is None and "\n" not in line and "too many" in line
    suggested = int(line.split("--gpus ")[1].split(",")[0].split()[0])
    assert search(LLAMA, work, suggested, gpu, assumptions).chosen is not None
    assert search(LLAMA, work, suggested // 2, gpu, assumptions, ("full",)).chosen is None


def run_tool(name: str, *words: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *words])
    try:
        runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise


def test_the_tool_prints_arguments_and_writes_json_and_figure(tmp_path, monkeypatch, capsys):
    config = tmp_path / "model" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps(KNOWN_MODELS["qwen3-4b"]))
    output = tmp_path / "plan.json"
    words = ["--model", str(config.parent), "--seq-length", "262144", "--gpus", "32", "--gpu", "h100-80gb"]
    run_tool("plan_run.py", *words, "--output", str(output), monkeypatch=monkeypatch)
    printed, plan = capsys.readouterr().out, json.loads(output.read_text())
    chosen = plan["chosen"]
    assert "predictions" in printed and " ".join(chosen["arguments"][:8]) in " ".join(printed.split())
    assert sum(chosen["memory_bytes"]["items"].values()) == chosen["memory_bytes"]["total"]
    assert sum(chosen["step_seconds"]["parts"].values()) == pytest.approx(chosen["step_seconds"]["total"])
    fitting = [row["step_seconds"]["total"] for row in plan["layouts"] if row["fits"]]
    assert chosen["step_seconds"]["total"] == min(fitting)
    assert len(plan["layouts"]) / 3 + len(plan["refused"]) == len(list(every_layout(32)))
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words, said",
    [
        (["--model", "llama3-8b", "--seq-length", "1048576", "--gpus", "8"], "what would help"),
        (["--model", "none", "--seq-length", "65536", "--gpus", "8"], "--model none: neither a known name"),
        (["--model", "llama3-8b", "--seq-length", "65536", "--gpus", "0"], "--gpus 0 must be at least 1"),
        (["--model", "llama3-8b", "--seq-length", "65536", "--gpus", "8", "--overlap", "2"], "--overlap 2"),
    ],
)
def test_the_tool_ends_with_one_line_and_writes_nothing(words, said, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run_tool(
            "plan_run.py", *words, "--gpu", "h100-80gb", "--output", str(tmp_path / "plan.json"),
            monkeypatch=monkeypatch,
        )  # fmt: skip
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and said in error and not list(tmp_path.iterdir())


def test_the_scaling_tool_says_that_it_predicts(tmp_path, monkeypatch, capsys):
    output = tmp_path / "scaling.md"
    words = ["--model", "llama3-8b", "--gpu", "h200-141gb", "--seq-lengths", "65536", "1048576", "--gpus", "8", "64"]
    run_tool("plan_scaling.py", *words, "--output", str(output), monkeypatch=monkeypatch)
    text = output.read_text()
    assert capsys.readouterr().out == text and "Predictions" in text and "nothing here was measured" in text
    assert text.count("\n| ") == 5 and "| 1024K | 64 | 4 |" in text  # a head and four rows
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_leaves_nothing_out():
    plan = search(LLAMA, Workload(65536, default_global_batch_size(65536)), 16, GPUS["h100-80gb"]).chosen
    layout_bars([PlanBar("a", plan.time.parts, plan.memory.items)], plan.capacity, "title")
    with pytest.raises(AssertionError):
        layout_bars([PlanBar("a", plan.time.parts, {"new item": 1})], plan.capacity, "title")
