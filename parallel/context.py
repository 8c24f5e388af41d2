"""Context parallelism: which tokens of a sequence each rank holds, and how it comes by the others' keys and values.

Every rank holds the same number of tokens, cheap ones from the front and dear ones from the back, so that all see about as many keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings  # its collectives, which `parallel.cpu` makes faster without a GPU
from torch import Tensor

from tokenizer.sequence import SequenceLayout


def visible_keys(layout: SequenceLayout, text_lengths: Tensor, frame_mask: Tensor | None, window: int | None) -> Tensor:
    """How many keys each token sees, summed over the clips: the row sums of `SequenceLayout.attention_mask` without the mask.

    Args:
        layout: the sequence.
        text_lengths: |text| of each clip, int [B].
        frame_mask: random frame mask m, bool [B, T, T]; None: all ones.
        window: in frames; None: no limit.

    Returns:
        int64 [S].
    """
    lengths, batch = text_lengths.long(), len(text_lengths)
    counts = torch.full((layout.length,), batch, device=lengths.device)  # padding sees itself
    place = torch.arange(layout.text_length, device=lengths.device)
    counts[: layout.text_length] = torch.where(place < lengths[:, None], lengths[:, None], 1).sum(0)
    earlier = layout.frames_visible(batch, frame_mask, window, lengths.device).sum((0, 2))  # [T]
    sizes = torch.tensor([height * width for height, width in layout.blocks])
    own = sizes.cumsum(0).repeat_interleave(sizes).to(lengths.device)  # [tokens of a frame]
    video = lengths.sum() + layout.frame_tokens * earlier[:, None] + batch * own
    counts[layout.text_length : layout.text_length + layout.video_tokens] = video.flatten()
    return counts


def split_tokens(costs: Tensor, parts: int) -> Tensor:
    """Cuts a sequence into parts of as many tokens and, as nearly as its order allows, as much cost.

    Each part takes tokens from the front and tokens from the back of what is left. Costs rise with the frame, so there is a cut, at some
    token, where such a part has its fair share.

    Args:
        costs: of each token, int [S]; S is a multiple of `parts`.
        parts: how many.

    Returns:
        The tokens' places, ascending in each part: int64 [parts, S / parts].
    """
    each = len(costs) // parts
    sums = torch.cat([costs.new_zeros(1), costs.cumsum(0)])
    inside, shares = torch.arange(each + 1, device=costs.device), []
    # tensors throughout, of one element: a GPU must not wait for the processor here
    front, back = (torch.full((1,), end, device=costs.device) for end in (0, len(costs)))
    for left in range(parts, 0, -1):
        fair = (sums[back] - sums[front]) / left
        cost = sums[front + inside] - sums[front] + sums[back] - sums[back - each + inside]
        cut = (cost - fair).abs().argmin(0, keepdim=True)
        token = inside[:each]
        shares.append(torch.where(token < cut, front + token, back - each + token))
        front, back = front + cut, back - each + cut
    return torch.stack(shares)


@dataclass(frozen=True)
class Shares:
    """Who holds which tokens.

    Args:
        places: of `split_tokens`, int64 [CP, S / CP].
        group: the ranks that share a sequence.
    """

    places: Tensor
    group: dist.ProcessGroup

    @cached_property
    def own(self) -> Tensor:
        """The places of this rank's tokens, [S / CP]."""
        return self.places[self.group.rank()]

    @cached_property
    def order(self) -> Tensor:
        """Where each token of the sequence stands in the ranks' tokens put one behind the other, [S]."""
        return self.places.flatten().argsort()

    def gather(self, x: Tensor, sum_gradients: bool) -> Tensor:
        """All tokens in the sequence's order, [S / CP, ...] -> [S, ...].

        Args:
            x: this rank's tokens.
            sum_gradients: whether the ranks go on to compute different things, whose gradients add up; otherwise all compute the same.
        """
        return _Gather.apply(x, self, sum_gradients)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: Shares, sum_gradients: bool) -> Tensor:
        ctx.shares, ctx.sum_gradients = shares, sum_gradients
        ranks = shares.group.size()
        parts = x.new_empty((ranks * x.shape[0], *x.shape[1:]))
        mappings.dist_all_gather_func(parts, x.contiguous(), group=shares.group)
        return parts.index_select(0, shares.order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        shares: Shares = ctx.shares
        if not ctx.sum_gradients:
            return grad.index_select(0, shares.own), None, None
        own = grad.new_empty(shares.places.shape[1:] + grad.shape[1:])
        parts = grad.index_select(0, shares.places.flatten())
        mappings.dist_reduce_scatter_func(own, parts, group=shares.group)
        return own, None, None
