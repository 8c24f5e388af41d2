"""The weights that a network starts from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

STD = 0.02
"""Standard deviation of matrices, embeddings and learnt tokens."""


def draw(name: str, shape: torch.Size, num_layers: int, generator: torch.Generator | None = None) -> Tensor:
    """One weight: norms one, biases zero, everything else normal.

    Args:
        name: under `VideoARTransformer.state_dict`.
        shape: of the weight.
        num_layers: of the network. Twice as many branches add up in its residual stream: smaller output projections keep its variance.
        generator: on the CPU; None: torch's own.

    Returns:
        float32, on the CPU.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    residual = name.endswith(("attention.o_proj.weight", "feed_forward.down_proj.weight"))
    std = STD * (2 * num_layers) ** -0.5 if residual else STD
    return torch.empty(shape, device="cpu").normal_(std=std, generator=generator)


class InitialWeights(Mapping[str, Tensor]):
    """All weights of a network for a seed, each drawn when it is asked for: the same whoever asks, and in whatever order.

    A process of a large run so never holds more than its own share.

    Args:
        shapes: of all weights, by name.
        num_layers: of the network.
        seed: each weight's generator depends on it and on the weight's name.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], num_layers: int, seed: int):
        self.shapes, self.num_layers, self.seed = shapes, num_layers, seed

    def __getitem__(self, name: str) -> Tensor:
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return draw(name, self.shapes[name], self.num_layers, generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
