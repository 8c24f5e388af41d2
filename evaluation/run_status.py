"""How a pretraining run is doing: `videoar status RUN`, while it goes on or afterwards."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from evaluation.run_files import PretrainRun, last_life, lives

SILENCE, SILENT_STEPS = 120.0, 20
"""Seconds without a sign of life, and how many steps' time, after which a run on another machine counts as silent."""
EVENTS = 8
TREND = 20
"""Lines of metrics.jsonl that are compared with as many before."""
SPEEDS = ("seconds", "data_wait", "tokens_per_second", "mfu", "memory_gb", "goodput")


def run_status(path: str | Path, now: float | None = None) -> dict[str, Any]:
    """What `videoar status --json` prints; an entry that is not known yet is None.

    Args:
        path: the run's folder.
        now: seconds since the epoch; None: the clock's.

    Returns:
        {"run", "state", "says", "stage", "global_step", "total_steps", "share_done", "last", "validation", "trend", "time_left",
        "checkpoint", "best", "samples", "events"}; ages and times left in seconds.

    Raises:
        UserError: it is no pretraining run.
    """
    run, now = PretrainRun(path), time.time() if now is None else now
    training = run.training
    last = training[-1] if training else None
    stages = run.facts.get("stages", [])
    place = _place(run, last, stages)
    state, says = _state(run, last, now)
    return {
        "run": str(run.path),
        "state": state,
        "says": says,
        **place,
        "last": _last(last, now),
        "validation": _validation(run),
        "trend": _trend(training, place["stage"]),
        "time_left": _time_left(run, training, place, stages) if state != "finished" else None,
        "checkpoint": _checkpoint(run, now),
        "best": run.best or None,
        "samples": _samples(run),
        "events": run.events[-EVENTS:],
    }


def status_text(status: dict[str, Any]) -> str:
    """The same for a terminal: a line a subject."""
    stage, last = status["stage"], status["last"]
    rows = [("", f"{status['run']}: {status['says']}")]
    if stage is not None:
        share = "" if status["share_done"] is None else f"; {100 * status['share_done']:.1f}% of the whole run"
        of = f" of {stage['steps']:,}" if stage["steps"] else ""
        rows.append(
            ("stage", f"{stage['name']} ({stage['number']} of {stage['of']}), step {stage['step']:,}{of}{share}")
        )
    if last is not None:
        rows += [("loss", _loss_text(last, status["trend"])), ("bits right", _bits_text(last, status["validation"]))]
        rows.append(("optimizer", f"learning rate {last['lr']:.2e}, gradient norm {last['grad_norm']:.3f}"))
        if last.get("mfu") is not None:
            rows.append(("speed", _speed_text(last)))
            rows.append(("goodput", f"{100 * last['goodput']:.1f}% of the time since the first start"))
    if status["time_left"] is not None:
        parts = [f"{part['name']} {duration(part['seconds'])}" for part in status["time_left"]["stages"]]
        each = f" ({', '.join(parts)})" if len(parts) > 1 else ""
        rows.append(("time left", f"about {duration(status['time_left']['seconds'])}{each}"))
    if status["checkpoint"] is not None:
        newest = status["checkpoint"]
        rows.append(("checkpoint", f"{newest['name']}, {duration(newest['age'])} old"))
    if status["best"] is not None:
        best = status["best"]
        rows.append(
            ("best", f"{Path(best['checkpoint']).name}: {best['metric']} {best['value']:.4f}, stage {best['stage']}")
        )
    if status["samples"] is not None:
        scores = ", ".join(f"{name} {value:.3f}" for name, value in status["samples"]["scores"].items())
        rows.append(("samples", f"{Path(status['samples']['folder']).name}{': ' + scores if scores else ''}"))
    rows += [("events" if i == 0 else "", event_text(event)) for i, event in enumerate(status["events"])]
    return "".join(f"{name:<12}{text}\n" if i else f"{text}\n" for i, (name, text) in enumerate(rows))


def duration(seconds: float) -> str:
    """In words: 45 s, 12 min, 3 h 05 min, 2 d 4 h."""
    seconds = max(0.0, seconds)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours = minutes // 60
    if hours == 0:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def event_text(event: dict[str, Any]) -> str:
    """One line of it."""
    when = datetime.fromtimestamp(event.get("time", 0)).strftime("%Y-%m-%d %H:%M:%S")
    details = ", ".join(
        f"{name} {_plain(value)}" for name, value in event.items() if name not in ("time", "event", "global_step")
    )
    return (
        f"{when}  step {event.get('global_step', '?')}: {event.get('event', '?')}{f' ({details})' if details else ''}"
    )


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={_plain(one)}" for name, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _place(run: PretrainRun, last: dict[str, Any] | None, stages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stage, step and share done; by cost, where it is known: late stages' steps cost more."""
    names = [stage["name"] for stage in stages]
    if last is None:
        first = (
            {"name": names[0], "number": 1, "of": len(names), "step": 0, "steps": stages[0]["steps"]} if names else None
        )
        return {
            "stage": first,
            "global_step": 0,
            "total_steps": _sum(stages, "steps"),
            "share_done": 0.0 if names else None,
        }
    known = last["stage"] in names
    index = names.index(last["stage"]) if known else 0
    stage = {
        "name": last["stage"], "number": index + 1, "of": max(len(names), 1), "step": last["step"],
        "steps": stages[index]["steps"] if known else None,
    }  # fmt: skip
    share = None
    if known:
        cost = [one["steps"] * one["flops_per_step"] for one in stages]
        share = (sum(cost[:index]) + last["step"] * stages[index]["flops_per_step"]) / sum(cost)
    return {
        "stage": stage,
        "global_step": last["global_step"],
        "total_steps": _sum(stages, "steps"),
        "share_done": share,
    }


def _sum(stages: Sequence[dict[str, Any]], key: str) -> int | None:
    return sum(stage[key] for stage in stages) if stages else None


def _state(run: PretrainRun, last: dict[str, Any] | None, now: float) -> tuple[str, str]:
    """A word, and a sentence's worth of words: whether the run is alive."""
    life = last_life(run.events)
    if life is not None and life["event"] != "start":
        words = {"finished": "finished", "stopped": "stopped by a signal and saved", "failed": "failed"}[life["event"]]
        return life["event"], f"{words} {duration(now - life['time'])} ago"
    # those of an earlier life are older than this one's process
    born = life["time"] - life.get("starting_seconds", 0.0) if life else 0.0
    beats = [beat for beat in run.heartbeats() if beat["time"] >= born]
    signs = [float(one["time"]) for one in (life, last, *beats) if one and "time" in one]
    if not signs:
        return "silent", "nobody has written to it yet, or by an older version that left no sign of life"
    gone = [beat for beat in beats if beat["host"] == platform.node() and not lives(beat["pid"], beat["time"])]
    if gone:
        beat = gone[0]
        when = f"{beat['doing']} at step {beat['global_step']}, {duration(now - beat['time'])} ago"
        return "dead", f"dead: process {beat['rank']} is gone (last seen {when}); the same command goes on"
    slowest = max((beat.get("every", 0.0) for beat in beats), default=0.0)
    limit = max(SILENCE, 3 * slowest, SILENT_STEPS * float((last or {}).get("seconds", 0.0)))
    age = now - max(signs)
    if age > limit:
        return "silent", f"silent: no sign of life for {duration(age)}{_where(beats)}"
    late = [beat for beat in beats if now - beat["time"] > limit]
    if late:
        return (
            "silent",
            f"silent: process {late[0]['rank']} on {late[0]['host']} gave no sign of life for {duration(now - late[0]['time'])}",
        )
    stuck = [beat for beat in beats if now - beat["time"] + beat["since"] > limit]
    if stuck:
        beat = stuck[0]
        return (
            "stuck",
            f"stuck: process {beat['rank']} on {beat['host']} has been {beat['doing']} for {duration(beat['since'])}",
        )
    return "running", f"running{_where(beats)}, last sign of life {duration(age)} ago"


def _where(beats: Sequence[dict[str, Any]]) -> str:
    """What rank 0 does, and where."""
    return f", {beats[0]['doing']} on {beats[0]['host']}" if beats else ""


def _last(last: dict[str, Any] | None, now: float) -> dict[str, Any] | None:
    if last is None:
        return None
    found = {name: last.get(name) for name in ("loss", "bit_accuracy", "lr", "grad_norm", *SPEEDS)}
    return found | {"age": now - last["time"] if "time" in last else None}


def _validation(run: PretrainRun) -> dict[str, Any] | None:
    line = next((line for line in reversed(run.metrics) if "validation/loss" in line), None)
    if line is None:
        return None
    found = {name: line[f"validation/{name}"] for name in ("loss", "bit_accuracy")}
    return found | {"global_step": line["global_step"], "stage": line["stage"]}


def _trend(training: Sequence[dict[str, Any]], stage: dict[str, Any] | None) -> dict[str, Any] | None:
    """The mean loss of the newest lines of the stage, beside that of as many before."""
    lines = [line for line in training if stage and line["stage"] == stage["name"]]
    count = min(TREND, len(lines) // 2)
    if count < 2:
        return None
    before, after = lines[-2 * count : -count], lines[-count:]
    means = [sum(line["loss"] for line in part) / count for part in (before, after)]
    return {"before": means[0], "now": means[1], "steps": after[-1]["global_step"] - before[0]["global_step"]}


def _time_left(
    run: PretrainRun, training: Sequence[dict[str, Any]], place: dict[str, Any], stages: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """By the wall time of the newest steps, validations and saves included; later stages' steps by their cost beside these."""
    stage = place["stage"]
    if not training or not stages or stage["steps"] is None:
        return None
    last = training[-1]
    start = max((event["time"] for event in run.events if event.get("event") == "start"), default=0.0)
    lines = [line for line in training[-50:] if line["stage"] == last["stage"] and line.get("time", 0.0) > start]
    each = last.get("seconds", 0.0)
    if len(lines) > 1 and lines[-1]["step"] > lines[0]["step"]:
        each = (lines[-1]["time"] - lines[0]["time"]) / (lines[-1]["step"] - lines[0]["step"])
    index = stage["number"] - 1
    parts = [{"name": stage["name"], "seconds": each * (stage["steps"] - stage["step"])}]
    for later in stages[index + 1 :]:
        cost = later["flops_per_step"] / stages[index]["flops_per_step"]
        parts.append({"name": later["name"], "seconds": each * cost * later["steps"]})
    return {"seconds": sum(part["seconds"] for part in parts), "stages": parts}


def _checkpoint(run: PretrainRun, now: float) -> dict[str, Any] | None:
    found = run.checkpoints()
    if not found:
        return None
    step, folder = found[-1]
    return {"name": folder.name, "global_step": step, "age": now - (folder / "complete.json").stat().st_mtime}


def _samples(run: PretrainRun) -> dict[str, Any] | None:
    sets = run.samples()
    if not sets:
        return None
    newest = sets[-1]
    return {"folder": str(newest.folder), "global_step": newest.global_step, "scores": newest.scores}


def _loss_text(last: dict[str, Any], trend: dict[str, Any] | None) -> str:
    text = f"{last['loss']:.4f}"
    if trend is None:
        return text
    way = "falling" if trend["now"] < trend["before"] else "rising" if trend["now"] > trend["before"] else "level"
    return f"{text}; {way}: {trend['before']:.4f} -> {trend['now']:.4f} over the last {trend['steps']:,} steps"


def _bits_text(last: dict[str, Any], held_out: dict[str, Any] | None) -> str:
    text = f"{100 * last['bit_accuracy']:.1f}%"
    if held_out is None:
        return text
    return f"{text}; held-out clips {100 * held_out['bit_accuracy']:.1f}% (loss {held_out['loss']:.4f}) at step {held_out['global_step']:,}"


def _speed_text(last: dict[str, Any]) -> str:
    return (
        f"{last['tokens_per_second']:,.0f} tokens/s, MFU {100 * last['mfu']:.1f}%, {last['seconds']:.3f} s a step of which "
        f"{last['data_wait']:.3f} s waiting for data, {last['memory_gb']:.2f} GB"
    )
