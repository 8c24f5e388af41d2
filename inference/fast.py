"""Weights laid out for generating: one product in place of two or three, packed for the processor, or in eight bits.

A network that was prepared generates only: its weights no longer have their names.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference.model import Attention, Block, FeedForward, Rotary, VideoARTransformer, gated
from inference.rope import apply_rotary
from inference.steps import StepGraphs
from tokenizer.errors import UserError

Weights = Literal["plain", "fast", "int8"]
TYPICAL_ROWS = 32
"""Rows of a product that oneDNN lays packed weights out for: tokens of a block times clips and branches."""
MANY_QUERIES = 32
"""From so many on a softmax down the scores' columns is the faster one."""


def prepare(model: VideoARTransformer, weights: Weights, compiled: bool = False) -> None:
    """Changes a network in place.

    Args:
        model: with its weights loaded.
        weights: "plain" (as they are), "fast" (the same numbers, faster), or "int8" (torchao's weight-only quantisation, a scale a row).
        compiled: on a GPU: small operations are compiled into one, and each step runs as a CUDA graph (`inference.steps`).

    Raises:
        UserError: an unknown word, torchao is missing, or there is no GPU to compile for.
    """
    if compiled:
        if model.head.weight.device.type != "cuda":
            raise UserError("compiling is for a GPU: leave it out, or give a CUDA device.")
        model.graphs = StepGraphs()
        compile_small(model)
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
        self.heads, self.turn = plain.heads, plain.turn
        self.inward, self.outward = Product(plain.q_proj, plain.k_proj, plain.v_proj), Product(plain.o_proj)

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.inward(x).unflatten(-1, (3, self.heads, -1)).flatten(2, 3)  # [B, S, 3 * heads, D]
        rotated = self.turn(heads[:, :, : 2 * self.heads], *rotary)
        q, k = rotated.transpose(1, 2).chunk(2, dim=1)  # [B, heads, S, D] each
        return q, k, heads[:, :, 2 * self.heads :].transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.inward.packed:
            return attend_by_products(q, k, v, mask)
        return super().attend(q, k, v, mask)

    def output(self, x: Tensor) -> Tensor:
        return self.outward(x)


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as two matrix products, for bfloat16 on a CPU, where torch's fused kernel takes two to four times as long.

    Keys are the product's left side: a part of the cache, transposed, would be copied first.

    Args:
        q: [B, heads, n, D].
        k, v: [B, heads, L, D].
        mask: bool, broadcasts to [B, 1, n, L]; None: all are visible.

    Returns:
        [B, heads, n, D].
    """
    scores = torch.matmul(k, (q * q.shape[-1] ** -0.5).transpose(-1, -2))  # [B, heads, L, n]
    if mask is not None:
        scores = scores.masked_fill(~mask.transpose(-1, -2), -torch.inf)
    if q.shape[2] >= MANY_QUERIES:
        return torch.matmul(torch.softmax(scores, -2).transpose(-1, -2), v)
    # few queries: a softmax along the stored direction pays for turning the scores
    return torch.matmul(torch.softmax(scores.transpose(-1, -2), -1), v)


class FastFeedForward(FeedForward):
    """`FeedForward` with two products."""

    def __init__(self, plain: FeedForward):
        nn.Module.__init__(self)
        self.gate = plain.gate
        self.inward, self.outward = Product(plain.gate_proj, plain.up_proj), Product(plain.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.inward(x).chunk(2, dim=-1)
        return self.outward(self.gate(gate, up))


def compile_small(model: VideoARTransformer) -> None:
    """Lets torch.compile make one kernel each of a rotary turn and of a gate, for any number of tokens; products stay the libraries'."""
    turn, gate = torch.compile(apply_rotary, dynamic=True), torch.compile(gated, dynamic=True)
    for part in model.modules():
        if isinstance(part, Attention):
            part.turn = turn
        elif isinstance(part, FeedForward):
            part.gate = gate


def _quantise(model: VideoARTransformer) -> None:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise UserError("weights of eight bits need torchao: install it with `pip install torchao`.") from error
    quantize_(model.layers, Int8WeightOnlyConfig())
