"""Which steps are bad: a loss or gradient norm that is not finite, or far above what it was in the steps before."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

NORMAL = 1.4826
"""The standard deviation of a normal distribution over its median distance from the median."""


class Spikes:
    """The running statistic of loss and gradient norm; bad steps do not enter it. Its state belongs into the checkpoint.

    Median and median distance instead of mean and deviation: one outlier moves them little, so that it does not hide the next one.

    Args:
        factor: how many times the spread above the median is a spike; 0: none is.
        window: the steps that they are taken over.
    """

    def __init__(self, factor: float, window: int):
        self.factor = factor
        self._values: dict[str, deque[float]] = {name: deque(maxlen=window) for name in ("loss", "gradient norm")}

    def reason(self, loss: float, norm: float) -> str | None:
        """Why a step is bad; None: it is not."""
        step = {"loss": loss, "gradient norm": norm}
        if not all(map(math.isfinite, step.values())):
            return f"loss {loss} and gradient norm {norm} are not finite"
        for name, value in step.items():
            limit = self.limit(name)
            if value > limit:
                return (
                    f"{name} {value:.4g} is above {limit:.4g}, {self.factor:g} times the usual spread over the median"
                )
        return None

    def add(self, loss: float, norm: float) -> None:
        """Counts a step that is not bad."""
        if self.factor:
            self._values["loss"].append(loss)
            self._values["gradient norm"].append(norm)

    def limit(self, name: str) -> float:
        """The largest "loss" or "gradient norm" that is no spike."""
        values = self._values[name]
        if not self.factor or len(values) < (values.maxlen or 0):
            return math.inf
        middle = median(values)
        return middle + self.factor * NORMAL * median(abs(value - middle) for value in values)

    def state_dict(self) -> dict[str, Any]:
        """The values that the statistic is taken over."""
        return {name: list(values) for name, values in self._values.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`, or from nothing if it is empty."""
        for name, values in self._values.items():
            values.clear()
            values.extend(state.get(name, ()))
