"""The settings of watching a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tokenizer.errors import UserError, check_each

PATHS = ("prompts", "fvd_real", "i3d")


@dataclass(frozen=True)
class WatchConfig:
    """What a run tells of itself beside metrics.jsonl and Weights & Biases.

    Args:
        tensorboard: write event files to OUT/tensorboard.
        peak_flops: FLOP/s of one device that the model FLOPs are held against (MFU); null: the published ones of a known GPU, else the
            rate of a large matrix product, measured at each start.
        best_metric: of all checkpoints the one stays whose value of this is best: anything of a validation, such as "validation/loss", if
            it is taken at the checkpoint's own step, or of the samples, such as "samples/shapes_all" or "samples/fvd". Stages are not
            compared: the best one is of the newest stage that has any. null: none stays.
        best_is: which value is the best one.
    """

    tensorboard: bool = False
    peak_flops: float | None = None
    best_metric: str | None = "validation/loss"
    best_is: Literal["lowest", "highest"] = "lowest"

    def __post_init__(self) -> None:
        if self.peak_flops is not None and not 0 < self.peak_flops < math.inf:
            raise UserError(f"watch.peak_flops is {self.peak_flops}: give a number above 0, or null.")
        if self.best_metric is not None and not self.best_metric.startswith(("validation/", "samples/")):
            raise UserError(
                f"watch.best_metric is '{self.best_metric}': name a number of a validation (validation/loss) or of the samples "
                "(samples/shapes_all), or null."
            )


@dataclass(frozen=True)
class SamplesConfig:
    """Videos that a run makes and scores while it trains, from its checkpoints, in one process beside it.

    Args:
        every: global steps between two sets: the first checkpoint at or after each multiple is taken; 0: none are made.
        prompts: a file as for `videoar generate --prompt-file`; null: the first classes, or the first captions of the stage's clips.
        count: prompts that are taken from it, the first ones.
        per_prompt: videos a prompt.
        guidance: "ucf", "t2v", or a number.
        temperature: of the drawn bits.
        seed: of the first video; the others count on, and every set starts from it anew.
        batch_size: videos at once.
        device: where they are made, "cpu" or "cuda"; on "cuda" the process needs its own place in the memory of rank 0's GPU.
        threads: of the process.
        low_priority: the process takes the lowest priority for processor and disk.
        minutes: after which a set is given up; a run that ends waits so long for its last set.
        shapes: scores the sets as moving shapes (`samples/shapes_all` and by attribute); the prompts must be captions of that corpus.
        fvd_real: real videos for a Frechet video distance of each set (`samples/fvd`), as `videoar evaluate fvd --real`; null: none. It
            falls with the number of videos: only sets of one run compare.
        i3d: the torchscript file of I3D for it; loading it runs its code, so know its origin.
    """

    every: int = 0
    prompts: str | None = None
    count: int = 4
    per_prompt: int = 2
    guidance: Literal["ucf", "t2v"] | float = "t2v"
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 8
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1
    low_priority: bool = True
    minutes: float = 30.0
    shapes: bool = False
    fvd_real: str | None = None
    i3d: str | None = None

    def __post_init__(self) -> None:
        check_each(self, ("every", "temperature"), lambda value: value >= 0, "be 0 or more", "samples.")
        names = ("count", "per_prompt", "batch_size", "threads")
        check_each(self, names, lambda value: value >= 1, "be at least 1", "samples.")
        check_each(self, ("minutes",), lambda value: value > 0, "be above 0", "samples.")
        check_each(self, ("seed",), lambda value: 0 <= value < 2**62, "be from 0 to 2^62 - 1", "samples.")
        if (self.fvd_real is None) != (self.i3d is None):
            raise UserError("samples.fvd_real and samples.i3d go together: give both, or neither.")

    def joined(self, join: Callable[[str], str]) -> SamplesConfig:
        """The same settings with every path brought to what `join` makes of it."""
        paths = {name: getattr(self, name) for name in PATHS}
        return replace(self, **{name: join(path) for name, path in paths.items() if path is not None})

    def check_files(self) -> None:
        """Raises UserError if a file that every set needs is missing: better at the start than after the first checkpoint."""
        for name in PATHS if self.every else ():
            path = getattr(self, name)
            if path is not None and not Path(path).exists():
                raise UserError(f"samples.{name}: {path} does not exist: correct the path.")
