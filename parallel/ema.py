"""The running mean of the network's weights, over the chunks of a pipeline stage and in megatron-core's checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from parallel.model import settle, unwrap
from tokenizer import ema

PREFIX = "ema."
"""Before the names of the means in a checkpoint."""


class Ema(ema.Ema):
    """Means of this process's shards; ranks that hold the same weights hold the same means.

    Args:
        chunks: of `build_model`, with their weights.
        decay: as in `tokenizer.ema`.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], decay: float):
        super().__init__(torch.nn.ModuleList([unwrap(chunk) for chunk in chunks]), decay)
        self._chunks = list(chunks)

    def update(self) -> None:
        """After each optimizer step."""
        settle(self._chunks)
        super().update()

    def sharded(self, states: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What a checkpoint holds of the means, by chunk.

        Args:
            states: `sharded_state_dict` of each chunk, which says where its shards lie in the whole tensors.
        """
        means: list[dict[str, Any]] = [{} for _ in states]
        for name, mean in self.means.items():
            chunk, inner = name.split(".", 1)
            means[int(chunk)][inner] = _instead(states[int(chunk)][inner], mean)
        return means

    def load_chunks(self, states: Sequence[dict[str, Tensor]], updates: int) -> None:
        """Takes the means of a checkpoint.

        Args:
            states: by chunk and parameter.
            updates: how many they are the mean of.
        """
        flat = {f"{chunk}.{name}": value for chunk, state in enumerate(states) for name, value in state.items()}
        self.load({**flat, "updates": updates})


def _instead(entry: Any, mean: Tensor) -> Any:
    """A parameter's entry of a `sharded_state_dict` with its mean in it, under a name of its own."""
    changes: dict[str, Any] = {"key": PREFIX + entry.key, "data": mean}
    if hasattr(entry, "dtype"):  # a factory takes it from its data
        changes["dtype"] = mean.dtype
    return replace(entry, **changes)
