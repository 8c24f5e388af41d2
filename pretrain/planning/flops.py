"""Floating point operations of a training step, computed from shapes: a multiplication and an addition count as two.

count(model, layout, text_lengths) -> Flops of one forward pass by part; `.model` is what MFU divides, `.executed(...)` what a GPU does
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from inference.config import ModelConfig
from parallel.context import visible_keys
from tokenizer.sequence import SequenceLayout

ATTENTION_BACKWARD = 2.5
"""Over its forward pass: fused kernels keep no probabilities, so five products come back for two."""


@dataclass(frozen=True)
class Flops:
    """Of some clips.

    Args:
        attention_matrices: products with the attention's weights in all layers, forward.
        feed_forward: products with the feed-forward networks' weights in all layers, forward.
        attention: scores and their sums of values in all layers, forward.
        ends: products before and after the layers whose inputs have gradients, forward.
        inputs: the projection of the block inputs, whose inputs have none, forward.
    """

    attention_matrices: float
    feed_forward: float
    attention: float
    ends: float
    inputs: float

    @property
    def matrices(self) -> float:
        """All products with weights, forward."""
        return self.attention_matrices + self.feed_forward + self.ends + self.inputs

    @property
    def model(self) -> float:
        """Of a step, by convention: forward, and backward twice as much where both sides have gradients; nothing computed again."""
        return 3 * (self.attention_matrices + self.feed_forward + self.attention + self.ends) + 2 * self.inputs

    def executed(self, recompute: str = "none", attention_backward: float = ATTENTION_BACKWARD) -> float:
        """Of a step, with what is computed again.

        Args:
            recompute: of `ParallelConfig`.
            attention_backward: the attention's backward pass over its forward pass.
        """
        again = {
            "none": 0.0,
            "selective": self.feed_forward,
            "full": self.attention_matrices + self.feed_forward + self.attention,
        }
        return self.model + (attention_backward - 2) * self.attention + again[recompute]


def count(model: ModelConfig, layout: SequenceLayout, text_lengths: torch.Tensor, pairs: int | None = None) -> Flops:
    """Of clips that differ in their texts only.

    Args:
        model: the network.
        layout: the sequence, with its padding.
        text_lengths: |text| of each clip, int [B].
        pairs: of a query and a key, over all clips; None: those that the mask lets through (Eq. 9), all frames visible.
    """
    clips, width = len(text_lengths), model.hidden_size
    if pairs is None:
        pairs = int(visible_keys(layout, text_lengths, None, model.window).sum())
    tokens, video = clips * layout.length, clips * layout.video_tokens
    text = 0 if model.num_classes else clips * layout.text_length * (model.text_dim * width + width**2)
    return Flops(
        attention_matrices=2.0 * model.num_layers * tokens * 4 * width**2,
        feed_forward=2.0 * model.num_layers * tokens * 3 * width * model.feed_forward_size,
        attention=4.0 * model.num_layers * width * pairs,
        ends=2.0 * (video * width * model.bits + text),
        inputs=2.0 * video * width * model.bits,
    )
