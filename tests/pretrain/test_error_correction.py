"""Cross-frame error correction against a slow, per-token transcription of the equations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.error_correction import ErrorCorrectionConfig, corrupt, draw_flips, flip_ratios
from tokenizer.codes import Codes
from tokenizer.errors import UserError
from tokenizer.quantizer import MultiScaleQuantizer
from tokenizer.resample import down, to_values, up
from tokenizer.scales import ScaleSchedule
from tokenizer.sequence import SequenceLayout, input_scales, video_inputs

SCHEDULE = ScaleSchedule(((1, 1), (2, 2), (3, 4), (4, 6)))
BATCH, FRAMES, DIM = 2, 3, 8


def _clips(seed: int = 0, schedule: ScaleSchedule = SCHEDULE) -> tuple[Tensor, Tensor]:
    """Stored bits [B, T, N, d] and the latents [B, T, d, H, W] that they are exactly the bits of."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(BATCH, DIM, FRAMES, *schedule.grid, generator=generator).half().float()
    return MultiScaleQuantizer(DIM).quantize(latent, schedule).tokens(), latent.movedim(1, 2)


def _flips(tokens: Tensor, share: float, seed: int = 1) -> Tensor:
    return torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)) < share


def _slow(
    tokens: Tensor, flips: Tensor, layout: SequenceLayout, latents: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One clip, frame, scale and token at a time. Also returns where F had to be known: bool [B, T, N, d]."""
    schedule = layout.schedule
    constants = input_scales(schedule, DIM)
    inputs, targets, reached = torch.zeros(BATCH, layout.video_tokens, DIM), tokens.clone(), torch.zeros_like(tokens)
    starts = [sum(schedule.split()[:k]) for k in range(schedule.num_scales)]
    for clip in range(BATCH):
        before = torch.zeros(DIM, *schedule.grid)
        for frame in range(FRAMES):

            def values(bits: Tensor, k: int) -> Tensor:
                return to_values(bits[starts[k] : starts[k] + schedule.tokens(k)]).T.reshape(DIM, *schedule.scales[k])

            stored_bits = tokens[clip, frame]
            whole = sum(up(values(stored_bits, k), schedule.grid) for k in range(schedule.num_scales))
            latent = whole if latents is None else latents[clip, frame]
            flipped_sum, touched = torch.zeros_like(latent), torch.zeros_like(latent, dtype=torch.bool)
            flipped_bits = stored_bits.clone()
            row = frame * layout.frame_tokens
            for k, grid in enumerate(schedule.scales):
                source = before if k == 0 else flipped_sum
                features = down(source, grid, "area" if k == 0 else "bilinear") * constants[k]
                residual = down(latent - flipped_sum, grid, "area")
                for i in range(schedule.tokens(k)):
                    y, x = divmod(i, grid[1])
                    for j in range(DIM):
                        inputs[clip, row, j] = features[j, y, x]
                        n = starts[k] + i
                        # does anything flipped lie within this residual's support?
                        one = (touched[j] & (_area_support(schedule, grid, y, x))).any()
                        reached[clip, frame, n, j] = one
                        decided = one and abs(residual[j, y, x]) >= 1e-5
                        target = residual[j, y, x] > 0 if decided else stored_bits[n, j]
                        targets[clip, frame, n, j] = target
                        flipped_bits[n, j] = target ^ flips[clip, frame, n, j]
                    row += 1
                deviation = up(values(flipped_bits, k) - values(stored_bits, k), schedule.grid)
                touched |= deviation != 0
                flipped_sum = flipped_sum + up(values(flipped_bits, k), schedule.grid)
            if layout.context_block:
                block = down(flipped_sum, schedule.grid, "bilinear") * constants[-1]
                inputs[clip, row : row + schedule.tokens(-1)] = block.flatten(1).T
            before = flipped_sum
    return inputs, targets, reached


def _area_support(schedule: ScaleSchedule, grid: tuple[int, int], y: int, x: int) -> Tensor:
    """Cells of the finest grid that adaptive average pooling takes into cell (y, x)."""
    (height, width), (h, w) = schedule.grid, grid
    cells = torch.zeros(height, width, dtype=torch.bool)
    cells[y * height // h : -(-(y + 1) * height // h), x * width // w : -(-(x + 1) * width // w)] = True
    return cells


@pytest.mark.parametrize("context_block", [False, True])
@pytest.mark.parametrize("with_latents", [False, True])
def test_equals_the_slow_transcription(with_latents: bool, context_block: bool) -> None:
    tokens, latents = _clips()
    layout = SequenceLayout(SCHEDULE, FRAMES, 4, context_block)
    flips = _flips(tokens, 0.04)
    given = latents if with_latents else None
    inputs, targets = corrupt(tokens, flips, layout, given)
    slow_inputs, slow_targets, reached = _slow(tokens, flips, layout, given)
    assert 0.1 < reached.float().mean() < 0.9  # both branches are exercised
    assert torch.equal(targets, slow_targets)
    torch.testing.assert_close(inputs, slow_inputs, atol=2e-6, rtol=0)
    assert 0.02 < (targets != tokens).float().mean() < 0.5  # re-quantisation does change targets


def test_re_quantised_targets_are_the_quantisers_bits_of_the_remaining_residual() -> None:
    """With latents: the targets are what the quantiser would have stored, had it been fed the flipped codes."""
    tokens, latents = _clips(3)
    layout = SequenceLayout(SCHEDULE, FRAMES, 4)
    flips = _flips(tokens, 0.2)
    _, targets = corrupt(tokens, flips, layout, latents)
    flipped = Codes.from_tokens(targets ^ flips, SCHEDULE)
    total = torch.zeros_like(latents)
    for grid, wanted, bits in zip(SCHEDULE.scales, Codes.from_tokens(targets, SCHEDULE).bits, flipped.bits):
        residual = down(latents - total, grid, "area").movedim(2, -1)
        assert torch.equal((residual > 0)[residual.abs() > 1e-6], wanted[residual.abs() > 1e-6])
        total = total + up(to_values(bits).movedim(-1, 2), SCHEDULE.grid)


@pytest.mark.parametrize("with_latents", [False, True])
@pytest.mark.parametrize("schedule", [SCHEDULE, ScaleSchedule.square(8, 6), ScaleSchedule(((4, 4),))])
def test_without_flips_nothing_changes_bit_for_bit(schedule: ScaleSchedule, with_latents: bool) -> None:
    tokens, latents = _clips(schedule=schedule)
    layout = SequenceLayout(schedule, FRAMES, 4)
    inputs, targets = corrupt(tokens, torch.zeros_like(tokens), layout, latents if with_latents else None)
    assert torch.equal(targets, tokens)
    assert torch.equal(inputs, video_inputs(Codes.from_tokens(tokens, schedule), layout))


def test_a_flip_touches_its_own_channel_and_what_comes_after_it() -> None:
    tokens, latents = _clips()
    layout = SequenceLayout(SCHEDULE, FRAMES, 4)
    plain = video_inputs(Codes.from_tokens(tokens, SCHEDULE), layout)
    flips = torch.zeros_like(tokens)
    flips[0, 1, 3, 5] = True  # clip 0, frame 1, a token of scale 1, channel 5
    inputs, targets = corrupt(tokens, flips, layout, latents)
    changed = inputs != plain
    rows = torch.arange(layout.video_tokens)
    start = SCHEDULE.tokens_per_frame
    later_in_frame = (rows >= start + 5) & (rows < 2 * start)
    first_of_next = rows == 2 * start
    assert changed[0, :, 5][later_in_frame].any() and changed[0, first_of_next, 5].all()
    assert not changed[0, ~(later_in_frame | first_of_next)].any()
    changed[0, :, 5] = False
    assert not changed.any()
    moved = targets != tokens
    assert moved[0, 1, 5:, 5].any()
    moved[0, 1, 5:, 5] = False
    assert not moved.any()


def test_ratios_lie_in_their_intervals() -> None:
    config = ErrorCorrectionConfig(p_min=0.05, p_max=0.25, delta=0.04)
    draws = torch.rand(4000, 12, 3, generator=torch.Generator().manual_seed(0))
    ratios = flip_ratios(config, draws)
    for frame in range(12):
        low, high = min(0.05 + 0.04 * frame, 0.5), min(0.25 + 0.04 * frame, 0.5)
        rest = ratios[:, frame, 1:]
        assert low - 1e-6 <= rest.min() and rest.max() <= high + 1e-6
        assert abs(rest.mean() - (low + high) / 2) < 0.005
        first = ratios[:, frame, 0]
        before = ratios[:, frame - 1, -1].clamp(max=high) if frame else torch.full_like(first, low)
        assert (first >= before - 1e-6).all() and (first <= high + 1e-6).all()
        assert (
            abs(((first - before) / (high - before).clamp(min=1e-9))[high - before > 0.01].mean() - 0.5) < 0.03
            or high - low < 0.01
        )
    # at p_min + delta t = p_max + delta t = 0.5 nothing is left to draw
    assert torch.allclose(ratios[:, 12 - 1, 1:], torch.tensor(0.5), atol=0.01)


def test_the_paper_values_by_hand() -> None:
    draws = torch.full((1, 2, 2), 0.5)
    draws[0, 1, 0] = 0.25
    ratios = flip_ratios(ErrorCorrectionConfig(), draws)
    # frame 0: U(0, .25); frame 1: first U(p of frame 0's last = .125, .26), then U(.01, .26)
    expected = torch.tensor([[[0.125, 0.125], [0.125 + 0.25 * 0.135, 0.01 + 0.5 * 0.25]]])
    torch.testing.assert_close(ratios, expected)


def test_without_inheritance_a_first_scale_is_drawn_as_the_others() -> None:
    draws = torch.rand(3, 4, 3, generator=torch.Generator().manual_seed(0))
    with_it = flip_ratios(ErrorCorrectionConfig(0.05, 0.25, 0.02), draws)
    without = flip_ratios(ErrorCorrectionConfig(0.05, 0.25, 0.02, inherit=False), draws)
    lower = 0.05 + 0.02 * torch.arange(4)[None, :, None]
    torch.testing.assert_close(without, lower + 0.2 * draws)
    changed = with_it != without
    assert changed[:, 1:, 0].all() and not changed[:, 0].any() and not changed[:, :, 1:].any()


def test_flips_follow_the_ratios_and_zero_means_none() -> None:
    ratios = torch.tensor([[[0.0, 0.1, 0.3, 0.5]]]).expand(BATCH, 1, 4)
    draws = torch.rand(BATCH, 1, SCHEDULE.tokens_per_frame, 4096, generator=torch.Generator().manual_seed(0))
    parts = draw_flips(ratios, draws, SCHEDULE).split(SCHEDULE.split(), dim=2)
    assert not parts[0].any()
    for part, ratio in zip(parts[1:], (0.1, 0.3, 0.5)):
        assert abs(part.float().mean() - ratio) < 0.01
    off = flip_ratios(ErrorCorrectionConfig(0.0, 0.0, 0.01), torch.rand(2, 5, 4))
    assert off.max() == 0


@pytest.mark.parametrize("values", [(0.3, 0.2, 0.0), (0.0, 0.6, 0.0), (-0.1, 0.2, 0.0), (0.0, 0.2, -0.1)])
def test_impossible_ratios_are_refused(values: tuple[float, float, float]) -> None:
    with pytest.raises(UserError, match="p_max"):
        ErrorCorrectionConfig(*values)
