"""A run as one HTML page that needs nothing beside it, and as metrics.json.

videoar report --run runs/demo
"""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from evaluation.clip_sections import generated_section, given_section, reconstruction_section
from evaluation.html_parts import Section, missing, number, percent, section, verdict
from evaluation.metrics import SCORES, TARGETS, RunFolder, Target, build_metrics
from evaluation.plots import phases, pretrain_plots, roman, stages, tokenizer_plots
from evaluation.shapes import ATTRIBUTES
from evaluation.sheet import write_sheet
from tokenizer.errors import UserError
from tokenizer.files import write_whole

__all__ = ["build_metrics", "write_report"]

TEMPLATE = Path(__file__).with_name("report.html")
INTRO = """<p>This page shows one run of VideoAR from video files to a model that generates: a corpus of short clips of moving shapes,
a tokenizer that turns clips into bits and back, a transformer that learned to predict those bits frame by frame and scale by scale,
and what it draws for prompts that no training clip had.</p>
<p>Every number was <strong>measured</strong> in this run, on the machine named at the end. The model is a toy, small enough for a
laptop; none of its numbers can be compared with those of the paper, and none are.</p>"""
SCORE_TITLES = {"ruler": "Real clips", "reconstructed": "Reconstructions", "generated": "Generated clips"}


def write_report(run_dir: str | Path, given_frames: int | None = None) -> Path:
    """Writes metrics.json, report.html and a contact sheet (samples.png) into a run's folder; what was not made is called "not run".

    Args:
        run_dir: such as runs/demo.
        given_frames: how many frames of the continuation samples were given; None: the pipeline's default, half of the clip.

    Returns:
        the page.

    Raises:
        UserError: the folder is no run, or a file of it is damaged.
    """
    run = RunFolder(run_dir)
    metrics = build_metrics(run_dir)
    sections = [
        _summary(metrics),
        generated_section(run),
        given_section(run, given_frames),
        _scores(metrics),
        reconstruction_section(run),
        _curves(run, metrics),
        _steps(metrics),
        _machine(metrics),
    ]
    links = "".join(f'<a href="#{part.anchor}">{escape(part.title)}</a>' for part in sections)
    page = Template(TEMPLATE.read_text()).substitute(
        title=f"VideoAR: {escape(run.path.resolve().name)} run",
        intro=INTRO,
        links=links,
        sections="\n".join(part.html for part in sections),
    )
    write_whole(run.path / "metrics.json", json.dumps(metrics, indent=2))
    write_whole(run.path / "report.html", page)
    prompts = run.path / "samples" / "prompts" / "prompts.csv"
    if prompts.exists():
        try:
            write_sheet(prompts, run.path / "samples.png")
        except UserError as error:  # the page, which shows the rest, is worth more
            print(f"no contact sheet: {error}", file=sys.stderr)
    return run.path / "report.html"


def _summary(metrics: dict[str, Any]) -> Section:
    tiles = "".join(_tile(target, metrics) for target in TARGETS)
    met = [target.met(metrics) for target in TARGETS]
    missed = f", {met.count(False)} not met" if False in met else ""
    unknown = f", {met.count(None)} not run" if None in met else ""
    text = (
        f"<p>{met.count(True)} of {len(met)} targets met{missed}{unknown}. A target counts as met if the measured value itself "
        "reaches it. Bars show a share with its 95% interval; the thin mark is its target.</p>"
    )
    return section("targets", "Targets", f'{text}<div class="grid tiles">{tiles}</div>')


def _tile(target: Target, metrics: dict[str, Any]) -> str:
    value, interval = target.measured(metrics), target.interval(metrics)
    sign = "≥" if target.at_least else "≤"
    if target.unit == "%":
        shown, bound = percent(value), f"{100 * target.bound:g}%"
    else:
        shown, bound = (
            number(value, 1 if target.unit in ("dB", "min") else 2, target.unit),
            f"{target.bound:g} {target.unit}",
        )
    bar = _range(value, interval, target.bound) if value is not None and interval else ""
    return (
        f'<div class="card tile"><span class="name">{escape(target.title)}</span><span class="value">{shown}</span>{bar}'
        f'<span class="foot"><span>target {sign} {bound}</span>{verdict(target.met(metrics))}</span></div>'
    )


def _range(share: float, interval: list[float], bound: float | None) -> str:
    low, high = interval
    tick = f'<u style="left:{100 * bound:.1f}%"></u>' if bound is not None else ""
    return (
        f'<div class="range"><i style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></i>'
        f'<b style="left:{100 * share:.1f}%"></b>{tick}</div>'
    )


def _scores(metrics: dict[str, Any]) -> Section:
    shapes = metrics["shapes"]
    text = (
        "<p>A ruler of plain pixel measurements, without any learnt model, reads the colour, shape, direction and speed off each clip. "
        "On real clips it shows how far it can be trusted; on reconstructions, what the tokenizer keeps; on generated clips, what the "
        "prompts reach. Shares of clips read as their caption says, with 95% Wilson intervals.</p>"
    )
    if all(shapes[name]["clips"] is None for name in SCORES):
        return section("scores", "Scores", text + missing("The clips were not scored."))
    bounds = {target.key: target.bound for target in TARGETS}
    heads = "".join(f"<th>{SCORE_TITLES[name]}<br>{_count(shapes[name]['clips'])}</th>" for name in SCORES)
    rows = ""
    for attribute in (*ATTRIBUTES, "all"):
        cells = "".join(_score(shapes[name], attribute, bounds.get(f"shapes.{name}.{attribute}")) for name in SCORES)
        rows += f"<tr><th>{'all four' if attribute == 'all' else attribute}</th>{cells}</tr>"
    table = f'<div class="scroll"><table><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    return section("scores", "Scores", text + table)


def _count(clips: int | None) -> str:
    return "not run" if clips is None else f"{clips} clips"


def _score(shares: dict[str, Any], attribute: str, bound: float | None) -> str:
    share = shares[attribute]
    if share is None:
        return '<td><span class="chip none">not run</span></td>'
    low, high = shares[f"{attribute}_interval"]
    chip = "" if bound is None else f" {verdict(share >= bound)}"
    target = "" if bound is None else f", target ≥ {100 * bound:g}%"
    return (
        f"<td><strong>{percent(share)}</strong>{chip}{_range(share, [low, high], bound)}"
        f'<span class="note">{100 * low:.1f} to {100 * high:.1f}%{target}</span></td>'
    )


def _curves(run: RunFolder, metrics: dict[str, Any]) -> Section:
    tokenizer, pretraining = run.lines("tokenizer/metrics.jsonl"), run.lines("pretrain/metrics.jsonl")
    text = "<h3>Tokenizer</h3>"
    if tokenizer:
        spans = phases(run.yaml("tokenizer/train.yaml") or {})
        text += _plots(tokenizer_plots(tokenizer, spans, metrics["tokenizer"]["psnr"]))
    else:
        text += missing("The tokenizer was not trained.")
    text += "<h3>Transformer</h3>"
    if pretraining:
        named = [(roman(i), escape(stage.name)) for i, stage in enumerate(stages(pretraining), 1)]
        names = "; ".join(numeral if name == numeral else f"{numeral} {name}" for numeral, name in named)
        text += (
            f'<p class="note">Stages: {names}. In training, bits are flipped (error correction), frames hidden and prompts dropped '
            "at random, which makes it harder; held-out clips come without. A guess is right for half of the bits.</p>"
        ) + _plots(pretrain_plots(pretraining))
    else:
        text += missing("The transformer was not trained.")
    return section("training", "Training", text)


def _plots(plots: list[str]) -> str:
    return '<div class="grid plots">' + "".join(f"<figure>{plot}</figure>" for plot in plots) + "</div>"


def _steps(metrics: dict[str, Any]) -> Section:
    steps = metrics["steps"]
    if not steps:
        return section("steps", "Time and memory", missing("No step was timed."))
    longest = max(entry["seconds"] for entry in steps.values()) or 1.0
    rows = ""
    for name, entry in steps.items():
        bar = f'<div class="range"><i style="left:0;width:{100 * entry["seconds"] / longest:.1f}%;opacity:1"></i></div>'
        # the step that writes this page is never done while it does
        state = "" if entry.get("done", True) else ' <span class="chip none">running</span>'
        rows += (
            f'<tr><th>{escape(name)}{state}</th><td class="right">{_duration(entry["seconds"])}</td><td style="width:35%">{bar}</td>'
            f'<td class="right">{entry["peak_gb"]:.2f} GB</td><td class="right">{entry.get("attempts", entry.get("runs", 1))}</td></tr>'
        )
    rows += (
        f'<tr><th>total</th><td class="right"><strong>{_duration(60 * metrics["total_minutes"])}</strong></td><td></td>'
        f'<td class="right"><strong>{metrics["peak_gb"]:.2f} GB</strong></td><td></td></tr>'
    )
    titles = ("step", "time", "", "peak memory", "times started")
    head = (
        "<tr>" + "".join(f'<th class="{"right" if title != "step" else ""}">{title}</th>' for title in titles) + "</tr>"
    )
    text = (
        "<p>Wall time of each step, attempts that were killed included, and the largest memory of its whole process tree (shared pages "
        "counted once; the total is the largest of the steps). Installing is not counted.</p>"
    )
    return section(
        "steps",
        "Time and memory",
        f'{text}<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>',
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _machine(metrics: dict[str, Any]) -> Section:
    environment = metrics["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    facts = {
        "processor": environment["cpu"],
        "cores used": environment["cores"],
        "memory": f"{environment['memory_gb']:g} GB",
        "system": environment["system"],
        "versions": versions,
        "page written": metrics["date"],
    }
    rows = "".join(f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    return section("machine", "Machine", f'<dl class="facts">{rows}</dl>')
