"""The cost of a run as a table, and the refusal of one that is too dear."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rpsd.evaluation.preflight import Cost
from megatron_rpsd.evaluation.ruler_run import duration

_HEAD = ("length", "prompts", "tokens in", "tokens out, at most", "TFLOP in", "time, at most")


def total(rows: Sequence[Cost]) -> Cost:
    """All lengths together; `length` is the longest."""
    seconds = [row.seconds for row in rows]
    return Cost(
        max(row.length for row in rows),
        sum(row.prompts for row in rows),
        sum(row.prompt_tokens for row in rows),
        sum(row.generated_tokens for row in rows),
        sum(row.flops for row in rows),
        None if None in seconds else sum(seconds),
    )


def _row(label: str, cost: Cost) -> tuple[str, ...]:
    return (
        label,
        f"{cost.prompts:,}",
        f"{cost.prompt_tokens:,}",
        f"{cost.generated_tokens:,}",
        f"{cost.flops / 1e12:,.1f}" if cost.flops else "-",
        "-" if cost.seconds is None else duration(cost.seconds),
    )


def cost_table(rows: Sequence[Cost]) -> str:
    """A line for each length and one for all."""
    table = [_HEAD, *(_row(str(row.length), row) for row in rows), _row("all", total(rows))]
    widths = [max(len(line[column]) for line in table) for column in range(len(_HEAD))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in table)


def check_limit(rows: Sequence[Cost], hours: float | None) -> None:
    """ValueError where the estimate is above `--limit-hours`."""
    seconds = total(rows).seconds
    if hours is not None and seconds is not None and seconds > hours * 3600:
        raise ValueError(
            f"--limit-hours {hours:g}: the run would take up to {seconds / 3600:.2f} hours; take fewer --num-samples, "
            "--tasks or --lengths"
        )
