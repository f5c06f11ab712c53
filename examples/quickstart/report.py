"""The quickstart's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_rpsd.report import html
from megatron_rpsd.report.figures import Panel, curves_over_steps, means_over_log_axis, paired_changes
from megatron_rpsd.report.metrics import Series

NAMES = {"before": "before", "standard": "control (CLM alone)", "rpsd": "RPSD"}
_SMOOTH = 5


def _with_error(value: float, error: float, digits: int) -> str:
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _change(entry: Mapping, name: str) -> str:
    if f"{name}_change_percent" not in entry:
        return "–"
    return f"{entry[f'{name}_change_percent']:+.1f} % ± {entry[f'{name}_change_error']:.1f}"


def headline(summary: Mapping) -> html.Markup:
    """The small table at the top."""
    models, windows, shift = summary["models"], summary["windows"], summary["shifts"][-1]
    rows = []
    for key, name in NAMES.items():
        entry = models[key]
        lower = f"{entry['kl_lower_than_before']} of {windows}" if "kl_lower_than_before" in entry else "–"
        rows.append([
            name, _with_error(entry["kl"][-1], entry["kl_standard_error"][-1], 4), _change(entry, "kl"), lower,
            _with_error(entry["clm"], entry["clm_standard_error"], 4), _change(entry, "clm"),
        ])  # fmt: skip
    header = ["model", f"view KL at shift {shift}, nats", "change", "windows lower", "CLM loss, nats/token", "change"]
    caption = (
        f"Means over {windows} held-out windows ± standard error. Windows differ a lot from one another; the changes "
        "and their standard errors are of paired differences in the same windows, in percent of the mean before."
    )
    return html.table(header, rows, caption)


def _figures(summary: Mapping, curves: Mapping[str, Mapping[str, Series]]) -> list[html.Markup]:
    shift = summary["shifts"][-1]
    kl = {key: np.array(summary["models"][key]["kl_of_windows"]) for key in NAMES}
    by_shift = means_over_log_axis(
        summary["shifts"], {NAMES[key]: values for key, values in kl.items()},
        "shift y of the second half, positions", "reverse KL of the views, nats/token",
    )  # fmt: skip
    changes = {NAMES[key]: 100.0 * (kl[key][:, -1] / kl["before"][:, -1] - 1.0) for key in ("standard", "rpsd")}
    paired = paired_changes(changes, f"change of view KL at shift {shift}, %", "held-out window", first_style=1)
    order = list(NAMES.values())
    training = curves_over_steps(
        [
            Panel("CLM loss of the training windows", "nats/token",
                  {NAMES[arm]: curves[arm]["lm loss"] for arm in ("standard", "rpsd")}, order),
            Panel("view KL of the training windows", "nats/token",
                  {NAMES["rpsd"]: curves["rpsd"]["view kl"]}, order),
        ],
        smooth=_SMOOTH,
    )  # fmt: skip
    return [
        html.section(
            "How much moving the second half of a window changes the predictions",
            html.figure(by_shift, "Means over the held-out windows; bars are standard errors of the mean. Lower is "
                        "more robust: 0 would mean that predictions do not depend on the gap.",
                        "View KL against shift before, with the control and with RPSD"),
            html.figure(paired, "The same windows before and after, one column each; lines are means of "
                        "these percentages, in which every window weighs alike.",
                        "Change of the view KL of every held-out window, control and RPSD"),
        ),
        html.section(
            "Training",
            html.figure(training, f"Lines are running means of {_SMOOTH} steps. Both arms saw the same windows in the "
                        "same order. Single steps scatter because each has few windows, with splits and shifts of its "
                        "own.", "Training loss and view KL over steps"),
        ),
    ]  # fmt: skip


def _cost(cost: Mapping) -> html.Markup:
    rows = [[NAMES[arm], f"{cost[arm]['seconds_per_step']:.2f}", cost[arm]["steps"]] for arm in ("standard", "rpsd")]
    ratio = cost["rpsd"]["seconds_per_step"] / cost["standard"]["seconds_per_step"]
    return html.section(
        "Cost",
        html.table(["arm", "seconds per step (median)", "steps"], rows,
                   f"An RPSD step took {ratio:.2f} times a plain one here. Timings of a machine that does other work "
                   "meanwhile are rough."),
    )  # fmt: skip


def _checks(check: Mapping) -> html.Markup:
    rows = [
        ["tools/convert_checkpoint.py verify, export against checkpoint", check["verify"]],
        ["largest difference of a logit, transformers against Megatron", f"{check['max_difference']:.2e}"],
        ["largest logit, for scale", f"{check['largest_logit']:.1f}"],
        ["same token ranked first", f"{100 * check['agreement']:.1f} %"],
    ]
    return html.section("Conversion check", html.table(["check of the RPSD model", "result"], rows, text_columns=2))


def build_page(results: Mapping, curves: Mapping[str, Mapping[str, Series]]) -> str:
    """The report.

    Args:
        results: what results.json holds.
        curves: per arm, its scalars.
    """
    summary, settings = results["summary"], results["settings"]
    text = (
        f"SmolLM2-135M-Instruct, {settings['steps']} steps of {settings['global_batch_size']} windows of "
        f"{settings['seq_length']} tokens of Python sources, on CPU ranks over gloo. A view moves the positions of all "
        f"tokens from the middle of a window on (token {settings['split']}) by a shift; its KL against the standard "
        "view says how far predictions depend on the gap. RPSD trains it down beside the CLM loss; the control is the "
        "same run without it. Held-out windows come from documents that training never saw."
    )
    verdict = (
        f"RPSD lowered the view KL by {summary['margin_points']:.1f} ± {summary['margin_error']:.1f} percentage points "
        f"more than the control (lower in {summary['rpsd_wins']} of {summary['windows']} windows), with a CLM loss "
        f"{100 * summary['clm_excess']:+.2f} % from the control's."
    )
    unmet = [html.paragraph("Expectation not met: ", results["missing_effect"])] if results["missing_effect"] else []
    return html.page(
        "RPSD on SmolLM2-135M: a quickstart",
        html.paragraph(text),
        headline(summary),
        html.paragraph(verdict),
        *unmet,
        *_figures(summary, curves),
        _cost(results["cost"]),
        _checks(results["check"]),
        html.section("Commands", html.code_block("\n\n".join(results["commands"]))),
        html.section(
            "Stages and versions",
            html.table(["stage", "seconds"], [[name, f"{value:.1f}"] for name, value in results["seconds"].items()]),
            html.table(["software", "version"], list(results["versions"].items()), text_columns=2),
        ),
    )


def summary_lines(summary: Mapping) -> Sequence[str]:
    """The summary at the end of the run, for the terminal."""
    shift = summary["shifts"][-1]
    lines = [f"{'held out':22}{f'view KL at shift {shift}':>24}{'change':>12}{'CLM loss':>11}{'change':>10}"]
    for key, name in NAMES.items():
        entry = summary["models"][key]
        kl = _with_error(entry["kl"][-1], entry["kl_standard_error"][-1], 4)
        changes = [f"{entry[f'{loss}_change_percent']:+.1f} %" if key != "before" else "" for loss in ("kl", "clm")]
        lines.append(f"{name:22}{kl:>24}{changes[0]:>12}{entry['clm']:>11.4f}{changes[1]:>10}")
    lines.append(
        f"RPSD over control: {summary['margin_points']:.1f} ± {summary['margin_error']:.1f} percentage points lower "
        f"view KL, lower in {summary['rpsd_wins']} of {summary['windows']} windows; "
        f"CLM loss {100 * summary['clm_excess']:+.2f} %"
    )
    return lines
