"""A tokenizer's reconstruction.json as one picture: how PSNR and SSIM are distributed, and which bits carry something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from evaluation.bit_usage import are_dead
from evaluation.plots import COLOURS

WIDTH, ROW = 11.0, 0.36  # inches: of the picture, and of a scale's row
DPI = 150


def write_figure(result: dict[str, Any], file: Path) -> None:
    """Draws what `evaluate_reconstruction` returned into a PNG."""
    draw(result).savefig(file, dpi=DPI)


def draw(result: dict[str, Any]) -> Figure:
    """Above the distributions over clips by size, below the entropy of each bit on each scale over all sizes."""
    entropy = np.array(result["bits"]["entropy"])  # [K, d]
    scales = len(entropy)
    heights = (3.2, 1.1 + ROW * max(scales, 3))
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr]
    # each with margins of its own
    above, below = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
    left, right = above.subplots(1, 2)
    _distribution(left, result, "psnr", "PSNR of a clip, dB", 1)
    _distribution(right, result, "ssim", "SSIM of a clip", 3)
    _entropies(below, below.subplots(), result, entropy)
    return figure


def _distribution(axes: Axes, result: dict[str, Any], key: str, title: str, digits: int) -> None:
    values = {
        name: np.array([clip[key] for clip in result["each"] if clip["variant"] == name]) for name in result["buckets"]
    }
    everything = np.concatenate(list(values.values()))
    low, high = everything.min(), everything.max()
    margin = 0.05 * (high - low) or 0.5 * 10.0**-digits  # equal values still make a bar
    edges = np.linspace(low - margin, high + margin, min(30, max(8, round(2 * len(everything) ** 0.5))) + 1)
    shown = {name: some for name, some in values.items() if len(some)}
    room = 1 + 0.13 * len(shown)  # for the legend, above the bars
    for number, (name, some) in enumerate(shown.items()):
        colour = COLOURS[number % len(COLOURS)]
        axes.hist(some, edges, color=colour, alpha=0.35)
        axes.hist(some, edges, color=colour, histtype="step", linewidth=1.4)
        label = f"{name}, {len(some)} clips: mean {some.mean():.{digits}f}"
        axes.axvline(float(some.mean()), ymax=1 / room, color=colour, linestyle="--", linewidth=1.6, label=label)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_ylabel("clips", fontsize=9)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=8.5)
    axes.set_ylim(top=room * axes.get_ylim()[1])
    axes.legend(fontsize=8.5, frameon=False, loc="upper left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _entropies(figure: SubFigure, axes: Axes, result: dict[str, Any], entropy: np.ndarray) -> None:
    scales, dim = entropy.shape
    bits = result["bits"]
    picture = axes.pcolormesh(
        np.arange(dim + 1) - 0.5, np.arange(scales + 1) - 0.5, entropy, cmap="Blues", vmin=0, vmax=1,
        edgecolors="#ffffff", linewidth=0.4,
    )  # fmt: skip
    axes.invert_yaxis()  # coarse scales above
    dead = np.argwhere(are_dead(np.array(bits["share"])))
    if len(dead):
        axes.plot(dead[:, 1], dead[:, 0], "x", color="#e11d48", markersize=5, markeredgewidth=1.4, linestyle="none")
    sizes = ", all sizes together" if len(result["buckets"]) > 1 else ""
    title = f"Entropy of each bit, by scale{sizes}" + (
        f"  (\N{MULTIPLICATION SIGN} dead: {len(dead)})" if len(dead) else ""
    )
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("bit of a token", fontsize=9)
    axes.set_yticks(range(scales), _scale_names(result, scales))
    axes.tick_params(labelsize=8.5, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    right = axes.secondary_yaxis("right")
    notes = [f"mean {mean:.2f}, {count} dead" for mean, count in zip(bits["entropy_mean"], bits["dead"])]
    right.set_yticks(range(scales), notes)
    right.tick_params(labelsize=8.5, length=0)
    right.spines["right"].set_visible(False)
    bar = figure.colorbar(picture, ax=axes, pad=0.01, fraction=0.03, ticks=(0, 0.5, 1))
    bar.set_label("bits", fontsize=9)
    bar.ax.tick_params(labelsize=8.5)
    bar.outline.set_visible(False)  # type: ignore[operator]


def _scale_names(result: dict[str, Any], scales: int) -> list[str]:
    """Scales by their number, and by their grid where all sizes have the same one."""
    names = []
    for scale in range(scales):
        schedules = [bucket["schedule"] for bucket in result["buckets"].values() if bucket["bits"]]
        grids = {tuple(schedule[scale]) for schedule in schedules if scale < len(schedule)}
        grid = " ({}x{})".format(*grids.pop()) if len(grids) == 1 else ""
        names.append(f"scale {scale}{grid}")
    return names
