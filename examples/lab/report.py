"""The lab's figures and its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from examples.lab.arms import ARMS, MAIN_ARMS
from examples.lab.results import bound_text, mean_of_runs, seeds_text
from megatron_rpsd.report import html
from megatron_rpsd.report.depth import accuracy_by_depth, depth_heat_maps
from megatron_rpsd.report.figures import Panel, curves_over_steps
from megatron_rpsd.report.metrics import Series

DEPTH_LABEL = "depth of the evidence, % of the document"
_TITLES = tuple(arm.title for arm in ARMS.values() if arm.time_of is None)
REFERENCES = ("standard", "rpsd-skip")
"""arms that stand beside the ablations in their figure"""


def _length(tokens: int | str) -> str:
    return f"{int(tokens):,}"


def _same_steps(results: Mapping) -> list[str]:
    return [name for name, arm in results["arms"].items() if arm["time_of"] is None]


def depth_panels(results: Mapping, arms: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """Accuracy [seeds, depths] by arm title, a panel for every length."""
    found = results["arms"]
    return {
        f"{_length(length)} tokens": {
            found[arm]["title"]: np.array(found[arm]["exams"][str(length)]["by_seed"]["by_depth"]) for arm in arms
        }
        for length in results["lengths"]
    }


def _curves(results: Mapping, name: str, arms: Sequence[str]) -> dict[str, Series]:
    """Mean over the seeds of a logged loss, by arm title, from the end of the warm-up on."""
    curves, warmup = {}, results["settings"]["adapt"]["warmup_steps"]
    for arm in arms:
        runs = list(results["arms"][arm]["runs"].values())
        if all(name in run["curves"] for run in runs):
            values = np.mean([run["curves"][name] for run in runs], axis=0).tolist()
            points = [pair for pair in zip(runs[0]["curve_steps"], values, strict=True) if pair[0] > warmup]
            curves[results["arms"][arm]["title"]] = Series(*zip(*points, strict=True))
    return curves


def _training(results: Mapping, arms: Sequence[str]) -> bytes:
    panels = [Panel("CLM loss", "nats/token", _curves(results, "lm loss", arms), _TITLES)]
    kl = _curves(results, "view kl", arms)
    if kl:
        panels.append(Panel("KL of the perturbed view", "nats/suffix token", kl, _TITLES))
    return curves_over_steps(panels)


def draw_figures(results: Mapping) -> dict[str, bytes]:
    """PNGs by name; those of arms that were not run are left out."""
    arms = _same_steps(results)
    main = [arm for arm in arms if arm in MAIN_ARMS]
    ablations = [arm for arm in arms if arm not in MAIN_ARMS]
    figures = {}
    if main:
        figures["depth"] = accuracy_by_depth(depth_panels(results, main), _TITLES, DEPTH_LABEL)
    if ablations:
        ablations = [*(arm for arm in REFERENCES if arm in arms), *ablations]
        figures["ablations"] = accuracy_by_depth(depth_panels(results, ablations), _TITLES, DEPTH_LABEL)
    maps = {
        arm["title"]: np.array([arm["exams"][str(length)]["by_depth"] for length in results["lengths"]])
        for arm in results["arms"].values()
    }
    rows = [_length(length) for length in results["lengths"]]
    figures["heat_maps"] = depth_heat_maps(maps, rows, "document length, tokens", DEPTH_LABEL)
    if main:
        figures["training"] = _training(results, main)
    if ablations:
        figures["ablations_training"] = _training(results, ablations)
    return figures


def with_interval(estimate: Mapping) -> str:
    """An estimate with its interval in brackets."""
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def accuracy_table(results: Mapping, arms: Sequence[str], caption: str) -> html.Markup:
    """Accuracy and its spread over depths, by arm."""
    lengths = [str(length) for length in results["lengths"]]
    header = ["arm", *(f"accuracy at {_length(length)}" for length in lengths),
              f"deviation over depths at {_length(lengths[0])}", f"worst depth at {_length(lengths[0])}"]  # fmt: skip
    rows = []
    for name in arms:
        exams = results["arms"][name]["exams"]
        rows.append([
            results["arms"][name]["title"], *(with_interval(exams[length]["accuracy"]) for length in lengths),
            with_interval(exams[lengths[0]]["depth_deviation"]), f"{exams[lengths[0]]['worst_depth']['value']:.2f}",
        ])  # fmt: skip
    return html.table(header, rows, caption)


def cost_table(results: Mapping, arms: Sequence[str], caption: str) -> html.Markup:
    """Steps and times of every arm beside its accuracy."""
    lengths = [str(length) for length in results["lengths"]]
    header = ["arm", "steps", "ms/step", "loop, s", "run, s", "CPU, s",
              *(f"at {_length(length)}" for length in lengths)]  # fmt: skip
    rows = []
    for name in arms:
        arm = results["arms"][name]
        rows.append([
            arm["title"], f"{mean_of_runs(arm, 'steps'):.0f}", f"{1000 * mean_of_runs(arm, 'seconds_per_step'):.1f}",
            *(f"{mean_of_runs(arm, field):.1f}" for field in ("loop_seconds", "wall_seconds", "cpu_seconds")),
            *(f"{arm['exams'][length]['accuracy']['value']:.3f}" for length in lengths),
        ])  # fmt: skip
    return html.table(header, rows, caption)


def verdict_table(results: Mapping, verdicts: Sequence[Mapping]) -> html.Markup:
    """What must hold, with what was measured, seed by seed."""
    rows = [
        [verdict["text"], bound_text(verdict), with_interval(verdict["estimate"]), f"{verdict['margin']:+.3f}",
         ", ".join(f"{value:.3f}" for value in verdict["by_seed"]), "holds" if verdict["met"] else "fails"]
        for verdict in verdicts
    ]  # fmt: skip
    header = ["expectation", "bound", "measured", "margin", "seed by seed", "verdict"]
    caption = f"Of {seeds_text(results)}. Intervals: 95 % bootstrap over seeds and documents, the same for both arms."
    return html.table(header, rows, caption)


def _intro(results: Mapping) -> str:
    base, adapt = results["settings"]["base"], results["settings"]["adapt"]
    accuracy = np.mean([one["accuracy"] for one in results["base"].values()])
    return (
        f"A two-layer model of 97 thousand parameters learns at {base['seq_length']} tokens to look keys up (accuracy "
        f"there: {accuracy:.3f}) and is adapted to {adapt['seq_length']} tokens in {adapt['steps']} steps. In the "
        f"adaptation data every query asks for evidence at most {results['settings']['furthest_evidence']} tokens "
        "back; the exams ask for evidence at every depth. All arms start from the same checkpoint and read the same "
        f"stream; each is a run of megatron_rpsd.training.main on two data-parallel CPU ranks. {seeds_text(results)}."
    )


def _figure_sections(results: Mapping, figures: Mapping[str, bytes]) -> list[html.Markup]:
    captions = {
        "depth": ("Accuracy by depth", "Mean over seeds; the band runs from the lowest to the highest seed. Depth 0 is "
                  "the start of the document, 100 its end, where the queries stand."),
        "ablations": ("Ablations", "As above."),
        "heat_maps": ("Length and depth", "Accuracy in every depth decile, by its lower end; mean over seeds."),
        "training": ("Training", "Means over the seeds and the steps between points, after the warm-up, whose losses "
                     "are far above. All arms see the same windows in the same order; "
                     "PoSE's CLM loss is that of its perturbed view."),
        "ablations_training": ("Training of the ablations", "As above."),
    }  # fmt: skip
    return [
        html.section(captions[name][0], html.figure(png, captions[name][1], captions[name][0]))
        for name, png in figures.items()
    ]


def _equal_time(results: Mapping) -> list[html.Markup]:
    arms = results["arms"]
    equal = [name for name, arm in arms.items() if arm["time_of"]]
    if not equal:
        return []
    others = dict.fromkeys(other for name in equal for other in (arms[name]["same_as"], arms[name]["time_of"]))
    caption = (
        "Arms marked so get as many steps as fit the time of RPSD skip's steps, by the median time of a step of each. "
        "loop: the training loop alone; run: with start and checkpoint; CPU: of both ranks. Means over seeds."
    )
    rows = [*others, *equal, *(name for name in ("hard-label",) if name in arms)]
    return [html.section("In equal time", cost_table(results, rows, caption))]


def _hard_label(results: Mapping) -> list[html.Markup]:
    if not {"hard-label", "rpsd-skip"} <= set(results["arms"]):
        return []
    text = (
        "Does the second view help by its soft targets, or by being one more view? The hard-label arm trains on both "
        "views with the data's own next tokens, at the cost of RPSD."
    )
    rows = [name for name in ("pose", "hard-label", "rpsd-skip") if name in results["arms"]]
    return [html.section("Hard-label control", html.paragraph(text), accuracy_table(results, rows, ""))]


def html_list(lines: Sequence[object]) -> html.Markup:
    """Lines as a list."""
    return html.Markup(f"<ul>{''.join(f'<li>{html.text(line)}</li>' for line in lines)}</ul>")


def versions_section(results: Mapping) -> html.Markup:
    """What software ran."""
    versions = list(results["versions"].items())
    return html.section("Versions", html.table(["software", "version"], versions, text_columns=2))


def build_page(results: Mapping, figures: Mapping[str, bytes]) -> str:
    """The report; `figures` are PNGs by name."""
    names = list(results["arms"])
    interval = f"In brackets: 95 % bootstrap intervals over seeds and documents ({seeds_text(results)})."
    commands = [results["base_command"], *(arm["command"] for arm in results["arms"].values())]
    return html.page(
        "The position lab",
        html.paragraph(_intro(results)),
        accuracy_table(
            results,
            _same_steps(results),
            f"{interval} Equal steps for every arm. The deviation over depths squared is the positional variance.",
        ),
        html.section("What must hold", verdict_table(results, results["verdicts"])) if results["verdicts"] else "",
        html.section("Limits", html_list(results["limits"])),
        *_figure_sections(results, figures),
        *_equal_time(results),
        *_hard_label(results),
        html.section("Cost of every arm", cost_table(results, names, "Means over seeds.")),
        html.section("The same runs from a shell", html.code_block("\n\n".join(commands))),
        versions_section(results),
    )
