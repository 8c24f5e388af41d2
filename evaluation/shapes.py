"""The shapes benchmark: colour, shape, direction and speed of a moving-shapes clip by plain pixel measurements.

The backgrounds of the corpus are nearly grey and its shapes saturated, so the *chroma* max(R, G, B) - min(R, G, B) of a
pixel is proportional to the share of it that the shape covers. That survives blur: half of the shape's chroma marks the
place of its edge however soft it is. No learnt model takes part.
"""

from __future__ import annotations

import colorsys
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from data_pipelines.moving_shapes import COLOURS, DIRECTIONS, SHAPES, SPEEDS, coverage, parse_caption
from evaluation.wilson import wilson_interval

ATTRIBUTES = ("colour", "shape", "direction", "speed")
LEAST_CHROMA = 40  # of 255: below it there is no coloured shape; backgrounds stay under 25
LEAST_AREA = 0.004  # of the frame: smaller specks are no shape
LEAST_SPEED = 0.15 / 64  # frame sides a frame: slower is standing still


@dataclass(frozen=True)
class Reading:
    """What the ruler reads in a clip; None where it finds nothing."""

    colour: str | None = None
    shape: str | None = None
    direction: str | None = None
    speed: str | None = None


def moving_foreground(clip: np.ndarray) -> np.ndarray:
    """The pixels of the moving shape.

    Args:
        clip: uint8 [T, H, W, 3]; for reconstruction measures the original, not the reconstruction.

    Returns:
        bool [T, H, W]; all False where a frame shows no shape.
    """
    alpha = _alpha(clip)
    mask = np.zeros(alpha.shape, dtype=bool)
    for t, image in enumerate(alpha):
        labelled: Any = ndimage.label(image > 0.5)
        labels, count = labelled
        if count:
            areas = np.bincount(labels.ravel())[1:]
            if areas.max() >= LEAST_AREA * image.size:
                mask[t] = labels == 1 + int(areas.argmax())
    return mask


def measure(clip: np.ndarray) -> Reading:
    """Reads a clip, uint8 [T, H, W, 3]."""
    mask = moving_foreground(clip)
    if not mask.any():
        return Reading()
    alpha = _alpha(clip)
    centres = _centres(alpha, mask)
    direction, speed = _motion(centres, clip.shape[2])
    return Reading(_colour(clip, alpha, mask), _shape(alpha, mask, centres), direction, speed)


def places(clip: np.ndarray) -> np.ndarray:
    """The centre (y, x) of each frame's shape in pixels, float [T, 2]; NaN in frames without one. `clip` is uint8 [T, H, W, 3]."""
    return _centres(_alpha(clip), moving_foreground(clip))


def score(clips: Iterable[np.ndarray], captions: Sequence[str]) -> dict[str, Any]:
    """The share of clips in which each attribute is the caption's; an attribute that is not found counts as wrong.

    Args:
        clips: uint8 [T, H, W, 3] each.
        captions: one a clip, of the moving-shapes corpus.

    Returns:
        {"colour", "shape", "direction", "speed": shares, "all": the share with all four right, "clips": their number,
        "interval": {attribute: [low, high]} (95%, Wilson)}.
    """
    right = dict.fromkeys((*ATTRIBUTES, "all"), 0)
    n = 0
    for clip, caption in zip(clips, captions, strict=True):
        reading, truth = measure(clip), parse_caption(caption)
        hits = [getattr(reading, name) == getattr(truth, name) for name in ATTRIBUTES]
        for name, hit in zip((*ATTRIBUTES, "all"), [*hits, all(hits)]):
            right[name] += hit
        n += 1
    return {
        **{name: count / max(n, 1) for name, count in right.items()},
        "clips": n,
        "interval": {name: list(wilson_interval(count, n)) for name, count in right.items()},
    }


def _alpha(clip: np.ndarray) -> np.ndarray:
    """The share of each pixel that the shape covers, float32 [T, H, W] in [0, 1]; zeros if there is no shape."""
    clip = clip.astype(np.float32)
    chroma = clip.max(-1) - clip.min(-1)
    # A shape covers 7% of the frame or more, so that this is the chroma well inside it; blur hardly lowers it.
    full = float(np.percentile(chroma, 97))
    if full < LEAST_CHROMA:
        return np.zeros_like(chroma)
    # The background's own small chroma is not coverage.
    floor = min(float(np.median(chroma)), 0.4 * full)
    return np.clip((chroma - floor) / (full - floor), 0, 1)


def _centres(alpha: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The centroid (y, x) of each frame's shape in pixels, float [T, 2]; NaN in frames without one."""
    centres = np.full((len(mask), 2), np.nan)
    for t in np.flatnonzero(mask.any((1, 2))):
        near = ndimage.binary_dilation(mask[t], iterations=2)  # the soft edge weighs as much as it covers
        weight = alpha[t] * near
        ys, xs = np.nonzero(near)
        values = weight[ys, xs]
        centres[t] = np.average(ys + 0.5, weights=values), np.average(xs + 0.5, weights=values)
    return centres


def _colour(clip: np.ndarray, alpha: np.ndarray, mask: np.ndarray) -> str:
    inside = mask & (alpha > 0.8)
    red, green, blue = (float(value) for value in np.median(clip[inside if inside.any() else mask], axis=0))
    hue = colorsys.rgb_to_hsv(red, green, blue)[0]

    def apart(name: str) -> float:
        gap = abs(hue - colorsys.rgb_to_hsv(*COLOURS[name])[0])
        return min(gap, 1 - gap)

    return min(COLOURS, key=apart)


def _motion(centres: np.ndarray, width: int) -> tuple[str | None, str | None]:
    """Direction and speed of a straight line fitted to the centroids."""
    times = np.flatnonzero(np.isfinite(centres[:, 0]))
    if len(times) < 2:
        return None, None
    vy, vx = np.polyfit(times, centres[times], 1)[0]
    pace = math.hypot(vx, vy) / width
    if pace < LEAST_SPEED:
        return None, None
    direction = DIRECTIONS[round(math.degrees(math.atan2(-vy, vx)) / 45) % 8]
    return direction, min(SPEEDS, key=lambda name: abs(math.log(pace / SPEEDS[name])))


def _shape(alpha: np.ndarray, mask: np.ndarray, centres: np.ndarray) -> str:
    """The shape whose best-scaled template overlaps most with the mean of all frames, each moved to its centroid."""
    side = min(alpha.shape[1:])
    total = np.zeros((side, side), dtype=np.float32)
    seen = np.flatnonzero(mask.any((1, 2)))
    for t in seen:
        image = alpha[t] * ndimage.binary_dilation(mask[t], iterations=2)
        rows, columns = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
        at = [rows + centres[t, 0] - side / 2, columns + centres[t, 1] - side / 2]
        total += ndimage.map_coordinates(image, at, order=1)
    mean = total / len(seen)
    names, templates = _templates(side)
    both = np.minimum(templates, mean).sum((1, 2))
    either = np.maximum(templates, mean).sum((1, 2))
    return names[int(np.argmax(both / either))]


@functools.lru_cache(maxsize=4)
def _templates(side: int) -> tuple[list[str], np.ndarray]:
    """Every shape at every radius with its centroid in the middle: names [N], coverage float32 [N, side, side]."""
    names, templates = [], []
    for shape in SHAPES:
        for radius in np.arange(0.06, 0.36, 0.01) * side:
            down = radius / 3 if shape == "triangle" else 0.0  # its centroid lies below its box's centre
            names.append(shape)
            templates.append(coverage(shape, float(radius), side / 2, side / 2 - down, side, side))
    return names, np.stack(templates)
