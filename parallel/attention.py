"""The core of attention on megatron-core: three-axis rotary angles a clip, and the block-causal mask with its frame mask.

One `AttentionContext` describes a microbatch. Every stage (and virtual stage) builds it, and it travels to the layers as megatron's
`attention_bias`, which nothing but `BlockCausalAttention` reads.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from inference.config import ModelConfig
from inference.rope import rotary_angles
from parallel.context import Shares
from parallel.frame_attention import Visibility, additive, frame_attention
from parallel.rotary import Angles, full_angles, rotate
from tokenizer.errors import UserError
from tokenizer.sequence import SequenceLayout

log = logging.getLogger(__name__)

MAX_SHAPES = 64
"""Shapes of microbatches that FlexAttention is compiled for; past them torch would silently fall back to the dense reference."""


@functools.cache
def choose_backend(wanted: str, device_type: str) -> str:
    """The attention back end for a device, with the reason in the log.

    Args:
        wanted: "auto", "frames", "sdpa" or "flex".
        device_type: "cpu" or "cuda".

    Raises:
        UserError: "flex" was demanded without a GPU.
    """
    if wanted == "flex" and device_type != "cuda":
        raise UserError(
            "attention: flex needs a GPU (FlexAttention has no backward pass on a CPU): use auto or frames."
        )
    chosen = wanted if wanted != "auto" else ("flex" if device_type == "cuda" else "frames")
    reasons = {
        ("auto", "frames"): "on a CPU FlexAttention has no backward pass, and frame by frame skips what the mask hides",
        ("auto", "flex"): "a GPU is there, and it skips the blocks that the mask hides",
    }
    log.info("attention back end: %s (%s)", chosen, reasons.get((wanted, chosen), "as configured"))
    return chosen


@dataclass
class AttentionContext:
    """What attention needs to know of a microbatch.

    Args:
        angles: of all tokens, for keys.
        own_angles: of this rank's, for queries.
        mask: what it is made of (frames), additive [B, 1, S / CP, S] in the activations' dtype (sdpa), or FlexAttention's block mask.
        shares: which tokens this rank holds under context parallelism; None: all.
    """

    angles: Angles
    own_angles: Angles
    mask: Visibility | Tensor | BlockMask
    shares: Shares | None = None

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        layout: SequenceLayout,
        text_lengths: Tensor,
        frame_mask: Tensor | None,
        dtype: torch.dtype,
        backend: str,
        shares: Shares | None = None,
    ) -> AttentionContext:
        """Positions (Eq. 7) and visibility (Eq. 9) of a microbatch.

        Args:
            config: the network.
            layout: the sequence.
            text_lengths: |text| of each clip, int [B].
            frame_mask: random frame mask m, bool [B, T, T]; None: all ones.
            dtype: of the activations.
            backend: of `choose_backend`.
            shares: of the tokens under context parallelism.
        """
        own = None if shares is None else shares.own
        positions = layout.positions(text_lengths, config.rope_scaled_spatial, flat=config.rope == "flat")
        angles = rotary_angles(positions, config.head_dim, config.rope_theta)  # [B, S, D/2]
        if backend == "flex":
            mask: Visibility | Tensor | BlockMask = flex_mask(layout, text_lengths, frame_mask, config.window, own)
        elif backend == "frames":
            batch, device = text_lengths.shape[0], text_lengths.device
            seen = layout.frames_visible(batch, frame_mask, config.window, device)
            mask = Visibility(layout, text_lengths, seen, own)
        else:
            visible = layout.attention_mask(text_lengths, frame_mask, config.window)  # [B, S, S]
            visible = visible if own is None else visible[:, own]
            # additive: a boolean mask would be turned into this one again in every layer
            mask = additive(visible, dtype)[:, None]
        full = full_angles(angles)
        return cls(full, full if own is None else full.at(own), mask, shares)


def flex_mask(
    layout: SequenceLayout,
    text_lengths: Tensor,
    frame_mask: Tensor | None,
    window: int | None,
    places: Tensor | None = None,
) -> BlockMask:
    """`SequenceLayout.attention_mask`, of the queries at `places`, as FlexAttention's block mask.

    On a GPU no [S, S] tensor exists where the length is a multiple of 128; else one of bytes does for a moment.
    """
    device, batch, length = text_lengths.device, text_lengths.shape[0], layout.length
    frame = torch.full((length,), -1, dtype=torch.int32, device=device)
    block = torch.full((length,), -1, dtype=torch.int32, device=device)
    start, stop = layout.text_length, layout.text_length + layout.video_tokens
    frame[start:stop] = layout.frame.to(device, torch.int32)
    block[start:stop] = layout.scale.to(device, torch.int32)
    seen = layout.frames_visible(batch, frame_mask, window, device)  # [B, T, T]

    def visible(clip: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query = query if places is None else places[query]
        query_video, key_video = frame[query] >= 0, frame[key] >= 0
        valid_key_text = key < text_lengths[clip]
        to_text = valid_key_text & (query_video | (query < text_lengths[clip]))
        same = (frame[query] == frame[key]) & (block[key] <= block[query])
        earlier = seen[clip, frame[query].clamp(min=0), frame[key].clamp(min=0)]
        return (query == key) | to_text | (query_video & key_video & (same | earlier))

    queries = length if places is None else len(places)
    return _block_mask(device.type)(visible, batch, None, queries, length, device=str(device))


class BlockCausalAttention(torch.nn.Module):
    """megatron's core attention: rotates queries and keys and attends under the microbatch's mask.

    It takes the heads of its tensor-parallel rank and needs no knowledge of the others.
    """

    def __init__(self, config: Any, layer_number: int, **unused: Any):
        super().__init__()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None = None,
        attn_mask_type: Any = None,
        attention_bias: AttentionContext | None = None,
        packed_seq_params: None = None,
    ) -> Tensor:
        """Queries, keys and values [S / CP, B, heads, D] -> [S / CP, B, heads * D]."""
        context = attention_bias
        assert context is not None and packed_seq_params is None
        if context.shares is not None:
            both = context.shares.gather(torch.cat([key, value], dim=-1), sum_gradients=True)  # [S, B, heads, 2 D]
            key, value = both.chunk(2, dim=-1)
        if isinstance(context.mask, Visibility):
            return frame_attention(query, key, value, context.own_angles, context.angles, context.mask)
        query, key = rotate(query, context.own_angles), rotate(key, context.angles)
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [B, heads, S, D]
        if isinstance(context.mask, BlockMask):
            out = _flex(q.device.type)(q, k, v, block_mask=context.mask)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=context.mask)
        return out.permute(2, 0, 1, 3).flatten(2)  # type: ignore[union-attr]


@functools.cache
def _flex(device_type: str) -> Any:
    # compiled it is a fused kernel; uncompiled it is a dense reference that also runs on a CPU
    return _compiled(flex_attention) if device_type == "cuda" else flex_attention


@functools.cache
def _block_mask(device_type: str) -> Any:
    # uncompiled it makes the whole [S, S] mask on its way
    if device_type != "cuda":
        return create_block_mask
    # with torch's sort: Triton takes minutes to compile the one that Inductor would write (25 blocks: one with 3.8, over nine with 3.6)
    return _compiled(create_block_mask, {"triton.persistent_reductions": False})


def _compiled(function: Any, options: dict[str, Any] | None = None) -> Any:
    # once for each bucket and number of clips, and never from step to step
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_SHAPES)
    return torch.compile(function, dynamic=False, options=options)
