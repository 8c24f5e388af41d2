"""The multi-scale temporal rotary embedding."""

from __future__ import annotations

import pytest
import torch

from inference.rope import AXES, apply_rotary, rotary_angles


def fastest(head_dim: int, axis: int) -> float:
    """Radians a step of the axis's fastest pair."""
    step = torch.zeros(1, 1, 3)
    step[..., axis] = 1
    return float(rotary_angles(step, head_dim).max())


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
def test_every_axis_has_a_fast_pair(head_dim: int):
    assert min(fastest(head_dim, axis) for axis in range(3)) >= 0.3


def test_32_is_the_smallest_head_width_with_a_fast_pair_on_every_axis():
    too_small = [width for width in range(2, 64, 2) if min(fastest(width, axis) for axis in range(3)) < 0.3]
    assert too_small == list(range(2, 32, 2))


@pytest.mark.parametrize("head_dim", [16, 32, 64, 80])
def test_text_alone_equals_llama(head_dim: int):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, rope_theta=10000.0)
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 40, head_dim), torch.randn(2, 2, 40, head_dim)  # [B, heads, S, D]
    index = torch.arange(40)[None].expand(2, -1)
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, index)
    expected = llama.apply_rotary_pos_emb(q, k, cos, sin)
    angles = rotary_angles(index[..., None].float().expand(-1, -1, 3), head_dim)
    for ours, theirs in zip((q, k), expected):
        turned = apply_rotary(ours.transpose(1, 2), angles.cos(), angles.sin()).transpose(1, 2)
        torch.testing.assert_close(turned, theirs, atol=1e-6, rtol=0)


def test_scores_depend_on_position_differences_only():
    torch.manual_seed(0)
    q, k = torch.randn(1, 6, 2, 64, dtype=torch.float64).float(), torch.randn(1, 6, 2, 64)
    positions = torch.randint(0, 20, (1, 6, 3)).float()

    def scores(shift: torch.Tensor) -> torch.Tensor:
        angles = rotary_angles(positions + shift, 64)
        turned = [apply_rotary(x, angles.cos(), angles.sin()) for x in (q, k)]
        return torch.einsum("bqhd,bkhd->bhqk", *turned)

    base = scores(torch.zeros(3))
    torch.testing.assert_close(scores(torch.tensor([7.0, 3.0, 11.0])), base, atol=1e-4, rtol=0)
    moved = scores(torch.tensor([0.0, 0.0, 1.0]) * torch.arange(6)[None, :, None])
    assert (moved - base).abs().max() > 0.5  # a move of one token against another does show, also along the width


def test_pairs_turn_with_their_own_axis():
    for pair, letter in enumerate(AXES * 4):
        for axis, name in enumerate("thw"):
            step = torch.zeros(3)
            step[axis] = 1
            angle = float(rotary_angles(step, 64)[pair])
            assert angle == pytest.approx(10000 ** (-2 * pair / 64) if name == letter else 0, rel=1e-5)
