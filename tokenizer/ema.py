"""A running mean of weights, which is validated and saved in their place: of a tokenizer, and shard by shard of a transformer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.data_parallel import like


class Ema:
    """The running mean of a module's parameters in float32; it is sharded as they are.

    Args:
        module: whose parameters.
        decay: the mean's share that stays with each update, less at the beginning: (1 + n) / (10 + n) after n updates.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay, self.updates = module, decay, 0
        self.means = {name: parameter.detach().float().clone() for name, parameter in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the parameters of now into the mean."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, parameter in self.module.named_parameters():
            self.means[name].mul_(decay).add_(parameter.detach(), alpha=1 - decay)

    @torch.no_grad()
    def take_over(self) -> None:
        """The parameters become the mean, for good."""
        for name, parameter in self.module.named_parameters():
            parameter.copy_(self.means[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module computes with the mean inside the block; afterwards its parameters are what they were, bit for bit."""
        held = [parameter.detach().clone() for parameter in self.module.parameters()]
        self.take_over()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, own in zip(self.module.parameters(), held):
                    parameter.copy_(own)

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave, with whole tensors."""
        self.updates = state["updates"]
        for name, mean in self.means.items():
            mean.copy_(like(state[name], mean))

    def state_dict(self) -> dict[str, Tensor | int]:
        """What a checkpoint keeps."""
        return {"updates": self.updates, **self.means}
