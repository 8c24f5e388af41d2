"""Times that are compared with each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def best(run: Callable[[], Any], device: str = "cpu", repeat: int = 1) -> float:
    """The shortest of several runs, in seconds."""
    times = []
    for _ in range(repeat):
        wait(device)
        started = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - started)
    return min(times)


def by_turns(runs: Sequence[Callable[[], Any]], repeat: int, device: str = "cpu") -> list[float]:
    """The shortest time of each after one to warm up, in seconds; they take turns, so that a machine whose speed drifts is fair to all."""
    for run in runs:
        run()
    return [min(several) for several in zip(*([best(run, device) for run in runs] for _ in range(repeat)))]


def wait(device: str) -> None:
    """Until the device has done what was asked of it."""
    if device != "cpu":
        torch.cuda.synchronize()
