"""A run's folder read as numbers: metrics.json, and targets beside what was measured."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import yaml

from evaluation.json_lines import whole_lines
from evaluation.shapes import ATTRIBUTES
from tokenizer.errors import UserError

PACKAGES = ("torch", "megatron-core", "mosaicml-streaming", "ray", "av", "numpy")
SCORES = ("ruler", "reconstructed", "generated")
TOKENIZER_KEYS = ("psnr", "psnr_foreground", "psnr_pooled", "psnr_foreground_pooled", "clips")
PARTS = (
    "steps.json",
    "tokenizer/metrics.jsonl",
    "pretrain/metrics.jsonl",
    "reconstructions",
    "samples",
    "scores",
    "model",
)


class RunFolder:
    """The files of a run, any of which may be missing.

    Args:
        path: such as runs/demo.

    Raises:
        UserError: nothing of a run is there.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not any((self.path / part).exists() for part in PARTS):
            raise UserError(f"{path} is no run: name the folder that `videoar demo` wrote, such as runs/demo.")

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file, or None if it is missing.

        Raises:
            UserError: it is damaged.
        """
        return self._read(name, "JSON", json.loads)

    def yaml(self, name: str) -> dict[str, Any] | None:
        """A YAML file, or None if it is missing.

        Raises:
            UserError: it is damaged.
        """
        return self._read(name, "YAML", yaml.safe_load)

    def _read(self, name: str, kind: str, parse: Callable[[str], Any]) -> dict[str, Any] | None:
        file = self.path / name
        if not file.is_file():
            return None
        try:
            return parse(file.read_text())
        except (ValueError, yaml.YAMLError) as error:
            raise UserError(f"{file} is no {kind} ({error}): run the step that writes it again.") from error

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The records of a JSON-lines file; a line that is still being written is left out."""
        file = self.path / name
        if not file.is_file():
            return []
        return list(whole_lines(file))


@dataclass(frozen=True)
class Target:
    """What the demo is held against.

    Attributes:
        key: dotted, in metrics.json.
        title: for readers.
        bound: the value to reach.
        unit: "dB", "%" (of a share), "min" or "GB".
        at_least: whether more is better.
    """

    key: str
    title: str
    bound: float
    unit: str
    at_least: bool = True

    def measured(self, metrics: dict[str, Any]) -> float | None:
        """The value in `metrics`, None if it was not measured."""
        return _at(metrics, self.key)

    def interval(self, metrics: dict[str, Any]) -> list[float] | None:
        """Its 95% interval, if it is a share."""
        return _at(metrics, f"{self.key}_interval")

    def met(self, metrics: dict[str, Any]) -> bool | None:
        """Whether the measured value itself, not its interval, reaches the bound; None if there is none."""
        value = self.measured(metrics)
        if value is None:
            return None
        return value >= self.bound if self.at_least else value <= self.bound


TARGETS = (
    Target("tokenizer.psnr", "Reconstruction, whole frame", 26, "dB"),
    Target("tokenizer.psnr_foreground", "Reconstruction, the shape's own pixels", 20, "dB"),
    Target("shapes.generated.colour", "Generated: colour", 0.90, "%"),
    Target("shapes.generated.direction", "Generated: direction", 0.80, "%"),
    Target("shapes.generated.shape", "Generated: shape", 0.70, "%"),
    Target("shapes.ruler.colour", "Ruler on real clips: colour", 0.98, "%"),
    Target("shapes.ruler.direction", "Ruler on real clips: direction", 0.98, "%"),
    Target("shapes.ruler.shape", "Ruler on real clips: shape", 0.98, "%"),
    Target("total_minutes", "Whole run", 30, "min", at_least=False),
    Target("peak_gb", "Peak memory", 8, "GB", at_least=False),
)


def build_metrics(run_dir: str | Path) -> dict[str, Any]:
    """The numbers of a run, as metrics.json holds them; what was not measured is None.

    Returns:
        {"tokenizer": {"psnr", "psnr_foreground", ...: dB}, "shapes": {"ruler", "reconstructed", "generated": {attribute:
        share, attribute_interval: [low, high] (95%, Wilson), "clips"}}, "steps": {name: {"seconds", "peak_gb", ...}},
        "total_minutes", "peak_gb", "targets": [{"key", "target", "measured", "met"}], "environment", "date"}.

    Raises:
        UserError: the folder is no run, or a file of it is damaged.
    """
    run = RunFolder(run_dir)
    reconstruction = run.json("reconstructions/reconstruction.json") or {}
    steps = {
        name: {key: value for key, value in entry.items() if key != "fingerprint"}
        for name, entry in (run.json("steps.json") or {}).items()
    }
    metrics: dict[str, Any] = {
        "tokenizer": {key: reconstruction.get(key) for key in TOKENIZER_KEYS},
        "shapes": {name: _shares(run.json(f"scores/{name}.json")) for name in SCORES},
        "steps": steps,
        "total_minutes": sum(entry["seconds"] for entry in steps.values()) / 60 if steps else None,
        "peak_gb": max((entry["peak_gb"] for entry in steps.values()), default=None),
    }
    metrics["targets"] = [
        {
            "key": t.key,
            "target": t.bound,
            "at_least": t.at_least,
            "measured": t.measured(metrics),
            "met": t.met(metrics),
        }
        for t in TARGETS
    ]
    return metrics | {"environment": environment(), "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}


def _shares(scores: dict[str, Any] | None) -> dict[str, Any]:
    names = (*ATTRIBUTES, "all")
    if scores is None:
        return dict.fromkeys((*names, "clips"))
    intervals = {f"{name}_interval": scores["interval"][name] for name in names}
    return {name: scores[name] for name in names} | intervals | {"clips": scores["clips"]}


def _at(content: Any, key: str) -> Any:
    for word in key.split("."):
        content = content.get(word) if isinstance(content, dict) else None
    return content


def environment() -> dict[str, Any]:
    """The machine and the versions that a figure depends on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
