"""The learning rate over a stage: linear warm-up, then a cosine down to a share of the peak."""

from __future__ import annotations

import math


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int, min_ratio: float) -> float:
    """The rate of optimizer step `step` (from 0) of a stage.

    Args:
        step: which one.
        steps: of the stage.
        peak: the highest rate, reached at the end of the warm-up.
        warmup_steps: the rate rises linearly over so many steps.
        min_ratio: what is left of the peak at the stage's end.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
