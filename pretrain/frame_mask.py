"""Random Frame Mask: which earlier frames each frame sees while training (DESIGN section 2, Attention; Eq. 9)."""

from __future__ import annotations

from torch import Tensor

from pretrain.randomness import Purpose, Randomness


def draw_frame_mask(
    randomness: Randomness, sample_index: Tensor, epoch: Tensor, num_frames: int, p_mask: float
) -> Tensor:
    """m with m_{t,t'} = 0 with probability p_mask, one draw per (clip, t, t') for all heads and layers.

    Only the entries t' < t have an effect: a frame's own scales and the text are always visible.

    Args:
        randomness: of the stage.
        sample_index, epoch: of the clips, int64 [B].
        num_frames: T.
        p_mask: the probability that frame t does not see frame t'.

    Returns:
        bool [B, T, T], True = visible.
    """
    draws = randomness.uniform(Purpose.FRAME_MASK, sample_index, epoch, (num_frames, num_frames))
    return draws >= p_mask
