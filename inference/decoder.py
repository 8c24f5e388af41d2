"""Cached decoding: the transformer one block at a time, with the keys and values of everything before it kept."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from inference.model import VideoARTransformer
from inference.steps import decoding_steps
from tokenizer.sequence import SequenceLayout

TEXT_STEP = 64
"""Of text lengths where steps are CUDA graphs: each length would otherwise have graphs of its own, which few prompts share."""


class CachedDecoder:
    """Runs a transformer block by block in sequence order: one call a (frame, scale), and one a context block.

    The logits equal the teacher-forced ones. A clip longer than the trained T runs with a window of at most T - 1 frames,
    and past T the cached text keys move on in time with each frame, so that no distance exceeds the trained ones.

    Args:
        model: the network.
        layout: the sequence of the clips to be decoded.
        text: features [B, L, text_dim], or class ids [B].
        text_lengths: |text| of each clip, [B].
        drop_condition: clips that run without their condition, bool [B].
        window: earlier frames that stay visible, in addition to the model's own limit; None: no further limit.
    """

    def __init__(
        self,
        model: VideoARTransformer,
        layout: SequenceLayout,
        text: Tensor,
        text_lengths: Tensor,
        drop_condition: Tensor | None = None,
        window: int | None = None,
    ):
        longest = int(text_lengths.max())
        if model.graphs is not None and not model.config.num_classes:
            longest = min(-(-longest // TEXT_STEP) * TEXT_STEP, text.shape[1])
        self.model, self.layout = model, replace(layout, text_length=longest, multiple=1)
        trained = model.config.num_frames
        limits = [window, model.config.window, trained - 1 if layout.num_frames > trained else None]
        known = [limit for limit in limits if limit is not None]
        self._steps = decoding_steps(model, self.layout, min(known) if known else None, len(text_lengths), self)
        self.cache = self._steps.cache
        if not model.config.num_classes:
            text = text[:, :longest]
        self._text = model.embedding.embed_text(text, drop_condition)  # [B, L, h]
        self._positions = model.positions(self.layout, text_lengths)  # [B, S, 3]
        self._text_lengths = text_lengths
        # only padded texts leave keys that some clip must not see
        token = torch.arange(self.layout.length, device=text.device)[None]
        valid = (token < text_lengths[:, None]) | (token >= longest)
        self._valid = None if bool((text_lengths == longest).all()) else valid  # [B, S]
        self._frame = self._block = self._done = 0

    def step(self, inputs: Tensor) -> Tensor:
        """The next block's inputs [B, n, d] -> its logits, float32 [B, n, d]."""
        layout, device = self.layout, inputs.device
        count = inputs.shape[1]
        frame = torch.full((count,), self._frame, device=device)
        block = torch.full((count,), self._block, device=device)
        hidden = self.model.embedding.embed_video(inputs, frame, block, layout.schedule.num_scales)  # [B, n, h]
        start = layout.text_length + self._done
        positions = self._positions[:, start : start + count]
        mask = None if self._valid is None else self._valid[:, None, None, : self.cache.length + count]
        if self._done == 0:
            # the text enters together with the first block, which it must not see
            hidden = torch.cat([self._text, hidden], dim=1)
            positions = self._positions[:, : start + count]
            first = replace(
                layout, schedule=type(layout.schedule)(layout.schedule.scales[:1]), num_frames=1, context_block=False
            )
            mask = first.attention_mask(self._text_lengths)[:, None]
        logits = self._steps(hidden, self.model.rotary(positions), mask, count)
        self._done += count
        self._block += 1
        if self._block == len(layout.blocks):
            self._next_frame()
        return logits

    def _next_frame(self) -> None:
        self.cache.end_frame()
        self._frame, self._block = self._frame + 1, 0
        beyond = self._frame - (self.model.config.num_frames - 1)
        if beyond > 0 and self._frame < self.layout.num_frames:
            text, tokens = self.layout.text_length, self.layout.frame_tokens
            # one frame's step: (1, 0, 0), or a frame's tokens on all axes of the flat embedding
            step = self._positions[0, text + tokens] - self._positions[0, text]  # [3]
            cos, sin = self.model.rotary(beyond * step)
            self.cache.turn_text(cos, sin)
