"""A pretraining run as one HTML page that needs nothing beside it.

videoar status runs/ucf101-l --html run.html
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from evaluation.html_parts import Section, missing, percent, section, video
from evaluation.media import enlarge, read_video
from evaluation.plots import Mark, pretrain_plots, roman, score_plots, speed_plots, stages
from evaluation.run_files import PretrainRun, SampleSet
from evaluation.run_status import duration, event_text, run_status
from evaluation.videos import read_table
from tokenizer.errors import UserError
from tokenizer.files import write_whole

TEMPLATE = Path(__file__).with_name("report.html")
QUIET = ("saved", "finished", "fault_injected", "samples_left_out")
"""Events that the curves do not mark."""
HARMLESS = ("start", "stopped")
CLIPS, EARLIER, EVENTS = 16, 4, 200
"""Most clips shown of the newest set, earlier sets, and events."""


def write_page(path: str | Path, out: str | Path) -> Path:
    """Writes the page of a run, which may still go on.

    Args:
        path: the run's folder.
        out: the page's file.

    Raises:
        UserError: it is no pretraining run.
    """
    run, status = PretrainRun(path), run_status(path)
    marks = [
        Mark(event["global_step"], event["event"] not in HARMLESS)
        for event in run.events
        if event["event"] not in QUIET and not (event["event"] == "start" and event["global_step"] == 0)
    ]
    sections = [
        _summary(status),
        _curves("training", "Training", run, pretrain_plots(run.metrics, marks) if run.training else []),
        _curves("speed", "Optimizer and speed", run, speed_plots(run.metrics, marks)),
        _samples(run),
        _events(run),
    ]
    name = escape(Path(path).resolve().name)
    page = Template(TEMPLATE.read_text()).substitute(
        title=f"VideoAR: run {name}",
        intro=f"<p>{escape(status['says'][:1].upper() + status['says'][1:])}.</p>",
        links="".join(f'<a href="#{part.anchor}">{escape(part.title)}</a>' for part in sections),
        sections="\n".join(part.html for part in sections),
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, page)
    return out


def _summary(status: dict[str, Any]) -> Section:
    last, stage, left = status["last"] or {}, status["stage"], status["time_left"]
    validation, best, checkpoint = status["validation"], status["best"], status["checkpoint"]
    tiles = [
        ("Done", percent(status["share_done"]), f"step {status['global_step']:,} of {status['total_steps'] or 0:,}"),
        ("Stage", escape(stage["name"]) if stage else "–", f"{stage['number']} of {stage['of']}" if stage else ""),
        ("Loss", _value(last.get("loss"), "{:.4f}"), f"held-out {validation['loss']:.4f}" if validation else ""),
        (
            "Bits right", percent(last.get("bit_accuracy")),
            f"held-out {100 * validation['bit_accuracy']:.1f}%" if validation else "",
        ),
        ("Tokens a second", _value(last.get("tokens_per_second"), "{:,.0f}"), _value(last.get("seconds"), "{:.3f} s a step")),
        ("MFU", percent(last.get("mfu")), "of the devices' peak"),
        ("Goodput", percent(last.get("goodput")), "of the time since the first start"),
        ("Time left", duration(left["seconds"]) if left else "–", "by the newest steps" if left else ""),
        (
            "Newest checkpoint", escape(checkpoint["name"]) if checkpoint else "–",
            f"{duration(checkpoint['age'])} old" if checkpoint else "",
        ),
        (
            "Best checkpoint", escape(Path(best["checkpoint"]).name) if best else "–",
            f"{escape(best['metric'])} {best['value']:.4f}" if best else "",
        ),
    ]  # fmt: skip
    cards = "".join(
        f'<div class="card tile"><span class="name">{name}</span><span class="value">{value}</span><span class="foot">{foot}</span></div>'
        for name, value, foot in tiles
    )
    return section("state", "State", f'<div class="grid tiles">{cards}</div>')


def _value(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _curves(anchor: str, title: str, run: PretrainRun, plots: Sequence[str]) -> Section:
    if not plots:
        return section(anchor, title, missing("No step has been logged yet."))
    named = [(roman(i), escape(stage.name)) for i, stage in enumerate(stages(run.metrics), 1)]
    names = "; ".join(numeral if name == numeral else f"{numeral} {name}" for numeral, name in named)
    note = (
        f'<p class="note">Stages: {names}. Dotted lines: the run stopped or went on from a checkpoint; dashed red ones: something went '
        "wrong (see the events).</p>"
    )
    figures = "".join(f"<figure>{plot}</figure>" for plot in plots)
    return section(anchor, title, f'{note}<div class="grid plots">{figures}</div>')


def _samples(run: PretrainRun) -> Section:
    sets = run.samples()
    if not sets:
        return section(
            "samples", "Samples", missing("No samples have been made: set samples.every, or call videoar samples.")
        )
    newest, earlier = sets[-1], sets[:-1]
    rows = read_table(newest.folder / "clips" / "prompts.csv")[:CLIPS]
    cards = "".join(_clip(Path(row["path"]), row["caption"]) for row in rows)
    body = f'<h3>Step {newest.global_step:,}</h3>{_scores(newest)}<div class="grid clips">{cards}</div>'
    if figures := "".join(f"<figure>{plot}</figure>" for plot in score_plots(run.metrics)):
        body += f'<h3>Scores</h3><div class="grid plots">{figures}</div>'
    # evenly over the run, so that one sees it learn; the same seeds each time
    count = min(EARLIER, len(earlier))
    shown = [earlier[i * (len(earlier) - 1) // max(count - 1, 1)] for i in range(count)]
    if shown:
        before = "".join(_clip(one.folder / "contact.mp4", f"step {one.global_step:,}", side=0) for one in shown)
        body += f'<h3>Earlier</h3><div class="grid pairs" style="max-width: 860px">{before}</div>'
    return section("samples", "Samples", body)


def _scores(one: SampleSet) -> str:
    if not one.scores:
        return ""
    return f'<p class="note">{escape(", ".join(f"{name} {value:.3f}" for name, value in one.scores.items()))}</p>'


def _clip(file: Path, caption: str, side: int = 192) -> str:
    try:
        frames, fps = read_video(file)
    except UserError as error:
        return f'<figure class="clip">{missing(str(error))}</figure>'
    shown = video(enlarge(frames, side) if side else frames, fps, caption)
    return f'<figure class="clip">{shown}<figcaption><strong>{escape(caption)}</strong></figcaption></figure>'


def _events(run: PretrainRun) -> Section:
    if not run.events:
        return section("events", "Events", missing("Nothing has been recorded."))
    shown = run.events[-EVENTS:]
    left_out = f'<p class="note">The last {EVENTS} of {len(run.events)}.</p>' if len(run.events) > EVENTS else ""
    rows = "".join(f"<tr><td>{escape(event_text(event))}</td></tr>" for event in reversed(shown))
    return section("events", "Events", f'{left_out}<div class="scroll"><table><tbody>{rows}</tbody></table></div>')
