"""How much of its bits a tokenizer uses: the entropy of each bit on each scale, and bits that never change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import entr

from tokenizer.codes import Codes
from tokenizer.quantizer import are_dead


@dataclass(frozen=True)
class BitUsage:
    """Counts of ones; counts of parts add up to those of the whole, whatever the parts' numbers of scales.

    Attributes:
        ones: int64 [K, d].
        tokens: int64 [K], of each scale.
    """

    ones: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, codes: Codes) -> BitUsage:
        """The counts of some clips' codes."""
        ones = [bits.sum(dim=(0, 1, 2, 3)).cpu().numpy() for bits in codes.bits]  # [B, T, H_k, W_k, d] -> [d]
        return cls(np.stack(ones), np.array([bits[..., 0].numel() for bits in codes.bits]))

    def __add__(self, other: BitUsage) -> BitUsage:
        scales = max(len(self.tokens), len(other.tokens))
        mine, theirs = self._with(scales), other._with(scales)
        return BitUsage(mine.ones + theirs.ones, mine.tokens + theirs.tokens)

    def _with(self, scales: int) -> BitUsage:
        more = scales - len(self.tokens)
        return BitUsage(np.pad(self.ones, ((0, more), (0, 0))), np.pad(self.tokens, (0, more)))

    @property
    def share(self) -> np.ndarray:
        """The share of ones, float64 [K, d]."""
        return self.ones / self.tokens[:, None]

    @property
    def entropy(self) -> np.ndarray:
        """In bits, 0 (constant) to 1 (ones and zeros alike), float64 [K, d]."""
        return (entr(self.share) + entr(1 - self.share)) / np.log(2)

    @property
    def dead(self) -> np.ndarray:
        """Which bits `are_dead`, bool [K, d]."""
        return are_dead(self.share)

    def report(self) -> dict[str, Any]:
        """For JSON: per scale the number of tokens, the entropies, their mean, and the number of dead bits; `dead_bits` in all."""
        return {
            "dim": self.ones.shape[1],
            "tokens": self.tokens.tolist(),
            "share": self.share.tolist(),
            "entropy": self.entropy.tolist(),
            "entropy_mean": self.entropy.mean(axis=1).tolist(),
            "dead": self.dead.sum(axis=1).tolist(),
            "dead_bits": int(self.dead.sum()),
        }
