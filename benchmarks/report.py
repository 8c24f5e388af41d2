"""The last line of every benchmark, and where results worth keeping go."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def hardware(device: str, threads: int) -> str:
    """What a number was measured on, in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"


def peak_memory() -> int:
    """The most memory that this process has held so far, in bytes (Linux; `getrusage` would count the parent's before the start)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def report(name: str, where: str, results: dict[str, Any], keep: bool) -> None:
    """Prints {"name", "hardware", "results"} and, if asked for, writes it to `results/`."""
    content = {"name": name, "hardware": where, "results": results}
    if keep:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content))
