"""Context parallelism in one process: shares of equal size and work, and attention on a share."""

import dataclasses

import pytest
import torch

from inference.config import ModelConfig
from inference.embedding import InputEmbedding
from parallel.attention import AttentionContext, BlockCausalAttention
from parallel.context import Shares, split_tokens, visible_keys
from tokenizer.scales import ScaleSchedule
from tokenizer.sequence import SequenceLayout

SMALL = ModelConfig(
    num_layers=1, hidden_size=32, num_attention_heads=2, scales=((1, 1), (2, 2), (3, 3)), num_frames=4, bits=8, text_dim=6,
    max_text_length=5,
)  # fmt: skip
LENGTHS = torch.tensor([1, 5, 3])


class OneOfTwo:
    """Stands for the process group where nothing is sent."""

    def __init__(self, rank: int):
        self.index = rank

    def rank(self) -> int:
        return self.index


class WholeKeys(Shares):
    """Of keys and values that are whole already."""

    def gather(self, x: torch.Tensor, sum_gradients: bool) -> torch.Tensor:
        return x


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("context_block", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
def test_visible_keys_are_the_mask_s_row_sums(window, context_block, hidden):
    layout = dataclasses.replace(SMALL, context_block=context_block).layout(multiple=16)
    frame_mask = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.5 if hidden else None
    mask = layout.attention_mask(LENGTHS, frame_mask, window)
    assert torch.equal(visible_keys(layout, LENGTHS, frame_mask, window), mask.sum((0, 2)))


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("p_mask", [0.0, 0.5])
@pytest.mark.parametrize(("grid", "scales", "frames"), [((24, 42), 10, 17), ((8, 8), 6, 5), ((16, 16), 10, 17)])
def test_shares_have_as_many_tokens_and_see_as_many_keys(grid, scales, frames, parts, window, p_mask):
    layout = SequenceLayout(ScaleSchedule.for_grid(*grid, scales), frames, text_length=77, multiple=parts)
    draw, lengths = torch.Generator().manual_seed(parts), torch.tensor([20, 77])
    frame_mask = torch.rand(2, frames, frames, generator=draw) >= p_mask if p_mask else None
    costs = visible_keys(layout, lengths, frame_mask, window)
    places = split_tokens(costs, parts)
    assert places.shape == (parts, layout.length // parts)
    assert torch.equal(places.flatten().sort().values, torch.arange(layout.length))  # each token once
    assert bool((places.diff(dim=1) > 0).all())
    work = costs[places].sum(1)
    assert int(work.max()) <= 1.05 * int(work.min()), work.tolist()


def test_plain_halves_would_not_be_balanced():
    layout = SequenceLayout(ScaleSchedule.for_grid(24, 42, 10), 17, text_length=77, multiple=2)
    first, second = visible_keys(layout, torch.tensor([77]), None, None).chunk(2)
    assert int(second.sum()) > 2 * int(first.sum())


@pytest.mark.parametrize("backend", ["frames", "sdpa", "flex"])
@pytest.mark.parametrize("hidden", [False, True])
def test_attention_on_a_share_is_that_part_of_the_whole(backend, hidden):
    config = dataclasses.replace(SMALL, context_block=True)
    layout, draw = config.layout(multiple=16), torch.Generator().manual_seed(0)
    frame_mask = torch.rand(3, 4, 4, generator=draw) > 0.5 if hidden else None
    places = split_tokens(visible_keys(layout, LENGTHS, frame_mask, None), 2)
    query, key, value = torch.randn(3, layout.length, 3, 2, 16, generator=draw)
    mix, core, backward = (
        torch.randn(layout.length, 3, 32, generator=draw),
        BlockCausalAttention(None, 1),
        backend != "flex",
    )

    def attend(name: str, rows: torch.Tensor, shares: Shares | None) -> tuple[torch.Tensor, ...]:
        context = AttentionContext.build(config, layout, LENGTHS, frame_mask, torch.float32, name, shares)
        q, k, v = (one.clone().requires_grad_(backward) for one in (query[rows], key, value))
        out = core(q, k, v, attention_bias=context)
        return (out.detach(), *(torch.autograd.grad((out * mix[rows]).sum(), (q, k, v)) if backward else ()))

    whole = attend("sdpa", torch.arange(layout.length), None)
    parts = [attend(backend, places[rank], WholeKeys(places, OneOfTwo(rank))) for rank in range(2)]  # type: ignore[arg-type]
    for rank, part in enumerate(parts):
        assert torch.allclose(part[0], whole[0][places[rank]], atol=2e-6)
        if backward:
            assert torch.allclose(part[1], whole[1][places[rank]], atol=2e-6)
    if backward:  # the ranks' gradients of keys and values add up
        for index in (2, 3):
            assert torch.allclose(parts[0][index] + parts[1][index], whole[index], atol=4e-6)


@pytest.mark.parametrize("classes", [0, 3])
def test_a_part_of_the_embedding_is_that_part_of_the_whole(classes):
    config = dataclasses.replace(SMALL, num_classes=classes, context_block=True)
    layout, draw = config.layout(multiple=16), torch.Generator().manual_seed(0)
    embedding = InputEmbedding(config)
    with torch.no_grad():
        for parameter in embedding.parameters():
            parameter.normal_(generator=draw)
    inputs = torch.randn(2, layout.video_tokens, 8, generator=draw)
    text = torch.tensor([0, 2]) if classes else torch.randn(2, 5, 6, generator=draw)
    rest = (inputs, layout, text, torch.tensor([1, 4]), torch.tensor([False, True]))
    whole = embedding(*rest)
    assert whole.shape == (2, layout.length, 32)
    for places in torch.arange(layout.length).chunk(4) + torch.arange(layout.length).view(-1, 2).unbind(1):
        assert torch.allclose(embedding(*rest, places=places), whole[:, places], atol=1e-6)


def test_nothing_waits_for_a_gpu_or_mixes_devices():
    """Tensors without values stand for a GPU's: reading one, or mixing one with the processor's, fails."""
    config = dataclasses.replace(SMALL, context_block=True)
    layout = config.layout(multiple=16)
    with torch.device("meta"):
        embedding = InputEmbedding(config)
        inputs, text = torch.empty(3, layout.video_tokens, 8), torch.empty(3, 5, 6)
        lengths, frame_mask = torch.empty(3, dtype=torch.long), torch.empty(3, 4, 4, dtype=torch.bool)
    costs = visible_keys(layout, lengths, frame_mask, 2)
    shares = Shares(split_tokens(costs, 4), OneOfTwo(1))  # type: ignore[arg-type]
    hidden = embedding(inputs, layout, text, lengths, torch.empty(3, dtype=torch.bool, device="meta"), shares.own)
    context = AttentionContext.build(config, layout, lengths, frame_mask, torch.float32, "sdpa", shares)
    assert hidden.shape == (3, layout.length // 4, 32) and hidden.device.type == "meta"
    assert isinstance(context.mask, torch.Tensor) and context.mask.shape == (3, 1, layout.length // 4, layout.length)
    assert shares.order.shape == (layout.length,) and context.own_angles.cos.shape[0] == layout.length // 4
