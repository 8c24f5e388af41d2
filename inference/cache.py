"""The keys and values of everything that was decoded so far."""

from __future__ import annotations

from torch import Tensor

from inference.config import ModelConfig
from inference.rope import rotate
from tokenizer.sequence import SequenceLayout


class KeyValueCache:
    """Preallocated keys and values of all layers: text first, then frames.

    What is visible always lies in one piece from the start, so that a block attends to it without a mask. With a window
    of w frames the first w places are a ring of earlier frames and the frame under way stands behind them; keys carry
    their positions already, so their order does not matter.

    Args:
        config: the network.
        layout: the sequence; its text length is the cached one.
        window: w, earlier frames that stay visible; None: all.
        batch: clips.
        like: a weight, for device and dtype.
    """

    def __init__(self, config: ModelConfig, layout: SequenceLayout, window: int | None, batch: int, like: Tensor):
        self.text_length, self.frame_tokens, self.window = layout.text_length, layout.frame_tokens, window
        places = layout.num_frames if window is None else min(layout.num_frames, window + 1)
        capacity = layout.text_length + places * layout.frame_tokens
        shape = (config.num_layers, batch, config.num_attention_heads, capacity, config.head_dim)
        self.keys = like.new_empty(shape)
        self.values = like.new_empty(shape)
        self.reset()

    def reset(self) -> None:
        """Nothing is cached."""
        self.length = 0
        self.frames = 0
        self._text_keys: Tensor | None = None

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds a layer's new keys and values [B, heads, n, D]; returns all visible ones, [B, heads, length + n, D]."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, count: int) -> None:
        """All layers have appended `count` tokens."""
        self.length += count

    def end_frame(self) -> None:
        """The frame under way is complete: with a full window it takes the place of the oldest frame."""
        frame, self.frames = self.frames, self.frames + 1
        if self.window is None or frame < self.window:
            return
        self.length = self.text_length + self.window * self.frame_tokens
        if self.window:
            place = self.text_length + frame % self.window * self.frame_tokens
            for stored in (self.keys, self.values):
                newest = stored[:, :, :, self.length : self.length + self.frame_tokens]
                stored[:, :, :, place : place + self.frame_tokens] = newest

    def turn_text(self, cos: Tensor, sin: Tensor) -> None:
        """Rotates the text keys, from where they were first, by the angles with cos and sin [D/2]."""
        if self._text_keys is None:
            self._text_keys = self.keys[:, :, :, : self.text_length].clone()
        self.keys[:, :, :, : self.text_length] = rotate(self._text_keys, cos, sin)
