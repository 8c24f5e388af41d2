"""Cached decoding against teacher forcing, and the sampler."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inference import sampler as sampler_module
from inference.decoder import CachedDecoder
from inference.model import VideoARTransformer
from inference.rope import apply_rotary
from inference.sampler import sample, sample_frames
from tests.inference.tiny import random_codes, random_text, tiny_model
from tokenizer.errors import UserError
from tokenizer.scales import ScaleSchedule
from tokenizer.sequence import SequenceLayout, video_inputs

LENGTHS = torch.tensor([2, 5, 0])


def cached_logits(model, layout, inputs, text, lengths, **options) -> Tensor:
    """The logits of all blocks, one call each, [B, V, d]."""
    decoder = CachedDecoder(model, layout, text, lengths, **options)
    sizes = [height * width for height, width in layout.blocks] * layout.num_frames
    return torch.cat([decoder.step(part) for part in inputs.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("context_block", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, 4])
@pytest.mark.parametrize("lengths", [LENGTHS, torch.tensor([3, 3, 3])], ids=["unequal", "equal"])
def test_cached_logits_equal_the_teacher_forced_ones(context_block: bool, window: int | None, lengths: Tensor):
    model = tiny_model(context_block=context_block, window=window, num_frames=5)
    layout = model.config.layout()
    inputs = video_inputs(random_codes(3, 5), layout)
    text, drop = random_text(3, model.config), torch.tensor([False, False, True])
    expected = model(inputs, layout, text, lengths, drop_condition=drop)
    logits = cached_logits(model, layout, inputs, text, lengths, drop_condition=drop)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.1
    if window is None:
        model.config.__dict__["window"] = 2  # the same network with a limit
        limited = model(inputs, layout, text, lengths, drop_condition=drop)
        model.config.__dict__["window"] = None
        logits = cached_logits(model, layout, inputs, text, lengths, drop_condition=drop, window=2)
        torch.testing.assert_close(logits, limited, atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", [{"num_classes": 4}, {"rope": "flat"}, {"rope_scaled_spatial": True}])
def test_cached_logits_of_other_networks(changes: dict):
    model = tiny_model(**changes)
    layout = model.config.layout()
    inputs, text = video_inputs(random_codes(2, 3), layout), random_text(2, model.config)
    lengths = torch.tensor([1, 1]) if "num_classes" in changes else torch.tensor([4, 2])
    expected = model(inputs, layout, text, lengths)
    torch.testing.assert_close(cached_logits(model, layout, inputs, text, lengths), expected, atol=1e-4, rtol=0)


def slow_long_logits(model: VideoARTransformer, layout: SequenceLayout, inputs: Tensor, text: Tensor, lengths: Tensor):
    """Teacher forcing past the trained length: the time pairs of text keys depend on the frame that looks at them."""
    config, start = model.config, layout.text_length
    positions = model.positions(layout, lengths)
    hidden = model.embedding(inputs, layout, text, lengths)
    mask = layout.attention_mask(lengths, None, config.num_frames - 1)[:, None]
    step = positions[0, start + layout.frame_tokens] - positions[0, start]
    for layer in model.layers:
        x = layer.attention_norm(hidden)
        proj = layer.attention
        q, k, v = (p(x).unflatten(-1, (proj.heads, -1)) for p in (proj.q_proj, proj.k_proj, proj.v_proj))
        outs = []
        for t in range(layout.num_frames):
            moved = positions.clone()
            moved[:, :start] += max(0, t - (config.num_frames - 1)) * step
            turned_k = apply_rotary(k, *model.rotary(moved)).transpose(1, 2)
            turned_q = apply_rotary(q, *model.rotary(positions)).transpose(1, 2)
            outs.append(F.scaled_dot_product_attention(turned_q, turned_k, v.transpose(1, 2), attn_mask=mask))
        # text rows look at text that has not moved; each video row takes its own frame's pass
        row_frame = torch.cat([torch.zeros(start, dtype=torch.long), layout.frame])
        out = torch.stack(outs)[row_frame, :, :, torch.arange(layout.length)].permute(1, 0, 2, 3)  # [B, S, heads, D]
        hidden = hidden + proj.o_proj(out.flatten(2))
        hidden = hidden + layer.feed_forward(layer.feed_forward_norm(hidden))
    return model.logits(hidden[:, start:])


@pytest.mark.parametrize("changes", [{}, {"rope": "flat"}, {"context_block": True}, {"num_frames": 1}])
def test_longer_than_trained_the_text_keeps_its_distance(changes: dict):
    model = tiny_model(**changes)
    layout = model.config.layout(num_frames=6)
    inputs, text = video_inputs(random_codes(3, 6), layout), random_text(3, model.config)
    expected = slow_long_logits(model, layout, inputs, text, LENGTHS)
    torch.testing.assert_close(cached_logits(model, layout, inputs, text, LENGTHS), expected, atol=1e-4, rtol=0)
    still = model.config.num_frames * layout.frame_tokens
    unmoved = tiny_model(**{**changes, "num_frames": 6, "window": model.config.num_frames - 1 or 1})
    difference = (unmoved(inputs, layout, text, LENGTHS) - expected).abs().amax(dim=(0, 2))
    if model.config.num_frames > 1:
        assert difference[:still].max() < 1e-4 and difference[still:].max() > 1e-3


def test_same_seed_same_bits_on_any_batch():
    model = tiny_model()
    text = random_text(3, model.config)
    codes = sample(model, text, LENGTHS, seeds=[7, 8, 9], guidance=2.0)
    again = sample(model, text, LENGTHS, seeds=[7, 8, 9], guidance=2.0)
    assert torch.equal(codes.tokens(), again.tokens())
    alone = sample(model, text[1:2], LENGTHS[1:2], seeds=[8], guidance=2.0)
    assert torch.equal(alone.tokens(), codes.tokens()[1:2])
    other = sample(model, text, LENGTHS, seeds=[17, 8, 9], guidance=2.0)
    different = (other.tokens() != codes.tokens()).flatten(1).any(dim=1)
    assert different.tolist() == [True, False, False]
    assert codes.tokens().shape == (3, 3, 17, 8) and codes.tokens().dtype == torch.bool


def test_drawn_bits_follow_the_guided_logits(monkeypatch):
    """Greedy bits are the signs of uncond + gamma (cond - uncond) under teacher forcing with the very bits drawn."""
    model = tiny_model(context_block=True)
    text, layout = random_text(2, model.config), model.config.layout()
    lengths = torch.tensor([4, 2])

    def gamma(t: int, k: int) -> float:
        return 1 + t + 0.5 * k

    codes = sample(model, text, lengths, seeds=[0, 1], guidance=gamma, temperature=0)
    inputs = video_inputs(codes, layout)
    cond = model(inputs, layout, text, lengths)
    uncond = model(inputs, layout, text, lengths, drop_condition=torch.tensor([True, True]))
    strength = torch.tensor([gamma(t, k) for t, k in zip(layout.frame.tolist(), layout.scale.tolist())])[:, None]
    guided = (uncond + strength * (cond - uncond))[:, layout.target]
    drawn = codes.tokens().flatten(1, 2)
    clear = guided.abs() > 1e-4
    assert torch.equal(drawn[clear], guided[clear] > 0) and clear.float().mean() > 0.99
    plain = cond[:, layout.target] > 0
    assert (plain != drawn).any()  # guidance did change bits


def test_temperature_sets_the_share_of_unlikely_bits():
    logits = torch.full((2, 5000, 4), 1.5)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    for temperature in (0.5, 1.0, 2.0):
        drawn = sampler_module._draw(logits, temperature, generators).float().mean()
        assert float(drawn) == pytest.approx(float(torch.sigmoid(torch.tensor(1.5 / temperature))), abs=0.01)
    assert sampler_module._draw(logits, 0, generators).all()


@pytest.mark.parametrize("context_block", [False, True])
def test_given_frames_are_forced_and_seen(context_block: bool):
    model = tiny_model(context_block=context_block)
    text = random_text(2, model.config)
    lengths = torch.tensor([4, 2])
    given = random_codes(2, 2)
    codes = sample(model, text, lengths, seeds=[0, 1], given=given, temperature=0, guidance=1.0)
    assert torch.equal(codes.tokens()[:, :2], given.tokens())
    layout = model.config.layout()
    expected = model(video_inputs(codes, layout), layout, text, lengths)[:, layout.target].unflatten(1, (3, -1))[:, 2]
    clear = expected.abs() > 1e-4
    assert torch.equal(codes.tokens()[:, 2][clear], (expected > 0)[clear])
    other = sample(model, text, lengths, seeds=[0, 1], given=random_codes(2, 2, seed=5), temperature=0, guidance=1.0)
    assert (other.tokens()[:, 2] != codes.tokens()[:, 2]).any()


@pytest.mark.parametrize(
    ("context_block", "guidance", "calls"), [(False, "ucf", 9), (True, "ucf", 11), (False, 1.0, 9)]
)
def test_one_call_a_frame_and_scale(monkeypatch, context_block: bool, guidance, calls: int):
    model = tiny_model(context_block=context_block)
    batches = []
    plain = VideoARTransformer.transform

    def counted(self, hidden, *rest):
        batches.append(hidden.shape[0])
        return plain(self, hidden, *rest)

    monkeypatch.setattr(VideoARTransformer, "transform", counted)
    sample(model, random_text(2, model.config), torch.tensor([3, 3]), seeds=[0, 1], guidance=guidance)
    assert batches == [2 if guidance == 1.0 else 4] * calls


def test_frames_come_one_by_one_on_another_schedule():
    model = tiny_model()
    schedule = ScaleSchedule(((1, 1), (2, 3)))
    frames = sample_frames(model, random_text(1, model.config), torch.tensor([3]), [0], num_frames=4, schedule=schedule)
    first = next(frames)
    assert [tuple(bits.shape) for bits in first] == [(1, 1, 1, 8), (1, 2, 3, 8)]
    assert len(list(frames)) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seeds": [0]}, "seeds"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"seeds": [0, 2**64]}, "the seed is"),
        ({"guidance": "nope"}, "guidance"),
        ({"num_frames": 0}, "at least 1"),
        ({"window": 0}, "window"),
        ({"given": random_codes(2, 4)}, "longer video"),
        ({"given": random_codes(2, 1, scales=((1, 1), (2, 2)))}, "grids"),
    ],
)
def test_arguments_that_do_not_fit(options: dict, words: str):
    model = tiny_model()
    with pytest.raises(UserError, match=words):
        # by the call, before a frame is asked for
        sample_frames(model, random_text(2, model.config), torch.tensor([3, 3]), **{"seeds": [0, 1], **options})
