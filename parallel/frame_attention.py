"""Block-causal attention frame by frame, for CPUs: no score, probability or mask is ever larger than one frame's queries need.

The queries of one frame meet only keys that some clip of the batch lets them see, so a causal sequence costs half of the dense
matrix, and hidden frames cost nothing. Scores are float32 whatever the activations are; the backward pass computes them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from parallel.rotary import Angles, turn
from tokenizer.sequence import SequenceLayout


@dataclass(frozen=True)
class Group:
    """Queries that share their keys: the text, or one frame.

    Args:
        rows: the queries' places in the sequence.
        keys: the keys' places, ranges one behind the other.
        hidden: additive, 0 or -inf, [B, rows, keys].
    """

    rows: slice
    keys: tuple[slice, ...]
    hidden: Tensor


@dataclass(frozen=True)
class Visibility:
    """Visibility (Eq. 9) as what it is made of; `groups` equals `SequenceLayout.attention_mask` without the end padding.

    Args:
        layout: the sequence.
        text_lengths: int [B].
        frames_seen: of `SequenceLayout.frames_visible`, bool [B, T, T].
        places: of this rank's queries under context parallelism, ascending; None: all of the sequence.
    """

    layout: SequenceLayout
    text_lengths: Tensor
    frames_seen: Tensor
    places: Tensor | None = None

    @cached_property
    def bounds(self) -> list[int]:
        """Where this rank's queries of the text, of each frame and of the end padding begin, and where they end."""
        layout = self.layout
        starts = [0, *range(layout.text_length, layout.text_length + layout.video_tokens + 1, layout.frame_tokens)]
        if self.places is None:
            return [*starts, layout.length]
        wanted = torch.tensor([*starts, layout.length], device=self.places.device)
        return torch.searchsorted(self.places, wanted).tolist()

    def rows(self, part: int) -> tuple[slice, Tensor | slice]:
        """Of part 0 (text), 1 + t (frame t) or 1 + T (end padding): the queries' rows on this rank, and their places within the part."""
        rows = slice(self.bounds[part], self.bounds[part + 1])
        if self.places is None:
            return rows, slice(None)
        start = 0 if part == 0 else self.layout.text_length + (part - 1) * self.layout.frame_tokens
        return rows, self.places[rows] - start

    def groups(self, dtype: torch.dtype) -> Iterator[Group]:
        """The text, then frame after frame, with masks of this dtype; only what this rank has queries of."""
        layout, device = self.layout, self.text_lengths.device
        batch, text, tokens = len(self.text_lengths), layout.text_length, layout.frame_tokens
        valid = torch.arange(text, device=device) < self.text_lengths[:, None]  # [B, L]
        itself = torch.eye(text, dtype=torch.bool, device=device)
        rows, own_rows = self.rows(0)
        if rows.start < rows.stop:
            visible = valid[:, own_rows, None] & valid[:, None] | itself[own_rows]
            yield Group(rows, (slice(0, text),), additive(visible, dtype))
        block = layout.scale[:tokens].to(device)
        own = (block[None] <= block[:, None]).expand(batch, -1, -1)  # [B, n, n]
        for frame in range(layout.num_frames):
            rows, own_rows = self.rows(1 + frame)
            if rows.start == rows.stop:
                continue
            same = own[:, own_rows]
            seen = self.frames_seen[:, frame, :frame]  # [B, t]
            used = seen.any(0).nonzero()[:, 0]  # frames that no clip sees are left out
            before = torch.cat([valid, seen[:, used].repeat_interleave(tokens, dim=1)], dim=1)  # [B, keys before]
            visible = torch.cat([before[:, None].expand(-1, same.shape[1], -1), same], dim=2)
            ranges = [(0, text)]
            for begin in (text + earlier * tokens for earlier in (*used.tolist(), frame)):
                if begin == ranges[-1][1]:  # neighbours are one range
                    ranges[-1] = (ranges[-1][0], begin + tokens)
                else:
                    ranges.append((begin, begin + tokens))
            yield Group(rows, tuple(slice(*one) for one in ranges), additive(visible, dtype))


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, -inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def frame_attention(query: Tensor, key: Tensor, value: Tensor, own: Angles, whole: Angles, mask: Visibility) -> Tensor:
    """Rotates queries and keys and attends: softmax(q k' / sqrt(D)) v under the mask.

    Args:
        query: [S / CP, B, heads, D], the mask's `places`.
        key, value: [S, B, heads, D].
        own, whole: of the queries, and of the keys.
        mask: who sees whom.

    Returns:
        [S / CP, B, heads * D].
    """
    return _FrameAttention.apply(query, key, value, own, whole, mask)


class _FrameAttention(torch.autograd.Function):
    """The products run on [B * heads, S, D] views of tensors that lie as [S, B, heads, D]: nothing is transposed in memory."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, own: Angles, whole: Angles, mask: Visibility
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.own, ctx.whole, ctx.mask = own, whole, mask
        q, k, v = _turned(query, key, value, own, whole)
        # end padding sees only itself
        out = value.contiguous().clone() if mask.places is None else value.index_select(0, mask.places)
        places = _by_place(out)
        for group in mask.groups(q.dtype):
            places[group.rows] = torch.bmm(_probabilities(q, k, group), _at(v, group.keys)).transpose(0, 1)
        return out.flatten(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value = ctx.saved_tensors
        q, k, v = _turned(query, key, value, ctx.own, ctx.whole)
        grad_out = _heads(grad.view(query.shape).to(q.dtype))
        grads = [torch.zeros(one.shape, dtype=q.dtype, device=q.device) for one in (query, key, value)]
        grad_q, grad_k, grad_v = (_by_place(one) for one in grads)
        layout = ctx.mask.layout
        rows, own_rows = ctx.mask.rows(1 + layout.num_frames)
        grad_v[layout.text_length + layout.video_tokens :][own_rows] = grad_out[:, rows].transpose(0, 1)
        for group in ctx.mask.groups(q.dtype):
            seen, own = _probabilities(q, k, group), grad_out[:, group.rows]
            grad_seen = torch.bmm(own, _at(v, group.keys).transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_seen, seen, -1, seen.dtype)
            grad_q[group.rows] = torch.bmm(grad_scores, _at(k, group.keys)).transpose(0, 1)
            for total, left, right in ((grad_v, seen, own), (grad_k, grad_scores, q[:, group.rows])):
                product = torch.bmm(left.transpose(1, 2), right).transpose(0, 1)  # [keys, B * heads, D]
                sizes = [one.stop - one.start for one in group.keys]
                for one, part in zip(group.keys, product.split(sizes)):
                    total[one] += part
        grads[0] = turn(grads[0], ctx.own, -1).mul_(query.shape[-1] ** -0.5)
        grads[1] = turn(grads[1], ctx.whole, -1)
        return *(one.to(value.dtype) for one in grads), None, None, None


def _turned(query: Tensor, key: Tensor, value: Tensor, own: Angles, whole: Angles) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (turned and scaled), keys (turned) and values as wide views [B * heads, S, D]."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k = turn(query.to(wide), own), turn(key.to(wide), whole)
    return _heads(q.mul_(query.shape[-1] ** -0.5)), _heads(k), _heads(value.to(wide))


def _by_place(x: Tensor) -> Tensor:
    """[S, B, heads, D] -> [S, B * heads, D]."""
    return x.flatten(1, 2)


def _heads(x: Tensor) -> Tensor:
    """[S, B, heads, D] -> [B * heads, S, D]."""
    return x.flatten(1, 2).transpose(0, 1)


def _at(x: Tensor, keys: tuple[slice, ...]) -> Tensor:
    """Keys or values of these places, [B * heads, S, D] -> [B * heads, keys, D]; without a copy where they are one range."""
    parts = [x[:, one] for one in keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _probabilities(q: Tensor, k: Tensor, group: Group) -> Tensor:
    """[B * heads, rows, keys]."""
    scores = torch.bmm(q[:, group.rows], _at(k, group.keys).transpose(1, 2))
    scores.unflatten(0, (group.hidden.shape[0], -1)).add_(group.hidden[:, None])  # [B, heads, rows, keys]
    return torch.softmax(scores, dim=-1)
