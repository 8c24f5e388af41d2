"""Training curves as inline SVG that takes the colours of the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#010203"  # stands for the page's own text colour until the picture is written
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ec4899", "#eab308", "#06b6d4", "#84cc16")
SIZE = (4.8, 3.0)  # inches

Lines = Sequence[dict[str, Any]]
"""Records of a metrics.jsonl."""


@dataclass(frozen=True)
class Stage:
    """A stage of a training: its name and its first and last step of the whole run."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class Mark:
    """Something that happened to a run.

    Args:
        step: where it stood.
        harm: whether it cost something.
    """

    step: int
    harm: bool


def stages(lines: Lines) -> list[Stage]:
    """The stages in their order."""
    found: dict[str, Stage] = {}
    for line in lines:
        before = found.get(line["stage"])
        first = before.first if before else line["global_step"] - line["step"]
        last = max(line["global_step"], before.last if before else 0)  # the line of a late score is of an earlier step
        found[line["stage"]] = Stage(line["stage"], first, last)
    return list(found.values())


def series(lines: Lines, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """The points (x, y) of all records that have both; of a step that was done again the last record counts."""
    points = {line[x]: line[y] for line in lines if x in line and y in line}
    steps = sorted(points)
    return np.array(steps, dtype=float), np.array([points[step] for step in steps], dtype=float)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over up to `window` values around each one."""
    if len(values) < 2 or window < 2:
        return values
    ones = np.ones(window)
    return (
        np.convolve(values, ones, "same")[: len(values)]
        / np.convolve(np.ones_like(values), ones, "same")[: len(values)]
    )


def phases(recipe: dict[str, Any]) -> list[Stage]:
    """The phases of a tokenizer's recipe (train.yaml), each named by the frames of its longest clips."""
    found, first = [], 0
    for phase in recipe.get("phases") or []:
        frames = max(batch["num_frames"] for batch in phase["batches"])
        found.append(Stage(f"{frames} frame{'s' if frames > 1 else ''}", first, first + phase["steps"]))
        first += phase["steps"]
    return found


def tokenizer_plots(lines: Lines, spans: Sequence[Stage], held_out_psnr: float | None) -> list[str]:
    """Loss and PSNR of the tokenizer's training, with its phases marked."""
    figure, axes = _figure("loss", "step")
    _mark(axes, spans)
    for colour, name in zip(COLOURS, ("loss", "reconstruction")):
        _curve(axes, *series(lines, "step", name), colour, {"loss": "total", "reconstruction": "pixels only"}[name])
    _finish(axes)
    loss = _svg(figure, "The tokenizer's loss by step")
    figure, axes = _figure("PSNR of training batches, dB", "step")
    _mark(axes, spans)
    _curve(axes, *series(lines, "step", "psnr"), COLOURS[2], "")
    if held_out_psnr is not None:
        axes.axhline(held_out_psnr, color=COLOURS[3], linestyle="--", linewidth=1.2, label="held-out clips, at the end")
    _finish(axes)
    return [loss, _svg(figure, "The tokenizer's PSNR by step")]


def pretrain_plots(lines: Lines, marks: Sequence[Mark] = ()) -> list[str]:
    """Loss and bit accuracy, and both by scale and by latent frame, with the stages marked by their numbers.

    Args:
        lines: of the run.
        marks: what happened to it.
    """
    spans = _numbered(lines)
    plots = []
    for name, label, factor in (("loss", "loss a bit, nats", 1.0), ("bit_accuracy", "bits predicted right, %", 100.0)):
        figure, axes = _figure(label, "step")
        _mark(axes, spans, marks)
        steps, values = series(lines, "global_step", name)
        _curve(axes, steps, factor * values, COLOURS[0], "training")
        steps, values = series(lines, "global_step", f"validation/{name}")
        if len(steps):
            axes.plot(
                steps, factor * values, "o-", color=COLOURS[1], markersize=3.5, linewidth=1.2, label="held-out clips"
            )
        _finish(axes)
        plots.append(_svg(figure, f"{label}, by step"))
    for part, label in (("scale", "scale"), ("frame", "latent frame")):
        for name, title, factor in (
            ("bit_accuracy", "bits predicted right by {}, %", 100.0),
            ("loss", "loss a bit by {}", 1.0),
        ):
            prefix = f"{name}/{part}_"
            found = {int(key.removeprefix(prefix)) for line in lines for key in line if key.startswith(prefix)}
            if not found:
                continue
            figure, axes = _figure(title.format(label), "step")
            _mark(axes, spans, marks)
            for index in sorted(found):
                steps, values = series(lines, "global_step", f"{prefix}{index}")
                _curve(axes, steps, factor * values, COLOURS[index % len(COLOURS)], f"{label} {index}", faint=False)
            _finish(axes, columns=2)
            plots.append(_svg(figure, f"{title.format(label)} and step"))
    return plots


SPEEDS = (
    ("lr", "learning rate", 1.0),
    ("grad_norm", "gradient norm", 1.0),
    ("tokens_per_second", "tokens a second", 1.0),
    ("mfu", "model FLOPs utilisation, % of the peak", 100.0),
    ("goodput", "goodput, % of the time since the first start", 100.0),
    ("data_wait", "waiting for data, ms a step", 1000.0),
    ("memory_gb", "memory, GB", 1.0),
)
"""What `speed_plots` draws: the entry, its title, and a factor."""


def speed_plots(lines: Lines, marks: Sequence[Mark] = ()) -> list[str]:
    """The optimizer's numbers, and those of speed, goodput and memory; arguments as for `pretrain_plots`."""
    spans, plots = _numbered(lines), []
    for index, (name, title, factor) in enumerate(SPEEDS):
        steps, values = series(lines, "global_step", name)
        if not len(steps):
            continue
        figure, axes = _figure(title, "step")
        _mark(axes, spans, marks)
        _curve(axes, steps, factor * values, COLOURS[index % len(COLOURS)], "", faint=name not in ("lr", "goodput"))
        if name != "lr":
            axes.set_ylim(bottom=0)
        plots.append(_svg(figure, f"{title}, by step"))
    return plots


def score_plots(lines: Lines) -> list[str]:
    """Scores of the samples made during the training, one picture a score."""
    names = sorted({key for line in lines for key in line if key.startswith("samples/") and key != "samples/seconds"})
    plots = []
    for index, name in enumerate(names):
        figure, axes = _figure(name.removeprefix("samples/"), "step")
        _mark(axes, _numbered(lines))
        steps, values = series(lines, "global_step", name)
        axes.plot(steps, values, "o-", color=COLOURS[index % len(COLOURS)], markersize=3.5, linewidth=1.4)
        plots.append(_svg(figure, f"{name}, by step"))
    return plots


def _numbered(lines: Lines) -> list[Stage]:
    return [replace(stage, name=roman(number)) for number, stage in enumerate(stages(lines), 1)]


def roman(number: int) -> str:
    """I, II, III, IV, ... up to 39."""
    ones = ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX")
    return "X" * (number // 10) + ones[number % 10]


def _figure(label: str, below: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(label, color=INK, fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel(below, color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=8.5, length=0)
    axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(INK)
    axes.spines["bottom"].set_alpha(0.35)
    return figure, axes


def _curve(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, label: str, faint: bool = True) -> None:
    if not len(x):
        return
    if faint:
        axes.plot(x, y, color=colour, alpha=0.28, linewidth=0.8)
    axes.plot(x, running_mean(y, len(y) // 25), color=colour, linewidth=1.8, label=label or None)


def _mark(axes: Axes, spans: Sequence[Stage], marks: Sequence[Mark] = ()) -> None:
    """Shades every other stage and writes the names above, below the title; a line for each mark, dashed where it did harm."""
    for mark in marks:
        style, colour = ("--", "#dc2626") if mark.harm else (":", INK)
        axes.axvline(mark.step, linestyle=style, color=colour, alpha=0.6, linewidth=0.9)
    for number, stage in enumerate(spans):
        if number % 2:
            axes.axvspan(stage.first, stage.last, color=INK, alpha=0.06, linewidth=0)
        middle = (stage.first + stage.last) / 2
        axes.text(
            middle, 1.01, stage.name, color=INK, alpha=0.75, fontsize=8, ha="center", va="bottom",
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    if spans:
        axes.set_title(axes.get_title("left"), color=INK, fontsize=10, loc="left", fontweight="bold", pad=18)
        axes.set_xlim(spans[0].first, max(spans[-1].last, spans[0].first + 1))


def _finish(axes: Axes, columns: int = 1) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8.5, frameon=False, labelcolor=INK, ncols=columns, handlelength=1.4)


def _svg(figure: Figure, title: str) -> str:
    """An <svg> element without size, fonts or colours of its own for text."""
    buffer = io.StringIO()
    # the salt keeps the ids of two plots on one page apart
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # a <style> inside the page would be the whole page's
    text = re.sub(r"\s*<(metadata|defs>\s*<style).*?</(metadata|style>\s*</defs)>", "", text, count=2, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{title}"', text, count=1)
    text = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", text)
    return text.replace(INK, "currentColor")
