"""The corpus of the demo: short H.264 clips of one coloured shape that moves over a textured background, with captions.

    write_corpus(Path("runs/demo/corpus"), clips=2000, seed=0)

writes `train.csv`, `validation.csv` and `prompts.csv` beside the folder `videos/`. Of the 288 combinations of shape,
colour, direction and speed, 24 (`HELD_OUT`, the same for every seed) occur in no training clip: their captions are the
prompts. Half of the validation clips show them, the other half are new clips of combinations that training has seen;
the column `held_out` says which.
"""

from __future__ import annotations

import csv
import itertools
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokenizer.errors import UserError
from tokenizer.progress import track
from tokenizer.receipts import finished, new_folder
from tokenizer.video_file import write_video

FORMAT = 2  # a corpus of another format is another corpus
SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (222, 36, 36),
    "yellow": (226, 210, 36),
    "green": (36, 190, 52),
    "cyan": (36, 204, 214),
    "blue": (48, 64, 228),
    "magenta": (214, 44, 208),
}
# Counter-clockwise from the right, 45 degrees apart; image rows grow downwards.
DIRECTIONS = ("right", "up-right", "up", "up-left", "left", "down-left", "down", "down-right")
SPEEDS = {"slowly": 0.6 / 64, "quickly": 1.5 / 64}  # frame sides a frame
RADIUS = (13 / 64, 16 / 64)  # half the shape's width, in frame sides
MARGIN = 1 / 64  # left free at the edge of the frame, in frame sides


@dataclass(frozen=True)
class Combination:
    """What a caption says of a clip."""

    shape: str
    colour: str
    direction: str
    speed: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction} {self.speed}"


@dataclass(frozen=True)
class ClipSpec:
    """Everything that `render` needs: the combination, the number of the clip's own random stream, its place.

    Attributes:
        radius, x, y: half the shape's width and the centre of its bounding box in frame 0, in pixels.
    """

    combination: Combination
    seed: tuple[int, ...]
    radius: float
    x: float
    y: float


def all_combinations() -> list[Combination]:
    """The 288 combinations in a fixed order."""
    return [Combination(*values) for values in itertools.product(SHAPES, COLOURS, DIRECTIONS, SPEEDS)]


def _held_out() -> frozenset[Combination]:
    # Every shape 8 times, every direction 3 times, every colour 4 times, every speed 12 times.
    colours, speeds = list(COLOURS), list(SPEEDS)
    return frozenset(
        Combination(shape, colours[(d + 2 * s) % 6], direction, speeds[(d + s) % 2])
        for (s, shape), (d, direction) in itertools.product(enumerate(SHAPES), enumerate(DIRECTIONS))
    )


HELD_OUT = _held_out()


def parse_caption(caption: str) -> Combination:
    """The combination that a caption names.

    Raises:
        UserError: the caption is not one of this corpus.
    """
    words = caption.split()
    if len(words) == 6 and words[0] == "a" and words[3] == "moving":
        combination = Combination(shape=words[2], colour=words[1], direction=words[4], speed=words[5])
        if combination in _KNOWN:
            return combination
    raise UserError(f"'{caption}' is no caption of the moving shapes: write e.g. 'a red circle moving up-left slowly'.")


_KNOWN = frozenset(all_combinations())


def velocity(direction: str, speed: str, size: int) -> tuple[float, float]:
    """The displacement in pixels a frame, (x, y) with y downwards."""
    angle = math.radians(45 * DIRECTIONS.index(direction))
    pixels = SPEEDS[speed] * size
    return pixels * math.cos(angle), -pixels * math.sin(angle)


def coverage(shape: str, radius: float, x: float, y: float, height: int, width: int) -> np.ndarray:
    """The share of each pixel that a shape covers, float32 [height, width] in [0, 1]: anti-aliased edges.

    Args:
        shape: one of `SHAPES`; all are 2 `radius` wide and high, the triangle points upwards.
        radius: in pixels.
        x, y: the centre of the bounding box; pixel (0, 0) has its centre at (0.5, 0.5).
    """
    dy, dx = np.meshgrid(np.arange(height) + 0.5 - y, np.arange(width) + 0.5 - x, indexing="ij")
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - radius
    else:  # the slanted sides run from (0, -radius) to (+-radius, radius)
        distance = np.maximum((2 * np.abs(dx) - dy - radius) / math.sqrt(5), dy - radius)
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


def render(spec: ClipSpec, size: int = 64, frames: int = 17) -> tuple[np.ndarray, np.ndarray]:
    """Draws a clip.

    Returns:
        the clip, uint8 [frames, size, size, 3], and the shape's own pixels, bool of the same shape without channels.
    """
    generator = np.random.default_rng([*spec.seed, 1])
    background = _background(generator, size)  # [size, size, 3]
    colour = np.array(COLOURS[spec.combination.colour]) * generator.uniform(0.92, 1.05)
    vx, vy = velocity(spec.combination.direction, spec.combination.speed, size)
    alpha = np.stack(
        [
            coverage(spec.combination.shape, spec.radius, spec.x + vx * t, spec.y + vy * t, size, size)
            for t in range(frames)
        ]
    )  # [T, H, W]
    clip = background + alpha[..., None] * (colour - background)
    return np.clip(np.rint(clip), 0, 255).astype(np.uint8), alpha > 0.5


def _background(generator: np.random.Generator, size: int) -> np.ndarray:
    """A nearly grey, smooth texture with a little grain, float64 [size, size, 3]."""
    y, x = np.meshgrid(np.linspace(-1, 1, size), np.linspace(-1, 1, size), indexing="ij")
    slope = generator.uniform(0, 2 * math.pi)
    light = generator.uniform(-0.7, 0.7) * (x * math.cos(slope) + y * math.sin(slope))
    for _ in range(4):
        angle, phase = generator.uniform(0, 2 * math.pi, size=2)
        cycles = generator.uniform(0.3, 1.3)  # over half a frame: waves of 25 pixels and more at 64
        wave = np.sin(2 * math.pi * cycles * (x * math.cos(angle) + y * math.sin(angle)) + phase)
        light += generator.uniform(0.1, 0.5) * wave
    grey = generator.uniform(85, 155) + generator.uniform(18, 34) * light + generator.normal(0, 2.0, light.shape)
    tint = generator.uniform(-6, 6, size=3) + generator.uniform(-4, 4, size=3) * x[..., None]
    return np.clip(grey[..., None] + tint, 20, 230)


def make_spec(combination: Combination, seed: tuple[int, ...], size: int, frames: int) -> ClipSpec:
    """A random radius and start such that the shape stays inside the frame for all frames."""
    generator = np.random.default_rng([*seed, 0])
    radius = size * generator.uniform(*RADIUS)
    place = []
    for step in velocity(combination.direction, combination.speed, size):
        low, high = radius + MARGIN * size, size - radius - MARGIN * size
        travel = step * (frames - 1)
        low, high = max(low, low - travel), min(high, high - travel)
        if low > high:
            raise UserError(f"a shape leaves a frame within {frames} frames: write at most {_longest()} frames a clip.")
        place.append(generator.uniform(low, high))
    return ClipSpec(combination, seed, radius, *place)


def _longest() -> int:
    return 1 + int((1 - 2 * RADIUS[1] - 2 * MARGIN) / SPEEDS["quickly"])


def train_specs(clips: int, seed: int, size: int, frames: int) -> list[ClipSpec]:
    """Training clips: all combinations but the held-out ones, each equally often (to within one)."""
    return _specs([c for c in all_combinations() if c not in HELD_OUT], clips, (seed, 0), size, frames)


def validation_specs(clips: int, seed: int, size: int, frames: int) -> list[ClipSpec]:
    """Validation clips: the first half of held-out combinations, the second half of seen ones."""
    unseen = [c for c in all_combinations() if c in HELD_OUT]
    seen = [c for c in all_combinations() if c not in HELD_OUT]
    half = clips - clips // 2
    return _specs(unseen, half, (seed, 1), size, frames) + _specs(seen, clips - half, (seed, 2), size, frames)


def _specs(pool: list[Combination], clips: int, seed: tuple[int, ...], size: int, frames: int) -> list[ClipSpec]:
    generator = np.random.default_rng(seed)
    order: list[int] = []
    while len(order) < clips:
        order += generator.permutation(len(pool)).tolist()
    return [make_spec(pool[order[i]], (*seed, i), size, frames) for i in range(clips)]


def write_corpus(
    out: Path, clips: int, seed: int, size: int = 64, frames: int = 17, fps: float = 8, validation: int = 192
) -> dict[str, Any]:
    """Writes the corpus, or nothing if `out` holds it already.

    Args:
        out: the folder to make.
        clips, validation: the number of training and of validation clips.
        seed: of the whole corpus.
        size: height and width in pixels, even.
        frames, fps: of every clip.

    Returns:
        the receipt: the arguments and the number of `prompts`.

    Raises:
        UserError: the shapes would leave the frame, or `out` holds something else.
    """
    arguments = {
        "kind": "moving shapes", "format": FORMAT, "clips": clips, "validation": validation,
        "seed": seed, "size": size, "frames": frames, "fps": fps,
    }  # fmt: skip
    out = Path(out)
    if (receipt := finished(out, arguments)) is not None:
        return receipt
    if size % 2:
        raise UserError(f"a frame size of {size} cannot be written as H.264: give an even number.")
    splits = {
        "train": train_specs(clips, seed, size, frames),
        "validation": validation_specs(validation, seed, size, frames),
    }
    with new_folder(out, arguments) as (folder, receipt):
        for split, specs in splits.items():
            (folder / "videos" / split).mkdir(parents=True)
            rows = []
            for number, spec in enumerate(track(specs, f"moving shapes, {split}")):
                path = f"videos/{split}/{number:05d}.mp4"
                write_video(render(spec, size, frames)[0], folder / path, fps, crf=12)
                rows.append(_row(path, spec))
            _write_csv(folder / f"{split}.csv", rows)
        prompts = [c for c in all_combinations() if c in HELD_OUT]
        _write_csv(folder / "prompts.csv", [{"caption": c.caption, **asdict(c)} for c in prompts])
        receipt["prompts"] = len(prompts)
    return {"arguments": arguments, **receipt}


def _row(path: str, spec: ClipSpec) -> dict[str, Any]:
    place = {"radius": round(spec.radius, 3), "x": round(spec.x, 3), "y": round(spec.y, 3)}
    held_out = int(spec.combination in HELD_OUT)
    return {
        "path": path,
        "caption": spec.combination.caption,
        **asdict(spec.combination),
        "held_out": held_out,
        **place,
    }


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["path", "caption"])
        writer.writeheader()
        writer.writerows(rows)
