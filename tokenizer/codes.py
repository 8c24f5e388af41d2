"""Codes: the bits of a clip on all scales, and their packed form on disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenizer.errors import UserError
from tokenizer.scales import ScaleSchedule


@dataclass(frozen=True)
class Codes:
    """The bits of B clips.

    Args:
        bits: one bool tensor [B, T, H_k, W_k, d] a scale.
        schedule: the grids of the scales.
    """

    bits: tuple[Tensor, ...]
    schedule: ScaleSchedule

    def __post_init__(self) -> None:
        shapes = [tuple(b.shape[2:4]) for b in self.bits]
        if shapes != list(self.schedule.scales):
            raise UserError(
                f"codes of grids {shapes} do not fit the schedule {self.schedule.scales}: use the schedule they were made with."
            )

    @property
    def num_frames(self) -> int:
        """T, the number of latent frames."""
        return self.bits[0].shape[1]

    @property
    def dim(self) -> int:
        """d, the bits a token."""
        return self.bits[0].shape[-1]

    def tokens(self) -> Tensor:
        """All bits in sequence order: bool [B, T, N, d], N = tokens a frame, coarse to fine, rows first."""
        return torch.cat([b.flatten(2, 3) for b in self.bits], dim=2)  # [B, T, H_k, W_k, d] -> [B, T, N, d]

    @classmethod
    def from_tokens(cls, tokens: Tensor, schedule: ScaleSchedule) -> Codes:
        """The inverse of `tokens`: [B, T, N, d] -> Codes."""
        parts = tokens.split(schedule.split(), dim=2)
        bits = tuple(part.unflatten(2, grid) for part, grid in zip(parts, schedule.scales))  # [B, T, H_k, W_k, d]
        return cls(bits, schedule)

    @classmethod
    def concatenate(cls, parts: Iterable[Codes]) -> Codes:
        """The codes of consecutive latent frames as one."""
        whole = list(parts)
        return cls(tuple(torch.cat(scale, dim=1) for scale in zip(*(part.bits for part in whole))), whole[0].schedule)

    def frames(self, start: int, stop: int) -> Codes:
        """The codes of latent frames start..stop-1; by causality a prefix is the code of the clip's first frames."""
        return Codes(tuple(b[:, start:stop] for b in self.bits), self.schedule)


def pack_tokens(tokens: Tensor) -> bytes:
    """Packs bool [T, N, d] of one clip, in sequence order, into T*N*d/8 bytes (the first bit is the highest of its byte).

    Raises:
        UserError: d is not a multiple of 8.
    """
    if tokens.shape[-1] % 8:
        raise UserError(
            f"{tokens.shape[-1]} bits a token can't be packed into whole bytes: choose d as a multiple of 8."
        )
    return np.packbits(tokens.cpu().numpy().astype(bool)).tobytes()


def unpack_tokens(packed: bytes, num_frames: int, schedule: ScaleSchedule, dim: int) -> Tensor:
    """The inverse of `pack_tokens`: bytes -> bool [T, N, d].

    Raises:
        UserError: the number of bytes does not fit the shape.
    """
    count = num_frames * schedule.tokens_per_frame * dim
    if len(packed) * 8 != count:
        raise UserError(
            f"a code record holds {len(packed)} bytes where {num_frames} frames of {schedule.tokens_per_frame} tokens of {dim} bits "
            f"need {count // 8}: encode the clips again."
        )
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8)).astype(bool)
    return torch.from_numpy(bits).view(num_frames, schedule.tokens_per_frame, dim)  # [T, N, d]
