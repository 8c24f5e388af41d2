"""A running mean of the weights, which is validated and exported in the weights' place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from parallel.model import unwrap

PREFIX = "ema."
"""Before the names of the means in a checkpoint."""


class Ema:
    """Float32 means of this process's shards; ranks that hold the same weights hold the same means.

    Args:
        chunks: of `build_model`, with their weights.
        decay: the mean's share that stays with each update, less at the beginning: (1 + n) / (10 + n) after n updates.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], decay: float):
        self.modules = [unwrap(chunk) for chunk in chunks]
        self.decay, self.updates = decay, 0
        self.means = [
            {name: parameter.detach().float().clone() for name, parameter in module.named_parameters()}
            for module in self.modules
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights of now into the mean."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for parameter, mean in self._pairs():
            mean.lerp_(parameter.float(), 1 - decay)

    @torch.no_grad()
    def take_over(self) -> None:
        """The weights become the mean, for good."""
        for parameter, mean in self._pairs():
            parameter.copy_(mean)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network computes with the mean inside the block; afterwards the weights are what they were, bit for bit."""
        held = [parameter.detach().clone() for parameter, _ in self._pairs()]
        self.take_over()
        try:
            yield
        finally:
            with torch.no_grad():
                for (parameter, _), own in zip(self._pairs(), held):
                    parameter.copy_(own)

    def sharded(self, states: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What a checkpoint holds of the means.

        Args:
            states: `sharded_state_dict` of each chunk, which says where its shards lie in the whole tensors.
        """
        return [sharded_means(state, means) for state, means in zip(states, self.means)]

    @torch.no_grad()
    def load(self, states: Sequence[dict[str, Tensor]], updates: int) -> None:
        """Takes the means of a checkpoint.

        Args:
            states: by chunk and parameter.
            updates: how many they are the mean of.
        """
        self.updates = updates
        for means, state in zip(self.means, states):
            for name, mean in means.items():
                mean.copy_(state[name])

    def _pairs(self) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
        for module, means in zip(self.modules, self.means):
            for name, parameter in module.named_parameters():
                yield parameter, means[name]


def sharded_means(state: dict[str, Any], means: dict[str, Tensor]) -> dict[str, Any]:
    """The entries of a chunk's `sharded_state_dict` that are parameters, with other tensors and names of their own."""
    changed = {}
    for name, mean in means.items():
        entry = state[name]
        changes: dict[str, Any] = {"key": PREFIX + entry.key, "data": mean}
        if hasattr(entry, "dtype"):
            changes["dtype"] = mean.dtype
        changed[name] = replace(entry, **changes)
    return changed
