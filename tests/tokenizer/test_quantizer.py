"""The quantiser against a slow transcription of the equations, one token at a time."""

import math

import pytest
import torch

from tokenizer import Codes, MultiScaleQuantizer, ScaleSchedule, UserError
from tokenizer.codes import pack_tokens, unpack_tokens
from tokenizer.quantizer import accumulate
from tokenizer.scales import natural_scales


def slow_area(frame, grid):
    """Area means by the definition: cell i covers floor(i H / h) .. ceil((i + 1) H / h)."""
    channels, height, width = frame.shape
    out = torch.zeros(channels, *grid, dtype=frame.dtype)
    for i in range(grid[0]):
        for j in range(grid[1]):
            rows = slice(i * height // grid[0], math.ceil((i + 1) * height / grid[0]))
            columns = slice(j * width // grid[1], math.ceil((j + 1) * width / grid[1]))
            out[:, i, j] = frame[:, rows, columns].mean(dim=(1, 2))
    return out


def slow_bilinear(frame, grid):
    """Bilinear sampling at cell centres (align_corners off), clamped at the border."""
    channels, height, width = frame.shape
    out = torch.zeros(channels, *grid, dtype=frame.dtype)
    for i in range(grid[0]):
        for j in range(grid[1]):
            y = max((i + 0.5) * height / grid[0] - 0.5, 0.0)
            x = max((j + 0.5) * width / grid[1] - 0.5, 0.0)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            a, b = y - y0, x - x0
            top = (1 - b) * frame[:, y0, x0] + b * frame[:, y0, x1]
            bottom = (1 - b) * frame[:, y1, x0] + b * frame[:, y1, x1]
            out[:, i, j] = (1 - a) * top + a * bottom
    return out


def slow_quantize(frame, schedule, down):
    """r_k = down(F - sum up(q_i)), b = [r / |r| > 0], q = (2 b - 1) / sqrt(d): one frame [d, H, W]."""
    dim = frame.shape[0]
    total = torch.zeros_like(frame)
    bits = []
    for grid in schedule.scales:
        residual = down(frame - total, grid)
        scale_bits = torch.zeros(*grid, dim, dtype=torch.bool)
        value = torch.zeros(dim, *grid, dtype=frame.dtype)
        for i in range(grid[0]):
            for j in range(grid[1]):
                unit = residual[:, i, j] / residual[:, i, j].norm()
                for c in range(dim):
                    scale_bits[i, j, c] = bool(unit[c] > 0)
                    value[c, i, j] = (1 if unit[c] > 0 else -1) / math.sqrt(dim)
        total = total + slow_bilinear(value, schedule.grid)
        bits.append(scale_bits)
    return bits, total


@pytest.mark.parametrize("down", ["area", "bilinear"])
@pytest.mark.parametrize("schedule", [ScaleSchedule.square(4, 4), ScaleSchedule(((1, 1), (2, 3), (3, 5)))])
def test_bits_and_sums_equal_the_equations(schedule, down):
    latent = torch.randn(2, 8, 3, *schedule.grid, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    quantizer = MultiScaleQuantizer(8, down)
    out = quantizer(latent, schedule)
    for clip in range(2):
        for t in range(3):
            bits, total = slow_quantize(latent[clip, :, t], schedule, slow_area if down == "area" else slow_bilinear)
            for k in range(schedule.num_scales):
                assert torch.equal(out.bits[k][clip, t], bits[k])
            torch.testing.assert_close(out.quantized[clip, :, t], total, atol=1e-6, rtol=0)
    fast = quantizer.quantize(latent, schedule)
    assert all(torch.equal(a, b) for a, b in zip(fast.bits, out.bits))
    torch.testing.assert_close(quantizer.dequantize(fast), out.quantized.float(), atol=1e-6, rtol=0)


def test_gradient_is_that_of_the_normalised_residuals():
    """Straight through: d sum(w * quantised) / dF equals the gradient through sum_k up(u(r_k)), each r_k = down(F - const)."""
    schedule, quantizer = ScaleSchedule.square(2, 2), MultiScaleQuantizer(8)
    latent = torch.randn(1, 8, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(latent)
    (quantizer(latent, schedule).quantized * weight).sum().backward()
    straight, latent.grad = latent.grad.clone(), None
    first = quantizer.quantize(latent, schedule).bits[0]  # [1, 1, 1, 1, d]
    q0 = ((first.double() * 2 - 1) / math.sqrt(8)).permute(0, 4, 1, 2, 3).expand(-1, -1, -1, 2, 2)
    r0 = latent.mean(dim=(3, 4), keepdim=True)
    u0 = (r0 / r0.norm(dim=1, keepdim=True)).expand(-1, -1, -1, 2, 2)
    r1 = latent - q0
    ((u0 + r1 / r1.norm(dim=1, keepdim=True)) * weight).sum().backward()
    torch.testing.assert_close(straight, latent.grad, atol=1e-6, rtol=0)


def test_entropy_rewards_sure_bits_and_balanced_use():
    """All tokens alike: both entropies are equal; opposite tokens, very sure: none a sample, d ln 2 a batch."""
    quantizer, schedule = MultiScaleQuantizer(8, entropy_beta=1e3), ScaleSchedule(((1, 1),))
    token = torch.ones(1, 8, 1, 1, 1)
    alike = quantizer(token.expand(4, -1, -1, -1, -1), schedule).losses
    opposite = quantizer(torch.cat([token, -token]), schedule).losses
    assert alike["entropy_sample"].item() == pytest.approx(alike["entropy_batch"].item(), abs=1e-5)
    assert opposite["entropy_sample"].item() == pytest.approx(0, abs=1e-4)
    assert opposite["entropy_batch"].item() == pytest.approx(8 * math.log(2), abs=1e-4)
    soft = (
        MultiScaleQuantizer(8)(token, schedule).losses["entropy_sample"].item()
    )  # beta = d / 4: p = sigmoid(8 u / sqrt(8)), u = 1 / sqrt(8)
    p = 1 / (1 + math.exp(-1))
    assert soft == pytest.approx(-8 * (p * math.log(p) + (1 - p) * math.log(1 - p)), rel=1e-5)


def test_usage_is_the_share_of_ones_of_each_bit():
    latent = torch.randn(4, 8, 2, 2, 2)
    out = MultiScaleQuantizer(8)(latent, ScaleSchedule.square(2, 2))
    torch.testing.assert_close(out.usage[1], out.bits[1].float().mean(dim=(0, 1, 2, 3)))
    assert out.usage.shape == (2, 8)


def test_codes_come_back_from_tokens_and_bytes():
    schedule = ScaleSchedule.square(8, 6)
    codes = MultiScaleQuantizer(48).quantize(torch.randn(2, 48, 5, 8, 8), schedule)
    tokens = codes.tokens()
    assert tokens.shape == (2, 5, 130, 48)
    again = Codes.from_tokens(tokens, schedule)
    assert all(torch.equal(a, b) for a, b in zip(codes.bits, again.bits))
    packed = pack_tokens(tokens[1])
    assert len(packed) == 5 * 780  # DESIGN section 5: 780 bytes a latent frame at 8x8, K = 6, d = 48
    assert torch.equal(unpack_tokens(packed, 5, schedule, 48), tokens[1])
    torch.testing.assert_close(accumulate(codes)[:, :2], accumulate(codes.frames(0, 2)), atol=0, rtol=0)
    with pytest.raises(UserError, match="3899 bytes"):
        unpack_tokens(packed[:-1], 5, schedule, 48)
    with pytest.raises(UserError, match="multiple of 8"):
        pack_tokens(torch.zeros(1, 1, 12, dtype=torch.bool))


def test_schedules():
    assert ScaleSchedule.square(8, 6).scales == ((1, 1), (2, 2), (3, 3), (4, 4), (6, 6), (8, 8))
    assert ScaleSchedule.for_grid(8, 8, 6) == ScaleSchedule.square(8, 6)
    wide = ScaleSchedule.for_grid(24, 42, 10)
    assert wide.grid == (24, 42) and wide.num_scales == 10 and wide.scales[0] == (1, 1)
    # a later stage's first scales keep the meaning of the earlier ones
    assert ScaleSchedule.square(4, 4).scales[:2] == ScaleSchedule.square(2, 2).scales
    large, larger = (ScaleSchedule.square(size, natural_scales(size)).scales for size in (16, 32))
    assert larger[: len(large)] == large and large[:6] == ScaleSchedule.square(8, 6).scales
    with pytest.raises(UserError, match="shrinks"):
        ScaleSchedule(((2, 2), (1, 1)))
    with pytest.raises(UserError, match="5 scales"):
        ScaleSchedule.square(4, 5)


def test_a_latent_of_another_shape_is_refused():
    with pytest.raises(UserError, match=r"\(1, 8, 1, 3, 3\)"):
        MultiScaleQuantizer(8).quantize(torch.zeros(1, 8, 1, 3, 3), ScaleSchedule.square(4, 4))
