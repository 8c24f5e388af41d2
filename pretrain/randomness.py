"""Random draws that belong to a clip, not to a process: the same on every layout, under recomputation and after a resume.

Philox is a counter-based generator: its output is a function of (key, counter). The key is (seed, purpose and stage), the
counter (global sample index, epoch), so a clip's draws depend neither on its batch-mates nor on who computes them or when.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Purpose(IntEnum):
    """What is drawn; each purpose has its own stream."""

    FLIP_RATIO = 1
    FLIP = 2
    FRAME_MASK = 3
    CONDITION = 4


@dataclass(frozen=True)
class Randomness:
    """The draws of one stage of one run.

    Args:
        seed: of the run.
        stage: the stage's number; the stages of a run draw independently.
    """

    seed: int
    stage: int = 0

    def uniform(self, purpose: Purpose, sample_index: Tensor, epoch: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Uniform draws from [0, 1) for each clip, float32 [B, *shape] on the CPU.

        Args:
            purpose: which stream.
            sample_index: the clips' numbers in the stage's data, int64 [B].
            epoch: how often the data has been gone through before, int64 [B].
            shape: of one clip's draws.
        """
        count = int(np.prod(shape))
        key = np.array([self.seed, int(purpose) + (self.stage << 8)], dtype=np.uint64)
        raw = np.empty((len(sample_index), (count + 1) // 2), dtype=np.uint64)
        for row, (sample, times) in enumerate(zip(sample_index.tolist(), epoch.tolist())):
            # the lowest counter word is left to the generator: it counts the blocks of one clip
            counter = np.array([0, 0, sample, times], dtype=np.uint64)
            raw[row] = np.random.Philox(key=key, counter=counter).random_raw(raw.shape[1])
        halves = raw.view("<u4" if raw.dtype.byteorder in "=<|" else ">u4")[:, :count]
        # 24 bits are what float32 holds without rounding up to 1
        draws = (halves >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)
        return torch.from_numpy(draws).view(len(sample_index), *shape)
