"""Weights laid out for generating: one product in place of two or three, packed for the processor, or in eight bits.

A network that was prepared generates only: its weights no longer have their names.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference.model import Attention, Block, FeedForward, Rotary, VideoARTransformer
from inference.rope import apply_rotary
from tokenizer.errors import UserError

Weights = Literal["plain", "fast", "int8"]
TYPICAL_ROWS = 32
"""Rows of a product that oneDNN lays packed weights out for: tokens of a block times clips and branches."""


def prepare(model: VideoARTransformer, weights: Weights) -> None:
    """Changes a network in place.

    Args:
        model: with its weights loaded.
        weights: "plain" (as they are), "fast" (the same numbers, faster), or "int8" (torchao's weight-only quantisation, a scale a row).

    Raises:
        UserError: an unknown word, or torchao is missing.
    """
    if weights == "plain":
        return
    if weights == "int8":
        return _quantise(model)
    if weights != "fast":
        raise UserError(f"the weights '{weights}' are unknown: choose plain, fast or int8.")
    for layer in model.layers:
        assert isinstance(layer, Block)
        layer.attention = FastAttention(layer.attention)
        layer.feed_forward = FastFeedForward(layer.feed_forward)


class Product(nn.Module):
    """x W^T for the stacked weights of several linear layers.

    In bfloat16 on a CPU they are packed: `linear` lays them out anew in every call, which for few rows takes as long as the product.
    """

    def __init__(self, *layers: nn.Linear):
        super().__init__()
        weight = torch.cat([layer.weight.detach() for layer in layers])  # [sum of outs, in]
        self.packed = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        if self.packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return F.linear(x, self.weight)


class FastAttention(Attention):
    """`Attention` with two products."""

    def __init__(self, plain: Attention):
        nn.Module.__init__(self)
        self.heads = plain.heads
        self.inward, self.outward = Product(plain.q_proj, plain.k_proj, plain.v_proj), Product(plain.o_proj)

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.inward(x).unflatten(-1, (3, self.heads, -1)).flatten(2, 3)  # [B, S, 3 * heads, D]
        rotated = apply_rotary(heads[:, :, : 2 * self.heads], *rotary)
        q, k = rotated.transpose(1, 2).chunk(2, dim=1)  # [B, heads, S, D] each
        return q, k, heads[:, :, 2 * self.heads :].transpose(1, 2)

    def output(self, x: Tensor) -> Tensor:
        return self.outward(x)


class FastFeedForward(FeedForward):
    """`FeedForward` with two products."""

    def __init__(self, plain: FeedForward):
        nn.Module.__init__(self)
        self.inward, self.outward = Product(plain.gate_proj, plain.up_proj), Product(plain.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.inward(x).chunk(2, dim=-1)
        return self.outward(F.silu(gate) * up)


def _quantise(model: VideoARTransformer) -> None:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise UserError("weights of eight bits need torchao: install it with `pip install torchao`.") from error
    quantize_(model.layers, Int8WeightOnlyConfig())
