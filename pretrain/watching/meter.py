"""The numbers of speed in a line of metrics.jsonl: means over the steps since the line before."""

from __future__ import annotations

import time
from typing import Any

import psutil
import torch


class StepMeter:
    """Adds up steps until their line is written.

    Args:
        peak: FLOP/s of all devices together.
        began: when the run's first process began, seconds since the epoch.
    """

    def __init__(self, peak: float, began: float):
        self.peak, self.began = peak, began
        self.clear()

    def add(self, seconds: float, waited: float, tokens: int, flops: float) -> None:
        """One step.

        Args:
            seconds: of data, forward, backward and update.
            waited: the part of it that the loop waited for its batch.
            tokens: predicted, of the global batch.
            flops: model FLOPs of the global batch.
        """
        self._steps += 1
        self._seconds += seconds
        self._waited += waited
        self._tokens += tokens
        self._flops += flops

    def values(self, productive_seconds: float) -> dict[str, Any]:
        """What is logged of the steps since the last call, and of the run.

        Args:
            productive_seconds: of all steps of the run that counted.
        """
        now, steps, seconds = time.time(), max(self._steps, 1), max(self._seconds, 1e-9)
        values = {
            "time": round(now, 3),
            "seconds": self._seconds / steps,
            "data_wait": self._waited / steps,
            "tokens_per_second": self._tokens / seconds,
            "mfu": self._flops / seconds / self.peak,
            "memory_gb": memory() / 1e9,
            "productive_seconds": round(productive_seconds, 3),
            "goodput": productive_seconds / max(now - self.began, 1e-9),
        }
        self.clear()
        return values

    def clear(self) -> None:
        """Forgets the steps since the last line."""
        self._steps, self._tokens = 0, 0
        self._seconds = self._waited = self._flops = 0.0


def memory() -> int:
    """Bytes: the most that torch has held on this process's GPU, or this process's resident memory where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
