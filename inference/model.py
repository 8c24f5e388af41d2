"""The transformer in plain PyTorch: the reference for the parallel model, and the network that generates.

LLaMA-style pre-norm blocks: RMSNorm, rotary positions, gated SiLU feed-forward, no biases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from inference.config import ModelConfig
from inference.embedding import InputEmbedding
from inference.initial import draw
from inference.rope import apply_rotary, rotary_angles
from tokenizer.sequence import SequenceLayout

if TYPE_CHECKING:
    from inference.cache import KeyValueCache
    from inference.steps import StepGraphs

# without cuDNN's, which plans anew (tens of milliseconds) for every length that a growing cache has
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
Rotary = tuple[Tensor, Tensor]
"""cos and sin of the rotary angles, each float32 [B, S, D/2]."""


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) up."""
    return F.silu(gate) * up


class Attention(nn.Module):
    """Multi-head attention with rotary queries and keys."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden = config.hidden_size
        self.heads = config.num_attention_heads
        self.turn: Callable[[Tensor, Tensor, Tensor], Tensor] = apply_rotary
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor | None, cache: KeyValueCache | None, layer: int
    ) -> Tensor:
        """x [B, S, h] attends to itself or, with a cache, to all that is visible there including itself."""
        q, k, v = self.project(x, rotary)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # [B, heads, visible, D]
        out = self.attend(q, k, v, mask)
        return self.output(out.transpose(1, 2).flatten(2))  # [B, heads, S, D] -> [B, S, h]

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, each [B, heads, S, D]."""
        # [B, S, h] -> [B, S, heads, D]
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.turn(q, *rotary), self.turn(k, *rotary)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Queries [B, heads, n, D] and all visible keys and values [B, heads, L, D] -> [B, heads, n, D]."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def output(self, x: Tensor) -> Tensor:
        """What the heads give, brought together, [B, S, h]."""
        return self.o_proj(x)


class FeedForward(nn.Module):
    """Gated SiLU feed-forward."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden, inner = config.hidden_size, config.feed_forward_size
        self.gate: Callable[[Tensor, Tensor], Tensor] = gated
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor | None, cache: KeyValueCache | None, layer: int
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, mask, cache, layer)
        return x + self.feed_forward(self.feed_forward_norm(x))


class VideoARTransformer(nn.Module):
    """Predicts the d bits of every video token from text and block inputs (DESIGN section 2)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.graphs: StepGraphs | None = None  # see `inference.steps`
        self.embedding = InputEmbedding(config)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.final_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.bits, bias=False)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if not parameter.is_meta:
                    parameter.copy_(draw(name, parameter.shape, config.num_layers))

    def forward(
        self,
        inputs: Tensor,
        layout: SequenceLayout,
        text: Tensor,
        text_lengths: Tensor,
        frame_mask: Tensor | None = None,
        drop_condition: Tensor | None = None,
    ) -> Tensor:
        """Teacher-forced logits of a batch.

        Args:
            inputs: block inputs, [B, V, d].
            layout: the sequence.
            text: features [B, L, text_dim], or class ids, long [B].
            text_lengths: |text| of each clip, [B].
            frame_mask: random frame mask m, bool [B, T, T]; None: all frames visible.
            drop_condition: clips without their condition, bool [B].

        Returns:
            float32 [B, V, d]; a context block's rows carry no meaning.
        """
        hidden = self.embedding(inputs, layout, text, text_lengths, drop_condition)  # [B, S, h]
        rotary = self.rotary(self.positions(layout, text_lengths))
        mask = layout.attention_mask(text_lengths, frame_mask, self.config.window)[:, None]  # [B, 1, S, S]
        hidden = self.transform(hidden, rotary, mask)
        return self.logits(hidden[:, layout.text_length : layout.text_length + layout.video_tokens])

    def transform(
        self, hidden: Tensor, rotary: Rotary, mask: Tensor | None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """All blocks, [B, n, h] -> [B, n, h]. With a cache, the n tokens are written behind its length and see all that is in it."""
        with sdpa_kernel(KERNELS):
            for index, layer in enumerate(self.layers):
                hidden = layer(hidden, rotary, mask, cache, index)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, n, h] -> float32 [B, n, d]."""
        return self.head(self.final_norm(hidden)).float()

    def positions(self, layout: SequenceLayout, text_lengths: Tensor) -> Tensor:
        """The positions of all tokens, float32 [B, S, 3]."""
        return layout.positions(text_lengths, self.config.rope_scaled_spatial, flat=self.config.rope == "flat")

    def rotary(self, positions: Tensor) -> Rotary:
        """Positions [B, S, 3] -> cos and sin."""
        angles = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        return angles.cos(), angles.sin()

    @classmethod
    def empty(cls, config: ModelConfig) -> VideoARTransformer:
        """A network whose weights have shapes and no values, until `load_state_dict(..., assign=True)`."""
        with torch.device("meta"):
            return cls(config)

    @classmethod
    def shapes(cls, config: ModelConfig) -> dict[str, torch.Size]:
        """Of all weights, by name."""
        return {name: value.shape for name, value in cls.empty(config).state_dict().items()}
