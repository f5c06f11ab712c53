"""The GPU check without a GPU: every part that needs no Megatron session, tiny, on the CPU."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import subprocess
import sys
import textwrap
import types
from dataclasses import replace

import pytest
import torch

from megatron_rpsd.attention import causal_attention
from megatron_rpsd.planning import gpu_attention, gpu_checks, gpu_loss, gpu_steps
from megatron_rpsd.planning.gpu_rows import ROOT, Row, guarded, machine_facts, markdown, seconds_of, table_line


def test_a_figure_is_judged_by_its_bound():
    row = Row("c", "w", 1.0, "x", "why", (0.5, 1.5))
    assert row.verdict == "good"
    for figure, verdict in ((0.4, "bad"), (1.6, "bad"), (math.nan, "bad"), (math.inf, "bad"), (None, "not run")):
        assert replace(row, figure=figure).verdict == verdict
    assert replace(row, bound=None).verdict == "measured"
    assert replace(row, bound=(1.0, math.inf)).verdict == "good"


@pytest.mark.parametrize("bound", [None, (1.0, 1.0), (-math.inf, 2.0), (1e-9, math.inf)])
def test_rows_come_back_from_json_and_into_tables(bound):
    for figure in (None, 1.25, math.inf):
        row = Row("loss", "a thing", figure, "GiB", "a peer", bound, "" if figure else "no such package", 2.0)
        again = Row.of_record(json.loads(json.dumps(row.record(), allow_nan=False)))
        assert again == row
        for text in (table_line(row), markdown([row], {"GPU": "g", "driver": None})):
            assert "a thing" in text and row.verdict in text
            assert "no such package" in text if figure is None else "GiB" in text
    assert not math.isnan(seconds_of(lambda: None, "cpu", 1))


def test_the_machine_is_described_without_a_gpu(monkeypatch):
    facts = machine_facts("cpu")
    assert facts["torch"] == torch.__version__ and facts["driver"] is None and facts["megatron-core"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert machine_facts("cuda")["GPU"] == "NVIDIA H100 80GB HBM3"


def attention_rows() -> list[Row]:
    return list(gpu_attention.attention_rows("cpu", gpu_attention.TINY_SIZES))


def test_attention_kernels_are_measured_here_and_others_say_why_not():
    rows = attention_rows()
    verdicts = [row.verdict for row in rows if row.what.startswith("sdpa")]
    assert verdicts == ["good"] * len(gpu_attention.TINY_SIZES.exact) + ["measured"]
    others = [row for row in rows if not row.what.startswith("sdpa")]
    assert others and all(row.verdict == "not run" and "needs a GPU" in row.reason for row in others)


def blind(query, key, value, scale):
    """Queries that do not see their own key."""
    return causal_attention(query, key.roll(1, 0), value.roll(1, 0), scale)


def broken(query, key, value, scale):
    raise RuntimeError("no kernel\nfor this shape")


def test_a_wrong_kernel_is_bad_and_a_failing_one_leaves_the_others(monkeypatch):
    monkeypatch.setattr(gpu_attention, "BLOCK_KERNELS", {"sdpa": blind})
    assert [row.verdict for row in attention_rows()][:2] == ["bad", "bad"]
    monkeypatch.setattr(gpu_attention, "BLOCK_KERNELS", {"sdpa": broken})
    reasons = [row.reason for row in attention_rows() if row.what.startswith("sdpa")]
    assert reasons == ["RuntimeError: no kernel for this shape"] * 3


def test_an_attention_that_sees_ahead_is_found():
    shape = gpu_attention.TINY_SIZES.exact[0]
    assert gpu_attention.sees_ahead(causal_attention, shape, "cpu") == (0.0, 0.0)
    # Products of neighbouring values change when values are permuted; a mean of them would not.
    assert gpu_attention.sees_ahead(lambda q, k, v, s: q * (v[:-1] * v[1:]).sum(), shape, "cpu")[0] > 0
    (row,) = gpu_attention.fp8_rows("cpu", gpu_attention.TINY_SIZES)
    assert row.verdict == "not run"


class Engine:
    """The constructor and call of Transformer Engine's attention; `leak` lets early queries see later keys."""

    leak = 0.0

    def __init__(self, num_attention_heads: int, kv_channels: int, softmax_scale: float, **options) -> None:
        assert options["qkv_format"] == "sbhd"
        self.scale = softmax_scale

    def __call__(self, query, key, value, qkv_format: str, attn_mask_type: str):
        assert attn_mask_type == ("causal" if len(query) == len(key) else "causal_bottom_right")
        last = value[-1:].repeat_interleave(query.shape[2] // value.shape[2], dim=2)
        return (causal_attention(query, key, value, self.scale) + self.leak * last).flatten(2)


@pytest.mark.parametrize("leak", [0.0, 1.0])
def test_fp8_rows_with_a_stand_in_for_transformer_engine(leak, monkeypatch):
    switched = []

    def autocast(enabled: bool, recipe):
        switched.append(recipe)
        return contextlib.nullcontext()

    recipes = types.SimpleNamespace(DelayedScaling=lambda **given: given, Format=types.SimpleNamespace(HYBRID="h"))
    modules = {
        "transformer_engine.pytorch": types.SimpleNamespace(DotProductAttention=Engine, autocast=autocast),
        "transformer_engine.common.recipe": recipes,
    }
    monkeypatch.setattr(Engine, "leak", leak)
    monkeypatch.setattr(importlib, "import_module", modules.__getitem__)
    monkeypatch.setattr(gpu_attention, "kernel_missing", lambda name, device: None)
    square = gpu_attention.Shape(16, 16, 4, 2, 128)
    sizes = gpu_attention.AttentionSizes((square, gpu_attention.Shape(6, 16, 2, 2, 128)), (square,), 1)
    rows = list(gpu_attention.fp8_rows("cpu", sizes))
    wrong = "bad" if leak else "good"
    assert [row.verdict for row in rows] == [wrong, wrong, "measured", "measured", wrong, "measured"], rows
    assert switched and all(recipe["fp8_dpa"] for recipe in switched)
    blocks = [gpu_attention.kernel_errors(gpu_attention.kernel_for("te", shape), shape, "cpu") for shape in sizes.exact]
    for ours, torchs in blocks:
        wrong = [name for name, error in ours.items() if error > gpu_attention.allowed_error(torchs[name])]
        assert ("output" in wrong) is bool(leak)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_small_loss_is_right_and_a_wrong_one_is_not(dtype, monkeypatch):
    sizes = gpu_loss.TINY_SIZES.small

    def good() -> list[bool]:
        ours, torchs = gpu_loss.loss_errors(sizes, "cpu", dtype)
        return [error <= gpu_loss.allowed_loss_error(name, torchs[name], dtype) for name, error in ours.items()]

    assert good() == [True, True, True]
    right = gpu_loss.fused_linear_loss
    monkeypatch.setattr(gpu_loss, "fused_linear_loss", lambda *given, **named: right(
        *given, **{**named, "view_weights": 1.2 * named["view_weights"]}
    ))  # fmt: skip
    assert not any(good())


def test_a_loss_that_cannot_be_measured_is_a_row():
    def no_memory(sizes):
        raise RuntimeError("rank 0 failed: CUDA out of memory")

    rows = list(gpu_loss.loss_rows("cpu", gpu_loss.TINY_SIZES, no_memory))
    assert [row.verdict for row in rows[:6]] == ["good"] * 6
    assert "out of memory" in rows[6].reason and "out of memory" in rows[-1].reason


def test_layers_are_taken_off_until_the_step_fits():
    sizes = gpu_steps.GPU_SIZES
    model = gpu_steps.with_layers(sizes, 16384, "cpu", gpu_steps.TE)
    assert model.dims.num_layers == 4
    by_length = [
        gpu_steps.predicted_bytes(model, length, "full", 0, gpu_steps.TE, 2**30) for length in (16384, 32768, 65536)
    ]
    assert by_length == sorted(by_length) and by_length[-1] > 80 * 2**30
    with pytest.raises(ValueError, match="GiB"):
        gpu_steps.with_layers(sizes, 2**26, "cpu", gpu_steps.TE)


@pytest.mark.parametrize(
    "torchs, ours",
    [("NVIDIA H100 80GB HBM3", "h100-80gb"), ("NVIDIA H200", "h200-141gb"), ("NVIDIA A100-SXM4-80GB", "a100-80gb")],
)
def test_gpus_are_known_by_torchs_name(torchs, ours):
    assert gpu_steps.planned_gpu(torchs).name == ours
    assert gpu_steps.planned_gpu("cpu") is None


def script(body: str):
    """A check's words, for a process that has no need of torch."""
    record = json.dumps(Row("attention", "first", 1.0, "x").record())
    head = f"import json, sys, time\nout = open(sys.argv[-1], 'a')\nprint({record!r}, file=out, flush=True)\n"
    return [sys.executable, "-c", head + textwrap.dedent(body)]


def test_checks_do_not_depend_on_one_another(tmp_path, monkeypatch):
    """One writes half a row and hangs, one dies, one is right; what each had found stays."""
    bodies = {
        "attention": "out.write('{\"half'); out.flush(); time.sleep(60)",
        "loss": "print('CUDA error: an illegal memory access'); sys.exit(3)",
        "training": "",
    }
    for name in bodies:
        monkeypatch.setitem(gpu_checks.CHECKS, name, replace(gpu_checks.CHECKS[name], limit_s=1.0))
    printed: list[str] = []
    results = gpu_checks.Results(tmp_path, {"GPU": "none"}, printed.append)
    gpu_checks.run_checks(list(bodies), results, command=lambda name: script(bodies[name]))
    gpu_checks.run_checks(["steps"], results, minutes=0.0)
    found = [(row.check, row.what, row.verdict) for row in results.rows]
    assert found == [
        ("attention", "first", "measured"), ("attention", "check attention", "not run"),
        ("attention", "first", "measured"), ("loss", "check loss", "not run"),
        ("attention", "first", "measured"), ("steps", "check steps", "not run"),
    ]  # fmt: skip
    assert "its limit of 1 s" in results.rows[1].reason
    assert "ended with 3: CUDA error: an illegal memory access" in results.rows[3].reason
    assert "--time-limit-minutes" in results.rows[5].reason
    written = json.loads((tmp_path / "results.json").read_text())
    assert [Row.of_record(row) for row in written["rows"]] == results.rows and len(printed) == 6
    assert (tmp_path / "results.md").read_text().count("\n| ") == 6 + 1
    assert "illegal memory access" in (tmp_path / "log.txt").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")
@pytest.mark.parametrize("words, said", [([], "no GPU is visible"), (["--only", "loss,speed"], "--only speed")])
def test_without_a_gpu_the_tool_says_so_in_one_line(words, said, tmp_path):
    tool = str(ROOT / "tools" / "gpu_check.py")
    done = subprocess.run(
        [sys.executable, tool, *words, "--output", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr and not done.stdout
    assert not (tmp_path / "out").exists()


def test_every_check_has_rows_and_sizes():
    for check in gpu_checks.CHECKS.values():
        module = importlib.import_module(f"megatron_rpsd.planning.{check.module}")
        assert callable(getattr(module, check.rows)) and module.GPU_SIZES and module.TINY_SIZES


def test_rows_before_a_failure_are_kept(capsys):
    def half():
        yield Row("c", "one", 1.0)
        raise ValueError("then it broke")

    one, two = guarded("c", "case", half)
    assert one.figure == 1.0 and two.reason == "ValueError: then it broke"
    assert "then it broke" in capsys.readouterr().err
