"""The transformer's sequence: order, positions, visibility, and the inputs that a clip's codes give it (DESIGN section 2).

[text, padded to L | frame 0: scale 0..K-1 (, context block) | frame 1: ... | end padding]

"Video tokens" are everything after the text and before the end padding: V = T * tokens_per_block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from tokenizer.codes import Codes
from tokenizer.resample import DownMode, down, to_values, up
from tokenizer.scales import ScaleSchedule


@dataclass(frozen=True)
class SequenceLayout:
    """Where each token of a clip's sequence stands. It is the same for all clips of a batch but for the text's valid length.

    Args:
        schedule: the grids of the scales.
        num_frames: T, latent frames.
        text_length: L, the padded text's length (1 for a class token).
        context_block: after each frame its full sum enters as a block without targets.
        multiple: the sequence is padded at its end to a multiple of this (TP x CP).
    """

    schedule: ScaleSchedule
    num_frames: int
    text_length: int
    context_block: bool = False
    multiple: int = 1

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """The grids of one frame's blocks: its scales and, by option, its context block (scale index K)."""
        return self.schedule.scales + ((self.schedule.grid,) if self.context_block else ())

    @property
    def frame_tokens(self) -> int:
        """Video tokens of one frame, its context block included."""
        return sum(height * width for height, width in self.blocks)

    @property
    def video_tokens(self) -> int:
        """V."""
        return self.num_frames * self.frame_tokens

    @property
    def length(self) -> int:
        """S = L + V + end padding."""
        used = self.text_length + self.video_tokens
        return -(-used // self.multiple) * self.multiple

    @cached_property
    def frame(self) -> Tensor:
        """The frame index t of each video token, [V]."""
        return torch.arange(self.num_frames).repeat_interleave(self.frame_tokens)

    @cached_property
    def scale(self) -> Tensor:
        """The scale index k of each video token (K for a context block), [V]."""
        sizes = torch.tensor([height * width for height, width in self.blocks])
        return torch.arange(len(self.blocks)).repeat_interleave(sizes).repeat(self.num_frames)

    @cached_property
    def target(self) -> Tensor:
        """Which video tokens predict bits, bool [V]: all but the context blocks."""
        return self.scale < self.schedule.num_scales

    def coordinates(self, scaled_spatial: bool = False) -> Tensor:
        """(t, h, w) of each video token, float32 [V, 3] (Eq. 7).

        Args:
            scaled_spatial: spatial indices are scaled to the finest grid (cell centres) instead of counted on their own.
        """
        cells = []
        for height, width in self.blocks:
            row, column = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
            if scaled_spatial:
                row = (row + 0.5) * (self.schedule.grid[0] / height) - 0.5
                column = (column + 0.5) * (self.schedule.grid[1] / width) - 0.5
            cells.append(torch.stack([row.flatten(), column.flatten()], dim=1))
        space = torch.cat(cells).repeat(self.num_frames, 1)  # [V, 2]
        return torch.cat([self.frame.float()[:, None], space], dim=1)  # [V, 3]

    def positions(self, text_lengths: Tensor, scaled_spatial: bool = False, flat: bool = False) -> Tensor:
        """(time, height, width) position of every token of every clip, float32 [B, S, 3].

        Text token i sits at (i, i, i); video token (t, h, w) at (t, h, w) + |text| of its own clip. End padding sits at 0.

        Args:
            text_lengths: |text| of each clip, int [B].
            scaled_spatial: see `coordinates`.
            flat: 1-D positions over the flat sequence on all three axes, the ablation's baseline.
        """
        batch, device = text_lengths.shape[0], text_lengths.device
        result = torch.zeros(batch, self.length, 3, device=device)
        result[:, : self.text_length] = torch.arange(self.text_length, device=device, dtype=torch.float32)[
            None, :, None
        ]
        if flat:
            video = torch.arange(self.video_tokens, device=device, dtype=torch.float32)[:, None].expand(-1, 3)
        else:
            video = self.coordinates(scaled_spatial).to(device)
        start = text_lengths.float()[:, None, None]  # [B, 1, 1]
        result[:, self.text_length : self.text_length + self.video_tokens] = start + video
        return result

    def attention_mask(
        self, text_lengths: Tensor, frame_mask: Tensor | None = None, window: int | None = None
    ) -> Tensor:
        """Which key each query sees, bool [B, S, S] with True = visible (Eq. 9).

        A token of (t, k) sees all valid text, every block of the frames in S_t = {t' in [t-w, t-1] : m_{t,t'} = 1}, and its own
        frame's blocks up to and including its own. Valid text sees valid text. Padding sees only itself.

        Args:
            text_lengths: int [B].
            frame_mask: m, bool [B, T, T]; None: all ones.
            window: w in frames; None: no limit.
        """
        device = text_lengths.device
        batch, text, video = text_lengths.shape[0], self.text_length, self.video_tokens
        frame, block = self.frame.to(device), self.scale.to(device)
        visible = torch.eye(self.length, dtype=torch.bool, device=device).repeat(batch, 1, 1)
        valid = torch.arange(text, device=device)[None] < text_lengths[:, None]  # [B, L]
        visible[:, :text, :text] |= valid[:, :, None] & valid[:, None, :]
        visible[:, text : text + video, :text] = valid[:, None, :]
        frames_seen = self.frames_visible(batch, frame_mask, window, device)  # [B, T, T]
        seen = frames_seen[:, frame][:, :, frame]  # [B, V, V]
        same = (frame[:, None] == frame[None, :]) & (block[None, :] <= block[:, None])
        visible[:, text : text + video, text : text + video] = seen | same
        return visible

    def frames_visible(self, batch: int, frame_mask: Tensor | None, window: int | None, device: torch.device) -> Tensor:
        """S_t as a matrix: may frame t (rows) see the earlier frame t' (columns)? bool [B, T, T]."""
        index = torch.arange(self.num_frames, device=device)
        seen = index[None, :] < index[:, None]
        if window is not None:
            seen = seen & (index[None, :] >= index[:, None] - window)
        seen = seen.expand(batch, -1, -1)
        return seen & frame_mask.to(device) if frame_mask is not None else seen


@lru_cache(maxsize=64)
def input_scales(schedule: ScaleSchedule, dim: int, input_down: DownMode = "bilinear") -> Tensor:
    """The fixed constants that bring each block's inputs to unit variance, [K + 1].

    Entry 0 is for the first input of a frame t > 0 (the area mean of the frame before), entry k for block k, entry K for a context
    block. They are exact for independent fair bits: the maps are linear, so the variance is the sum of the squared weights.
    """

    def mean_square(scales: int, grid: tuple[int, int], mode: DownMode) -> float:
        total = 0.0
        for height, width in schedule.scales[:scales]:
            impulses = torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)
            weights = down(up(impulses, schedule.grid), grid, mode)
            total += float(weights.square().sum(0).mean()) / dim
        return total

    count = schedule.num_scales
    values = [mean_square(count, schedule.scales[0], "area")]
    values += [mean_square(k, schedule.scales[k], input_down) for k in range(1, count)]
    values += [mean_square(count, schedule.grid, input_down)]
    return torch.tensor([value**-0.5 for value in values], dtype=torch.float32)


def block_input(
    total: Tensor, block: int, layout: SequenceLayout, scales: Tensor, input_down: DownMode = "bilinear"
) -> Tensor:
    """The input of one block from a frame's accumulated features.

    Args:
        total: sum of up(q_i), [..., d, H, W]: of the scales before `block` in its own frame; of all scales of the frame before for
            block 0; of all scales of its own frame for a context block.
        block: k (K for a context block).
        layout: the sequence.
        scales: the constants of `input_scales`.

    Returns:
        [..., H_k * W_k, d].
    """
    mode: DownMode = "area" if block == 0 else input_down
    features = down(total, layout.blocks[block], mode) * scales[block].to(total.device)
    return features.flatten(-2).transpose(-1, -2)  # [..., d, H_k, W_k] -> [..., H_k * W_k, d]


def video_inputs(codes: Codes, layout: SequenceLayout, input_down: DownMode = "bilinear") -> Tensor:
    """Teacher-forced inputs of all video tokens: Codes -> float32 [B, V, d].

    The rows of block (0, 0) are zero: the model puts its learnt start token there.
    """
    scales = input_scales(layout.schedule, codes.dim, input_down)
    blocks: list[Tensor] = []
    total: Tensor | None = None
    for scale, scale_bits in enumerate(codes.bits):
        value = up(to_values(scale_bits).movedim(-1, 2), layout.schedule.grid)  # [B, T, d, H, W]
        if total is not None:
            blocks.append(block_input(total, scale, layout, scales, input_down))
        total = value if total is None else total + value
    assert total is not None
    before = torch.cat([torch.zeros_like(total[:, :1]), total[:, :-1]], dim=1)  # the frame before; zeros before frame 0
    blocks.insert(0, block_input(before, 0, layout, scales, input_down))
    if layout.context_block:
        blocks.append(block_input(total, layout.schedule.num_scales, layout, scales, input_down))
    return torch.cat(blocks, dim=2).flatten(1, 2)  # [B, T, N, d] -> [B, V, d]
