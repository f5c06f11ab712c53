"""What the RULER table, figures and page read out of a scores dictionary (scores.json): cells, means, labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from statistics import fmean

from megatron_rpsd.ruler.tasks import RULER_TASKS

RULER_MEAN = f"RULER mean ({len(RULER_TASKS)} tasks)"
DEVIATION = "mean deviation over positions"
RANGE = "mean range over positions"


def length_label(tokens: int) -> str:
    """A length in short: 4096 is 4K, 1048576 is 1M; one that no power of two divides stays as it is."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return str(tokens)


def cells_by_place(scores: Mapping) -> dict[tuple[str, int], Mapping]:
    """The cells of `scores` (or of a comparison) by (task, length); what was not run is not there."""
    return {(cell["task"], cell["length"]): cell for cell in scores["cells"]}


def places(scores: Mapping) -> tuple[list[str], list[int]]:
    """Tasks and lengths of a comparison, which names them in its cells alone, in the order of scores.json."""
    cells = scores["cells"]
    return list(dict.fromkeys(cell["task"] for cell in cells)), sorted({cell["length"] for cell in cells})


def positions_of(cell: Mapping | None, teacher_forced: bool = False) -> Mapping | None:
    """A cell's statistics over the position of its evidence; None where it has none or was not run.

    Args:
        teacher_forced: those of the teacher-forced answers instead of the generated ones.
    """
    if cell is not None and teacher_forced:
        cell = cell["teacher_forced"]
    return cell["position"] if cell is not None else None


def bin_label(low: float, high: float) -> str:
    """A range of positions, given as shares of the prompt, in percent: `0-10`, or `25` for a grid's depth."""
    return f"{100 * low:g}" if low == high else f"{100 * low:g}-{100 * high:g}"


def positional_tasks(scores: Mapping, teacher_forced: bool = False) -> list[str]:
    """The tasks that have statistics over positions at some length."""
    found = {cell["task"] for cell in scores["cells"] if positions_of(cell, teacher_forced)}
    return [task for task in scores["tasks"] if task in found]


def variant_of(task: str) -> str:
    """What stands behind the task's @: synthetic, grid, shuffle; empty for RULER's own."""
    return task.partition("@")[2]


def _with_variant(label: str, variant: str) -> str:
    return f"{label} @{variant}" if variant else label


@dataclass(frozen=True)
class Row:
    """A row of the summary. `values` are in points, one a length; None where there is nothing to say."""

    label: str
    values: tuple[float | None, ...]


def mean_rows(scores: Mapping) -> list[Row]:
    """Means over tasks, a row for every set of tasks, so that no row mixes what must not be averaged.

    The row of RULER's own 13 tasks stands first and holds what scores.json says; lengths that lack one of them have
    their mean in a row that says of how many. Variants (`@synthetic`, `@grid`) are averaged among themselves.
    """
    lengths, cells = scores["lengths"], cells_by_place(scores)
    stated = {entry["length"]: entry["mean"] for entry in scores["lengths_summary"]}
    found: dict[tuple, dict[int, float]] = {}
    for length in lengths:
        groups: dict[str, list[float]] = {}
        for task in scores["tasks"]:
            cell = cells.get((task, length))
            if cell is not None and cell["score"] is not None:
                groups.setdefault(variant_of(task), []).append(cell["score"])
        for variant, values in groups.items():
            whole = variant == "" and len(values) == len(RULER_TASKS) and stated.get(length) is not None
            label = RULER_MEAN if whole else _with_variant(f"mean of {len(values)}", variant)
            order = (not whole, variant, -len(values), label)
            found.setdefault(order, {})[length] = stated[length] if whole else fmean(values)
    return [Row(order[-1], tuple(found[order].get(length) for length in lengths)) for order in sorted(found)]


def position_rows(scores: Mapping, teacher_forced: bool = False) -> list[Row]:
    """Means over the tasks with positions: raw deviation, then range, in points; variants among themselves."""
    rows = []
    for label, key in ((DEVIATION, "deviation"), (RANGE, "range")):
        found: dict[str, dict[int, list[float]]] = {}
        for cell in scores["cells"]:
            position = positions_of(cell, teacher_forced)
            if position:
                by_length = found.setdefault(variant_of(cell["task"]), {})
                by_length.setdefault(cell["length"], []).append(position[key])
        for variant, by_length in sorted(found.items()):
            means = (fmean(by_length[length]) if length in by_length else None for length in scores["lengths"])
            rows.append(Row(_with_variant(label, variant), tuple(means)))
    return rows


@dataclass(frozen=True)
class Window:
    """Up to where a model was trained, in tokens, and YaRN's factor beyond; None where none is declared."""

    tokens: int
    yarn_factor: float | None

    @property
    def beyond(self) -> str:
        """What a longer length is, in a word."""
        return f"YaRN x{self.yarn_factor:g}" if self.yarn_factor else "beyond"


def trained_window(provenance: Mapping) -> Window | None:
    """The trained window: where YaRN starts, by the model's own RoPE parameters or by the run's factor.

    A model folder that declares YaRN says in original_max_position_embeddings where it begins. Other scalings
    (llama3, linear) name there what was trained before them, so theirs is max_position_embeddings.
    """
    model = provenance.get("model") or {}
    rope, factor = model.get("rope") or {}, provenance.get("yarn_factor")
    declared = isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type")) == "yarn"
    tokens = rope.get("original_max_position_embeddings") if declared else None
    tokens = tokens or model.get("max_position_embeddings")
    if not tokens:
        return None
    factor = factor or (rope.get("factor") if declared else None)
    return Window(int(tokens), float(factor) if factor and factor > 1 else None)


def first_beyond(lengths: Sequence[int], window: Window | None) -> int | None:
    """Index of the first length beyond the trained window; None when all are within or nothing is known."""
    beyond = [index for index, length in enumerate(lengths) if window and length > window.tokens]
    return beyond[0] if beyond else None


def model_name(provenance: Mapping) -> str:
    """The model's folder name."""
    path = (provenance.get("model") or {}).get("path") or "model"
    return PurePath(path).name or str(path)


def headline(provenance: Mapping) -> str:
    """One line that says what was run: benchmark and edition, samples, seed, model."""
    parts = [f"{provenance.get('dialect', 'RULER')}, edition {provenance.get('edition', 'unknown')}"]
    for key, words in (("num_samples", "{} samples a cell"), ("seed", "seed {}"), ("yarn_factor", "YaRN x{:g}")):
        if provenance.get(key) is not None:
            parts.append(words.format(provenance[key]))
    return f"{model_name(provenance)}: {', '.join(parts)}"
