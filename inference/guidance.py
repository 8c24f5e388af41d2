"""Adaptive classifier-free guidance: its strength changes over frames and scales (DESIGN section 2, Guidance)."""

from __future__ import annotations

import math
from collections.abc import Callable

from tokenizer.errors import UserError

Guidance = str | float | Callable[[int, int], float]
"""A named schedule, a constant, or a function of (t, k)."""


def _ucf(a: float, b: float) -> float:
    return (1 + 4 * a) * (1 - b) + 10 * b


def _t2v(a: float, b: float) -> float:
    return 5 - a - b


SCHEDULES: dict[str, Callable[[float, float], float]] = {"ucf": _ucf, "t2v": _t2v}
"""gamma(a, b); a runs from 0 to 1 over the frames, b over the scales."""


def guidance_table(guidance: Guidance, num_frames: int, trained_frames: int, num_scales: int) -> list[list[float]]:
    """gamma of every (frame, scale), a list of T rows of K numbers.

    a = min(t, T' - 1) / (T' - 1) with T' = min(num_frames, trained_frames), b = k / (K - 1); each is 0 for 0 / 0.

    Args:
        guidance: "ucf", "t2v", a constant, or a function of (t, k). Given frames count in t.
        num_frames: T, requested latent frames.
        trained_frames: latent frames that the model was trained on.
        num_scales: K.

    Raises:
        UserError: an unknown schedule, or a strength that is no finite number.
    """
    if isinstance(guidance, str) and guidance not in SCHEDULES:
        raise UserError(f"the guidance '{guidance}' is unknown: use {', '.join(SCHEDULES)} or a number.")

    def gamma(t: int, k: int) -> float:
        if isinstance(guidance, str):
            last = min(num_frames, trained_frames) - 1
            a = min(t, last) / last if last else 0.0
            b = k / (num_scales - 1) if num_scales > 1 else 0.0
            return SCHEDULES[guidance](a, b)
        value = guidance(t, k) if callable(guidance) else guidance
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"the guidance of frame {t} and scale {k} is {value}: give a finite number.")
        return number

    return [[gamma(t, k) for k in range(num_scales)] for t in range(num_frames)]


def needs_unconditional(table: list[list[float]]) -> bool:
    """Whether the unconditional branch has any effect: not if gamma is 1 throughout."""
    return any(gamma != 1 for row in table for gamma in row)
