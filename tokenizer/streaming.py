"""Clips of any length, chunk by chunk, with what the causal convolutions carry from one chunk to the next (DESIGN section 2, Tokenizer).

The result is that of the whole clip; memory does not grow with its length.

    for codes in encode_stream(tokenizer, chunks_of_a_long_video):    # Codes of the latent frames that each chunk completes
        ...
    for pixels in decode_stream(tokenizer, codes_as_they_are_sampled):
        show(pixels)                                                  # one frame, then four for each latent frame
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenizer.clip_shape import TEMPORAL_COMPRESSION, check_num_frames
from tokenizer.codes import Codes
from tokenizer.errors import UserError
from tokenizer.scales import ScaleSchedule
from tokenizer.tiling import Carries

if TYPE_CHECKING:
    from tokenizer.tokenizer import VideoTokenizer


@torch.no_grad()
def encode_stream(
    tokenizer: VideoTokenizer,
    chunks: Iterable[Tensor],
    schedule: ScaleSchedule | None = None,
    latents_at_once: int = 1,
) -> Iterator[Codes]:
    """Codes of a video that comes in pieces.

    Args:
        tokenizer: in evaluation mode.
        chunks: [B, 3, t, H, W] in [-1, 1], any t each, 1+4n frames together.
        schedule: None: the tokenizer's for the frames' size.
        latents_at_once: latent frames a step; more are faster and take more memory.

    Yields:
        Codes of at least `latents_at_once` latent frames, fewer at the end; the first latent frame is one frame of the video, the
        others are four.

    Raises:
        UserError: the frames together are not 1+4n (what is complete has been yielded by then), or change their size.
    """
    if latents_at_once < 1:
        raise UserError(f"a stream of {latents_at_once} latent frames at once never ends: give at least 1.")
    carries: Carries = {}
    waiting: Tensor | None = None
    seen = 0
    for chunk in chunks:
        if waiting is not None and chunk.shape[-2:] != waiting.shape[-2:]:
            raise UserError(
                f"a stream's frames change from {tuple(waiting.shape[-2:])} to {tuple(chunk.shape[-2:])}: resize them alike."
            )
        waiting = chunk if waiting is None else torch.cat([waiting, chunk], dim=2)
        while waiting.shape[2] >= (step := latents_at_once * TEMPORAL_COMPRESSION - (3 if seen == 0 else 0)):
            yield tokenizer.quantize(tokenizer.encode_chunk(waiting[:, :, :step], carries), schedule)
            waiting, seen = waiting[:, :, step:], seen + step
    if waiting is None:
        raise UserError("a stream of no frames can't be encoded: give at least one.")
    check_num_frames(seen + waiting.shape[2])
    if waiting.shape[2]:
        yield tokenizer.quantize(tokenizer.encode_chunk(waiting, carries), schedule)


@torch.no_grad()
def decode_stream(tokenizer: VideoTokenizer, codes: Iterable[Codes]) -> Iterator[Tensor]:
    """The pixels of latent frames as they arrive.

    Args:
        tokenizer: in evaluation mode.
        codes: one or more latent frames each, in order.

    Yields:
        [B, 3, t, H, W] in [-1, 1]: t = 4 m for m latent frames, 3 fewer at the beginning.
    """
    carries: Carries = {}
    for part in codes:
        yield tokenizer.decode_chunk(tokenizer.dequantize(part), carries)
