"""The second miniature end to end with a handful of steps, its streams, its verdicts and its recipe."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from examples.arms.run import read_flags
from examples.lab.language import BOS, KEYS, QUERY, Rates
from examples.lab.launch import Finished, run_on_ranks
from examples.lab.records import read_training_log
from examples.lab.results import failed_expectations
from examples.lab.run import run_and_report
from examples.lab.scores import bootstrap
from examples.lab.settings import Phase
from examples.short_data_long_context.arms import MODELS, STUDENTS, arguments, needed_models
from examples.short_data_long_context.data import packed_window
from examples.short_data_long_context.findings import FINDINGS, findings, verdicts_of
from examples.short_data_long_context.full_size.__main__ import FILES, FOLDER
from examples.short_data_long_context.instruments import SHIFTED_REPEAT, SHIFTS
from examples.short_data_long_context.run import parse_arguments, run_short_long
from examples.short_data_long_context.settings import END, Settings
from examples.short_data_long_context.statements import about_updates
from examples.short_data_long_context.workers import Part, Stopped, run_parts
from megatron_rpsd.positions import parse_phases


def tiny(length: int, steps: int, batch: int) -> Phase:
    return Phase(length, 100, steps, batch, batch, 1e-3, warmup_steps=1, log_interval=2)


SETTINGS = Settings(
    base=tiny(64, 4, 4), teacher=tiny(128, 4, 2), student=tiny(128, 4, 2), exam_documents=2, base_exam_documents=2,
    trace_sequences=1,
)  # fmt: skip
RUN = ("phase-kd", "phase-kd-iso")


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("short_long") / "out"
    run_short_long(folder, SETTINGS, [3], RUN, [256])
    return folder


def on_one_rank(log: Path, function, *given):
    with contextlib.closing(run_on_ranks(1, log, function, *given)) as updates:
        return next(update for update in updates if isinstance(update, Finished)).values[0]


def test_everything_is_written(output: Path) -> None:
    results = json.loads((output / "results.json").read_text())
    assert list(results["arms"]) == ["teacher", *RUN] and list(results["base"]) == ["teacher-base", "base-100"]
    for name, arm in results["arms"].items():
        run = arm["runs"]["3"]
        assert run["steps"] == 4 and set(run["curves"]) == {"lm loss", *(["teacher kl"] if name != "teacher" else [])}
        (by_depth,) = arm["exams"]["256"]["by_seed"]["by_depth"]
        assert len(by_depth) == 10 and all(0 <= value <= 1 for value in by_depth)
        assert (arm["theta_before"], arm["theta"]) == (100, 500_000)
    traces, updates = results["traces"]["3"], results["updates"]["3"]
    assert set(traces) == {"phase-kd", "teacher", "base-100"} and set(updates) == {"phase-kd"}
    for trace in traces.values():
        assert trace["largest_before_border"] == 0 and trace["shifts"]["256"]["kl_per_repeat"][SHIFTED_REPEAT] > 0
        assert trace["settings"]["scope"] == "single"
    assert updates["phase-kd"]["rotary_base"] == {"before": 100, "after": 500_000}
    assert len(updates["phase-kd"]["mean"]["W_q"]) == 16
    assert len(results["findings"]) == 3 and all(finding["shown"] for finding in results["findings"][1:])
    page = (output / "report.html").read_text()
    assert all(text in page for text in ("Finding 3", "Limits", "torchrun", "--teacher-document-mask"))
    for name in ("depth_logits", "depth_schedules", "trace", "trace_layers", "updates_phase_kd"):
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(output.rglob("*.partial"))


def test_both_students_start_alike_and_the_cut_teacher_says_something_else(output: Path) -> None:
    whole, cut = (read_training_log(output / "seed3" / "logs" / f"{name}.log").curves for name in RUN)
    assert whole["lm loss"][0] == pytest.approx(cut["lm loss"][0], rel=1e-3)
    assert abs(whole["teacher kl"][0] - cut["teacher kl"][0]) > 1e-6


def test_a_second_run_repeats_nothing(output: Path, capsys) -> None:
    trained = {path: path.stat().st_mtime_ns for path in output.rglob("record.json")}
    run_short_long(output, SETTINGS, [3], RUN[:1], [256])
    assert capsys.readouterr().out.count("done before") == 6
    assert trained == {path: path.stat().st_mtime_ns for path in output.rglob("record.json")}


def read_teacher(command: list[str], exported: str) -> dict[str, float]:
    """A cut teacher's logits of a packed window, beside transformers reading every sample by itself."""
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_rpsd.checkpoint.convert import export_hf
    from megatron_rpsd.training.main import choose_device

    choose_device(["--device", "cpu", "--force-cpu-runtime"])
    from megatron_rpsd.positions import document_ids
    from megatron_rpsd.training.run import forward_step_from_args
    from megatron_rpsd.training.session import start_session

    given = dict(zip(command, command[1:], strict=False))
    args, config = start_session(command)
    step = forward_step_from_args(args, config)
    window = torch.from_numpy(packed_window(np.random.default_rng(0), 128, 32, 64, Rates(0.08, 0.08)))[None]
    sample = {"tokens": window, "labels": window, "loss_mask": torch.ones(window.shape)}
    reading = step.teacher.read(step, None, {**sample, "document_ids": document_ids(window, END)})
    ours = (reading.hidden @ reading.weight.T).log_softmax(dim=-1)
    step.teacher.document_mask = False
    whole = step.teacher.read(step, None, sample)
    whole = (whole.hidden @ whole.weight.T).log_softmax(dim=-1)
    folder = Path(exported)
    export_hf(given["--teacher-checkpoint"], folder.parent / "reference", folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ends = [0, *((window[0] == END).nonzero().flatten() + 1).tolist(), 128]
    with torch.no_grad():
        alone = [
            model(window[:, start:stop]).logits[0] for start, stop in zip(ends, ends[1:], strict=False) if start < stop
        ]
    alone = torch.cat(alone).log_softmax(dim=-1)
    first = ends[1]
    return {
        "samples": len(ends) - 1,
        "error": (ours - alone).abs().max().item(),
        "first sample": (whole - ours)[:first].abs().max().item(),
        "beyond": (whole - ours)[first:].abs().max().item(),
    }


def test_a_cut_teacher_reads_every_sample_by_itself(output: Path, tmp_path: Path) -> None:
    # The four steps left the teacher near its random weights, of standard deviation 0.1: logits move by hundredths.
    folder = output / "seed3"
    command = arguments("phase-kd-iso", SETTINGS, 3, folder, folder / "data")
    found = on_one_rank(tmp_path / "log", read_teacher, command, str(folder / "instruments" / "teacher_hf"))
    assert found["samples"] >= 3 and found["error"] < 1e-4
    assert found["first sample"] < 1e-5 < 1e-3 < found["beyond"]


def test_a_cache_cannot_be_cut_any_more() -> None:
    from megatron_rpsd.training.distillation import check_distillation

    given = {"teacher_checkpoint": None, "teacher_cache": "kept", "teacher_dtype": None, "teacher_tokenizer": None}
    args = SimpleNamespace(objective="distill", pipeline_model_parallel_size=1, teacher_document_mask=True, **given)
    with pytest.raises(ValueError, match="--teacher-document-mask belongs to --teacher-checkpoint"):
        check_distillation(args)


def unknown_flags(commands: dict[str, list[str]]) -> dict[str, list[str]]:
    """What the training entry's parser does not know of each command line."""
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    from megatron_rpsd.training.arguments import add_rpsd_arguments

    parser = add_rpsd_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    return {name: parser.parse_known_args(words)[1] for name, words in commands.items()}


def test_the_recipe_s_flags_are_the_training_entry_s(tmp_path: Path) -> None:
    commands = {name: read_flags(FOLDER / f"{name}.txt") for name in FILES}
    assert {"common", "student", "short", "extension", "kd", "kd_iso", "ce", "one_run"} <= set(commands)
    assert on_one_rank(tmp_path / "log", unknown_flags, commands) == {name: [] for name in commands}
    for name in FILES:  # every hyperparameter says where it comes from
        text = (FOLDER / f"{name}.txt").read_text()
        assert text.startswith("#") and ("arXiv" in text or "ours" in text)
    one_run = dict(zip(commands["one_run"], commands["one_run"][1:], strict=False))
    schedule, batch = parse_phases(one_run["--rope-phases"]), int(one_run["--global-batch-size"])
    schedule.check(131072, 2 * 8 * 2, batch, int(one_run["--train-iters"]) * batch)


def test_packed_samples_are_whole_and_independent() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        window = packed_window(rng, 512, 32, 64, Rates(0.08, 0.08))
        samples = np.split(window, np.flatnonzero(window == END) + 1)
        assert len(window) == 512 and all(32 <= len(sample) <= 64 for sample in samples[:-1])
        assert all(sample[0] == BOS and (sample[1:] != BOS).all() for sample in samples if len(sample))
        for sample in samples:
            for place in np.flatnonzero(sample == QUERY):
                if place + 2 >= len(sample):
                    continue  # cut off by the window
                key, value = sample[place + 1 : place + 3]
                assert key in KEYS
                (evidence,) = np.flatnonzero(sample[:place] == key)
                assert sample[evidence + 1] == value


def test_schedules_are_a_base_and_a_theta() -> None:
    schedules = {name: (MODELS[MODELS[name].start].theta, MODELS[name].theta) for name in STUDENTS}
    assert schedules["phase-kd"] == schedules["phase-ce"] == schedules["phase-kd-iso"] == (100, 500_000)
    assert schedules["large-kd"] == (500_000, 500_000) and schedules["small-kd"] == (100, 100)
    assert schedules["phase-10000-kd"] == (10_000, 500_000) and schedules["small-10000-kd"] == (10_000, 10_000)
    assert needed_models(("large-ce",)) == ("teacher-base", "teacher", "base-500000", "large-ce")
    order = list(MODELS)
    assert all(order.index(need) < order.index(name) for name in MODELS for need in MODELS[name].needs)


def test_the_command_line() -> None:
    args = parse_arguments([])
    assert args.arms == STUDENTS and args.seeds == (4, 5, 6) and args.lengths == (512, 1024)
    quick = parse_arguments(["--quick"])
    assert len(quick.seeds) == 1 and set(quick.arms) < set(STUDENTS)
    with pytest.raises(SystemExit):
        parse_arguments(["--arms", "phase-dk"])


# Verdicts, on made-up figures.

GOOD = {
    "teacher": (0.99, 0.9), "phase-kd": (0.95, 0.75), "phase-ce": (0.55, 0.35), "phase-kd-iso": (0.6, 0.4),
    "large-kd": (0.7, 0.4), "large-ce": (0.25, 0.05), "small-kd": (0.1, 0.05),
}  # fmt: skip


def marks(accuracy: float) -> np.ndarray:
    """Right answers [2 seeds, 20 documents, 10 depths] of about this accuracy."""
    right = np.zeros((2, 200))
    right[:, : round(200 * accuracy)] = 1
    return right.reshape(2, 20, 10)


def world(**changed: float) -> tuple[dict, list[dict]]:
    """Right answers and instruments' records in which everything holds but for what is changed."""
    right = {
        name: {512: marks(changed.get(f"{name} 512", at_512)), 1024: marks(changed.get(f"{name} 1024", at_1024))}
        for name, (at_512, at_1024) in GOOD.items()
    }
    quiet = {"per_repeat": [[0.0] * 8] * 2}
    shifts = {
        str(shift): {
            "kl_per_repeat": [0.0] * SHIFTED_REPEAT
            + [0.001 * shift * changed.get("response", 1.0) ** (shift == 256), 0, 0],
            "relative_change": {"queries": quiet, "keys": quiet},
        }
        for shift in SHIFTS
    }
    trace = {"largest_before_border": changed.get("before", 0.0), "shifts": shifts}

    def curve(ratio: float) -> list[float]:
        return [1.0] * 3 + [ratio] * 4 + [1.0] * 9

    def update(student: str, **ratios: float) -> dict:
        found = {key: curve(changed.get(f"{student} {key}", ratio)) for key, ratio in ratios.items()}
        return {"mean": found, "wavelengths": [6.0 * 2**index for index in range(16)]}

    updates = {
        "phase-kd": update("phase-kd", W_q=2.5, W_k=2.0, W_v=1.0),
        "small-kd": update("small-kd", W_q=1.1, W_k=1.1, W_v=1.0),
    }
    return right, [{"traces": {"phase-kd": trace}, "updates": updates}] * 2


@pytest.fixture
def few_draws(monkeypatch) -> None:
    """Intervals are the lab's own, and tested there."""
    for module in ("examples.lab.scores", "examples.short_data_long_context.findings"):
        monkeypatch.setattr(f"{module}.bootstrap", functools.partial(bootstrap, draws=10))


def failed(right: dict, looked: list[dict]) -> set[str]:
    return {one.text for finding in FINDINGS for one in verdicts_of(finding, right, looked) if not one.met}


def test_all_expectations_hold_where_the_figures_are_good(few_draws) -> None:
    right, looked = world()
    verdicts = [one for finding in FINDINGS for one in verdicts_of(finding, right, looked)]
    assert len(verdicts) == 15 and all(one.met and one.margin >= 0 for one in verdicts)
    assert all(len(one.by_seed) == 2 for one in verdicts)


@pytest.mark.parametrize(
    "changed, texts",
    [
        ({"teacher 512": 0.94}, {"teacher (long documents), accuracy at 512"}),
        ({"phase-kd 512": 0.79}, {"phase KD, accuracy at 512"}),
        ({"phase-ce 512": 0.85}, {"phase KD - phase CE, accuracy at 512"}),
        ({"phase-ce 1024": 0.70}, {"phase KD - phase CE, accuracy at 1,024"}),
        ({"phase-kd-iso 512": 0.85}, {"phase KD - phase KD, iso teacher, accuracy at 512"}),
        ({"large-ce 512": 0.5}, {"large KD - large CE, accuracy at 512"}),
        ({"large-kd 512": 0.93}, {"phase KD - large KD, accuracy at 512"}),
        ({"small-kd 512": 0.5}, {"phase KD - small KD, accuracy at 512"}),
        ({"before": 1e-9}, {"trace of phase KD: largest change of anything before the shifted repeat"}),
        ({"response": 0.03}, {"trace of phase KD: KL at a shift of 256 over that at 1, in the shifted repeat"}),
        ({"phase-kd W_q": 1.7}, {"phase KD: W_q, change of indices 3 to 6 over that of the slow half"}),
        ({"phase-kd W_k": 1.4}, {"phase KD: W_k, change of indices 3 to 6 over that of the slow half"}),
        ({"phase-kd W_v": 0.8}, {"phase KD: W_v, change of indices 3 to 6 over that of the slow half"}),
        ({"phase-kd W_v": 1.2}, {"phase KD: W_v, change of indices 3 to 6 over that of the slow half"}),
        ({"small-kd W_q": 1.6}, {"small KD: W_q, change of indices 3 to 6 over that of the slow half"}),
    ],
)
def test_one_bad_figure_fails_its_own_expectation(few_draws, changed, texts) -> None:
    assert failed(*world(**changed)) == texts


def test_what_was_not_run_is_not_judged(few_draws) -> None:
    right, looked = world()
    few = {name: right[name] for name in ("teacher", "phase-kd")}
    bare = [{"traces": {}, "updates": {}}] * 2
    assert {one.text for finding in FINDINGS for one in verdicts_of(finding, few, bare)} == {
        "teacher (long documents), accuracy at 512", "phase KD, accuracy at 512"
    }  # fmt: skip
    assert findings(few, bare)[2]["shown"] == []


def test_the_band_is_reported_where_it_lies() -> None:
    _, looked = world()
    assert "indices 3, 4, 5, 6 of 0 to 15" in about_updates(looked)[0] and "changes less" in about_updates(looked)[0]
    slow = copy.deepcopy(looked)
    for seed in slow:
        seed["updates"]["phase-kd"]["mean"]["W_q"] = [1.0] * 12 + [3.0] * 4
    assert "indices 12, 13, 14, 15 of 0 to 15" in about_updates(slow)[0] and "changes more" in about_updates(slow)[0]


@pytest.mark.parametrize(
    "full, changed, code", [(True, {}, None), (True, {"teacher 512": 0.5}, 1), (False, {"teacher 512": 0.5}, None)]
)
def test_a_full_run_s_exit_code_is_1_where_an_expectation_fails(
    few_draws, full, changed, code, tmp_path, monkeypatch, capsys
) -> None:
    found = findings(*world(**changed))
    results = {"verdicts": [one for finding in found for one in finding["verdicts"]], "seeds": [3, 4]}
    assert bool(failed_expectations(results)) == bool(changed)
    monkeypatch.setattr("examples.lab.results.summary_lines", lambda results: [])
    monkeypatch.setattr("examples.lab.run.terminate_as_interrupt", lambda: None)
    if code is None:
        run_and_report(lambda: results, tmp_path, full)
    else:
        with pytest.raises(SystemExit) as left:
            run_and_report(lambda: results, tmp_path, full)
        assert left.value.code == code and "teacher (long documents)" in capsys.readouterr().err


# Parts.


def part(name: str, needs: tuple[str, ...], work) -> Part:
    return Part(name, "kind", f"part {name}", needs, work)


def test_parts_wait_for_what_they_need() -> None:
    done = []

    def work(name: str):
        def run(records, show):
            assert set(records) <= set(done)
            done.append(name)
            return {"name": name}, True, ""

        return run

    parts = [part("a", (), work("a")), part("b", ("a",), work("b")), part("c", ("a", "b"), work("c"))]
    assert run_parts(parts, workers=2) == {name: {"name": name} for name in "abc"}
    assert done == ["a", "b", "c"]


def test_a_failed_part_ends_the_others() -> None:
    ended = []

    def forever(records, show):
        try:
            while True:
                show("", 0.0)
        except Stopped:
            ended.append(True)
            raise

    def fail(records, show):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        run_parts([part("a", (), forever), part("b", (), fail), part("c", ("b",), fail)], workers=2)
    assert ended == [True]
