"""Codes to the frames that one looks at: what decoding holds beside them does not grow with the clips' length."""

from __future__ import annotations

import numpy as np

from tokenizer import Codes, VideoTokenizer
from tokenizer.clip_shape import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from tokenizer.pixels import to_pixels
from tokenizer.streaming import decode_stream


def to_frames(tokenizer: VideoTokenizer, codes: Codes, at_once: int) -> np.ndarray:
    """Decodes clips whole, or longer ones one after the other and in pieces, each of which becomes bytes before the next.

    A piece's convolutions may round otherwise than a whole clip's (libraries choose kernels by shape): a few values in ten thousand
    then differ, by 1 of 255.

    Args:
        tokenizer: in evaluation mode.
        codes: of B clips.
        at_once: the most latent frames of a whole clip, and of a piece.

    Returns:
        uint8 [B, 1+4n, H, W, 3].
    """
    count = codes.num_frames
    if count <= at_once:
        return to_pixels(tokenizer.decode(codes))
    number = -(-count // at_once)
    ends = [count * piece // number for piece in range(number + 1)]  # of nearly equal lengths
    height, width = (side * SPATIAL_COMPRESSION for side in codes.schedule.grid)
    clips = np.empty((len(codes.bits[0]), 1 + TEMPORAL_COMPRESSION * (count - 1), height, width, 3), np.uint8)
    for index, clip in enumerate(clips):
        one = Codes(tuple(bits[index : index + 1] for bits in codes.bits), codes.schedule)
        done = 0
        for pixels in decode_stream(
            tokenizer, (one.frames(*piece) for piece in zip(ends, ends[1:]))
        ):  # [1, 3, t, H, W]
            clip[done : done + pixels.shape[2]] = to_pixels(pixels)[0]
            done += pixels.shape[2]
    return clips
