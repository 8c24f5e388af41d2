"""The table of an ablation: what each finished run measured, means with spread over the seeds, and paired differences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from evaluation.ablation_plot import write_plot
from evaluation.metrics import environment
from evaluation.shapes import ATTRIBUTES
from evaluation.statistics import Spread, paired, spread
from evaluation.tables import markdown_table
from tokenizer.errors import UserError
from tokenizer.files import write_whole

MISSING = "missing"


@dataclass(frozen=True)
class TableRow:
    """A row and where its runs are.

    Args:
        name, title, overrides, paper: as in the ablation's settings.
        against: names of the rows that it is compared with.
        runs: the folder of each seed's run.
        steps: what a finished run has in steps.json.
    """

    name: str
    title: str
    overrides: tuple[str, ...]
    paper: str | None
    against: tuple[str, ...]
    runs: Mapping[int, Path]
    steps: tuple[str, ...] = ("pretrain",)


@dataclass(frozen=True)
class Metric:
    """A column.

    Args:
        key: of `read_run`'s result.
        title: for the table.
        factor: to the unit shown.
        digits: after the point.
        higher_is_better: or lower.
    """

    key: str
    title: str
    factor: float = 1.0
    digits: int = 1
    higher_is_better: bool = True

    def show(self, value: float, signed: bool = False) -> str:
        """A value in the unit shown."""
        return f"{self.factor * value:{'+' if signed else ''}.{self.digits}f}"


LOSS = Metric("validation/loss", "validation loss, nats a bit", digits=4, higher_is_better=False)
BITS = Metric("validation/bit_accuracy", "bits right, %", 100, 2)
PSNR = Metric("continuation/psnr", "continuation, dB", 1, 2)
IN_PLACE = Metric("continuation/in_place", "continuation in place, %", 100)
FVD = Metric("fvd", "FVD", 1, 1, higher_is_better=False)


def read_run(folder: Path, names: Sequence[str]) -> dict[str, float] | None:
    """All numbers of a run; None of one that is not finished.

    Args:
        folder: with steps.json, pretrain/metrics.jsonl and scores/.
        names: of the steps that a finished run has.

    Returns:
        "validation/..." at the end of the training, "shapes-FIRST-LAST/...", "continuation/...", "fvd", "steps" (of the training), "videos"
        and "continuations" (how many were scored), "seconds" and "peak_gb" (of all steps).

    Raises:
        UserError: a file of a finished run is missing or damaged.
    """
    steps = _json(folder / "steps.json") if (folder / "steps.json").is_file() else {}
    if not all(name in steps and steps[name]["done"] for name in names):
        return None
    file = folder / "pretrain" / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        last = next(line for line in reversed(lines) if LOSS.key in line)
    except (OSError, ValueError, StopIteration) as error:
        raise UserError(f"{file} holds no validation ({error!r}): delete the run's folder and run it again.") from error
    values = {key: float(value) for key, value in last.items() if key.startswith("validation/")}
    values |= {"steps": float(last["global_step"]), "seconds": sum(step["seconds"] for step in steps.values())}
    values["peak_gb"] = max(step["peak_gb"] for step in steps.values())
    for scores in sorted((folder / "scores").glob("shapes-*.json")):
        content = _json(scores)
        values |= {f"{scores.stem}/{name}": float(content[name]) for name in (*ATTRIBUTES, "all")}
        values["videos"] = content["clips"]
    if (folder / "scores" / "continuation.json").is_file():
        content = _json(folder / "scores" / "continuation.json")
        names = ("psnr", "reconstruction_psnr", "in_place", "last_in_place")
        values |= {f"continuation/{name}": float(content[name]) for name in names}
        values["continuations"] = content["clips"]
        for frame in content["frames"]:
            number = frame["latent_frame"]
            values |= {
                f"continuation/psnr/frame_{number}": frame["psnr"],
                f"continuation/in_place/frame_{number}": frame["in_place"],
            }
    if (folder / "scores" / "fvd.json").is_file():
        values["fvd"] = float(_json(folder / "scores" / "fvd.json")["fvd"])
    return values


def write_table(rows: Sequence[TableRow], evaluation: Mapping[str, Any], out: Path) -> str:
    """Writes `ablation.json`, `ablation.md` and `ablation.png` of the runs that are finished; what is not there is called missing.

    Args:
        rows: of the table.
        evaluation: the settings of the evaluation, for the record.
        out: the ablation's folder.

    Returns:
        the Markdown.
    """
    result = build(rows, evaluation)
    text = markdown(result)
    write_whole(out / "ablation.json", json.dumps(result, indent=2))
    write_whole(out / "ablation.md", text)
    write_plot(result, [(m.key, m.title, m.factor) for m in headline(result)], out / "ablation.png")
    return text


def build(rows: Sequence[TableRow], evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """All numbers: "rows" with each run's own ("runs"), "summary" and "differences"; "missing" runs; the machine."""
    measured = {
        row.name: {seed: run for seed, folder in row.runs.items() if (run := read_run(folder, row.steps))}
        for row in rows
    }
    keys = sorted({key for runs in measured.values() for run in runs.values() for key in run})

    def values(name: str, key: str) -> dict[int, float]:
        return {seed: run[key] for seed, run in measured[name].items() if key in run}

    table = []
    for row in rows:
        summary = {key: spread(list(values(row.name, key).values())) for key in keys}
        differences = {
            other: {key: paired(values(row.name, key), values(other, key)) for key in keys} for other in row.against
        }
        table.append(
            {
                "name": row.name,
                "title": row.title,
                "overrides": list(row.overrides),
                "paper": row.paper,
                "runs": {str(seed): run for seed, run in measured[row.name].items()},
                "summary": _plain(summary),
                "differences": {other: _plain(found) for other, found in differences.items()},
            }
        )
    return {
        "rows": table,
        "seeds": sorted({seed for row in rows for seed in row.runs}),
        "missing": [f"{row.name}, seed {seed}" for row in rows for seed in row.runs if seed not in measured[row.name]],
        "evaluation": dict(evaluation),
        "environment": environment(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def headline(result: dict[str, Any]) -> list[Metric]:
    """The columns of the first table that any run has."""
    known = {key for row in result["rows"] for key in row["summary"]}
    windows = [f"shapes-{window.replace(':', '-')}" for window in result["evaluation"].get("windows", ())]
    shapes = [
        Metric(f"{name}/all", f"all four right, frames {name.removeprefix('shapes-')}, %", 100) for name in windows
    ]
    return [metric for metric in (LOSS, BITS, *shapes, PSNR, IN_PLACE, FVD) if metric.key in known]


def markdown(result: dict[str, Any]) -> str:
    """The tables as Markdown."""
    main = headline(result)
    seeds, rows = len(result["seeds"]), result["rows"]
    total = seeds * len(rows)
    text = f"{total - len(result['missing'])} of {total} runs are finished ({len(rows)} rows, seeds {_listed(result['seeds'])}).\n\n"
    text += "Measured, mean ± standard deviation over the seeds:\n\n"
    text += _table(result, main, paper=any(row["paper"] for row in rows))
    text += "\nDifferences of runs with the same seed, mean [95% interval, Student's t]; **bold** where the interval leaves out 0:\n\n"
    text += _differences(result, main)
    for window in result["evaluation"].get("windows", ()):
        name = f"shapes-{window.replace(':', '-')}"
        columns = [Metric(f"{name}/{attribute}", attribute, 100) for attribute in ATTRIBUTES]
        if f"{name}/all" in {metric.key for metric in main}:
            text += f"\nGenerated videos, frames {window.replace(':', ' to before ')}, % of the videos with the attribute right:\n\n"
            text += _table(result, columns)
    for prefix, title, factor, digits in (
        ("validation/bit_accuracy/frame_", "Validation: bits right by latent frame, all codes before given, %", 100, 2),
        ("continuation/psnr/frame_", "Continuation: PSNR by latent frame, the frames before the model's own, dB", 1, 2),
        ("continuation/in_place/frame_", "Continuation: shapes in place by latent frame, %", 100, 1),
    ):
        known = {key for row in rows for key in row["summary"] if key.startswith(prefix)}
        numbers = sorted(int(key.removeprefix(prefix)) for key in known)
        if numbers:
            text += f"\n{title}:\n\n"
            text += _table(result, [Metric(f"{prefix}{n}", f"frame {n}", factor, digits) for n in numbers])
    return text + "\n" + _conditions(result)


def _table(result: dict[str, Any], columns: Sequence[Metric], paper: bool = False) -> str:
    titles = ["row", *(["paper"] if paper else []), "seeds", *(metric.title for metric in columns)]
    lines = []
    for row in result["rows"]:
        cells = [_cell(row["summary"].get(metric.key), metric) for metric in columns]
        lines.append([row["title"], *([row["paper"] or "-"] if paper else []), str(len(row["runs"])), *cells])
    return markdown_table(titles, lines)


def _cell(found: dict[str, Any] | None, metric: Metric) -> str:
    if found is None:
        return MISSING
    sd = "" if found["sd"] is None else f" ± {metric.factor * found['sd']:.{metric.digits}f}"
    return metric.show(found["mean"]) + sd


def _differences(result: dict[str, Any], columns: Sequence[Metric]) -> str:
    titles = {row["name"]: row["title"] for row in result["rows"]}
    lines = [
        [f"{row['title']} - ({titles[other]})", *(_difference(found.get(metric.key), metric) for metric in columns)]
        for row in result["rows"]
        for other, found in row["differences"].items()
    ]
    better = ["higher is better" if metric.higher_is_better else "lower is better" for metric in columns]
    return markdown_table(["difference", *(f"{m.title} ({b})" for m, b in zip(columns, better))], lines)


def _difference(found: dict[str, Any] | None, metric: Metric) -> str:
    if found is None:
        return MISSING
    mean = metric.show(found["mean"], signed=True)
    if found["interval"] is None:
        return mean
    low, high = found["interval"]
    bounds = f"[{metric.show(low, signed=True)}, {metric.show(high, signed=True)}]"
    return f"**{mean}** {bounds}" if low > 0 or high < 0 else f"{mean} {bounds}"


def _conditions(result: dict[str, Any]) -> str:
    """What the numbers are from."""
    machine = result["environment"]
    runs = [run for row in result["rows"] for run in row["runs"].values()]
    text = (
        f"Measured on {machine['cpu']}, {machine['cores']} cores; torch {machine['versions'].get('torch', 'unknown')}."
    )
    if runs:
        parts = [f"{_range(runs, 'steps')} steps a run"]
        parts += [f"{_range(runs, 'videos')} generated videos"] if "videos" in runs[0] else []
        parts += [f"{_range(runs, 'continuations')} continuations"] if "continuations" in runs[0] else []
        minutes, peak = sum(run["seconds"] for run in runs) / 60, max(run["peak_gb"] for run in runs)
        text += f" {', '.join(parts)} a run; {minutes:.0f} minutes for all finished runs, at most {peak:.1f} GB."
    if result["missing"]:
        text += f" Missing: {'; '.join(result['missing'])}."
    return text + "\n"


def _range(runs: Sequence[dict[str, float]], key: str) -> str:
    numbers = sorted({round(run[key]) for run in runs if key in run})
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _plain(found: Mapping[str, Spread | None]) -> dict[str, Any]:
    return {key: asdict(value) for key, value in found.items() if value is not None}


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read ({error}): delete it and run the ablation again.") from error
