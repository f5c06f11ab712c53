"""From probed windows to the numbers of the report, and whether they show the method's effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rpsd.report.figures import standard_error

# What the quickstart expects of its run; a prototype's margin was 8 points.
LEAST_MARGIN_POINTS = 3.0
LARGEST_CLM_EXCESS = 0.01


@dataclass(frozen=True)
class Probed:
    """A model's losses on the held-out windows.

    Attributes:
        clm: nats per token under the standard view, [N].
        kl: reverse KL of each probed view in nats, mean over the tokens that move, [N, S].
    """

    clm: np.ndarray
    kl: np.ndarray

    @classmethod
    def from_json(cls, value: Mapping) -> Probed:
        """Of a dictionary with lists `clm` and `kl`."""
        return cls(np.array(value["clm"], dtype=np.float64), np.array(value["kl"], dtype=np.float64))


def relative_change(after: np.ndarray, before: np.ndarray) -> tuple[float, float]:
    """Change of the mean in percent, and its standard error from the paired differences; both [N]."""
    scale = 100.0 / before.mean()
    return float((after - before).mean() * scale), float(standard_error(after - before) * scale)


def summarise(before: Probed, standard: Probed, rpsd: Probed, shifts: Sequence[int]) -> dict:
    """All numbers of the comparison, ready for JSON. The headline is the last shift's KL."""
    models = {"before": before, "standard": standard, "rpsd": rpsd}
    summary: dict = {"shifts": list(shifts), "windows": len(before.clm), "models": {}}
    for name, probed in models.items():
        entry = {
            "clm": float(probed.clm.mean()),
            "clm_standard_error": float(standard_error(probed.clm)),
            "kl": probed.kl.mean(axis=0).tolist(),
            "kl_standard_error": standard_error(probed.kl).tolist(),
            "clm_of_windows": probed.clm.tolist(),
            "kl_of_windows": probed.kl.tolist(),
        }
        if name != "before":
            entry["kl_change_percent"], entry["kl_change_error"] = relative_change(probed.kl[:, -1], before.kl[:, -1])
            entry["clm_change_percent"], entry["clm_change_error"] = relative_change(probed.clm, before.clm)
            entry["kl_lower_than_before"] = int((probed.kl[:, -1] < before.kl[:, -1]).sum())
        summary["models"][name] = entry
    # Between the arms, window by window: what the windows differ in by themselves cancels out.
    margin = (standard.kl[:, -1] - rpsd.kl[:, -1]) * 100.0 / before.kl[:, -1].mean()
    summary["margin_points"] = float(margin.mean())
    summary["margin_error"] = float(standard_error(margin))
    summary["rpsd_wins"] = int((margin > 0).sum())
    summary["clm_excess"] = float(rpsd.clm.mean() / standard.clm.mean() - 1.0)
    return summary


def missing_effect(summary: Mapping) -> str | None:
    """One line that says which expectation the numbers do not meet; None if they meet all."""
    margin, error = summary["margin_points"], summary["margin_error"]
    if not margin >= LEAST_MARGIN_POINTS:
        return (
            f"the held-out view KL fell by only {margin:.1f} percentage points more with RPSD than with the control; "
            f"at least {LEAST_MARGIN_POINTS:g} were expected"
        )
    if not margin >= 2.0 * error:
        return (
            f"RPSD's margin of {margin:.1f} percentage points in view KL is within two standard errors of {error:.1f}"
        )
    if not summary["clm_excess"] <= LARGEST_CLM_EXCESS:
        return (
            f"the held-out CLM loss is {100 * summary['clm_excess']:.2f} % higher with RPSD than with the control; "
            f"at most {100 * LARGEST_CLM_EXCESS:g} % were expected"
        )
    return None
