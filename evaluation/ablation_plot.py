"""An ablation as a picture: a panel a measure, a line a row, a point a seed, and the mean with its 95% interval."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

POINT, MEAN = "#f97316", "#3b82f6"


def write_plot(result: dict[str, Any], columns: Sequence[tuple[str, str, float]], file: Path) -> None:
    """Writes a PNG; of rows without a finished run only the title is shown.

    Args:
        result: what `evaluation.ablation.build` gives.
        columns: (key, title, factor to the unit shown) of each panel.
        file: its name.
    """
    if not columns:
        return
    rows = result["rows"]
    figure = Figure(figsize=(3.2 + 2.4 * len(columns), 1.2 + 0.42 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, (key, title, factor) in zip(panels, columns):
        for place, row in enumerate(rows):
            points = [factor * run[key] for run in row["runs"].values() if key in run]
            axes.plot(points, [place] * len(points), "o", color=POINT, markersize=4, alpha=0.7)
            found = row["summary"].get(key)
            if found is None:
                continue
            mean = factor * found["mean"]
            low, high = (mean, mean) if found["interval"] is None else (factor * bound for bound in found["interval"])
            axes.errorbar(
                mean, place, xerr=[[mean - low], [high - mean]], fmt="|", color=MEAN, markersize=11, capsize=3
            )
        axes.set_title(title.replace(", ", ",\n"), fontsize=8.5, loc="left")
        axes.tick_params(labelsize=8, length=0)
        axes.grid(axis="x", alpha=0.2)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    panels[0].set_yticks(range(len(rows)), [row["title"] for row in rows], fontsize=8)
    panels[0].invert_yaxis()
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    figure.savefig(temporary, dpi=110, format="png")
    os.replace(temporary, file)
