"""Guidance schedules at their corners."""

from __future__ import annotations

import pytest

from inference.guidance import guidance_table, needs_unconditional
from tokenizer.errors import UserError


def test_ucf_corners():
    table = guidance_table("ucf", 5, 5, 6)
    assert [table[0][0], table[0][5], table[4][0], table[4][5]] == [1, 10, 5, 10]
    assert table[2][1] == pytest.approx((1 + 4 * 0.5) * 0.8 + 10 * 0.2)


def test_t2v_corners():
    table = guidance_table("t2v", 9, 9, 10)
    assert [table[0][0], table[0][9], table[8][0], table[8][9]] == [5, 4, 4, 3]


def test_frames_count_to_the_smaller_of_requested_and_trained():
    longer = guidance_table("t2v", 9, 5, 3)
    assert [row[0] for row in longer] == [5, 4.75, 4.5, 4.25, 4, 4, 4, 4, 4]
    shorter = guidance_table("t2v", 3, 5, 3)
    assert [row[0] for row in shorter] == [5, 4.5, 4]


def test_one_frame_or_one_scale():
    assert guidance_table("ucf", 1, 5, 3)[0] == [1, 5.5, 10]
    assert guidance_table("t2v", 3, 5, 1) == [[5], [4.5], [4]]


def test_constants_functions_and_names():
    assert guidance_table(2.5, 2, 5, 2) == [[2.5, 2.5], [2.5, 2.5]]
    assert guidance_table(lambda t, k: 10 * t + k, 2, 5, 3) == [[0, 1, 2], [10, 11, 12]]
    with pytest.raises(UserError, match="'ufc' is unknown: use ucf, t2v"):
        guidance_table("ufc", 2, 5, 3)
    for wrong in (float("nan"), float("inf"), None, lambda t, k: float("nan") if (t, k) == (1, 2) else 1.0):
        with pytest.raises(UserError, match="give a finite number"):
            guidance_table(wrong, 2, 5, 3)  # type: ignore[arg-type]


def test_the_unconditional_branch_is_left_out_only_if_gamma_is_one_throughout():
    assert not needs_unconditional(guidance_table(1.0, 3, 5, 3))
    assert needs_unconditional(guidance_table(lambda t, k: 1 if (t, k) != (2, 2) else 2, 3, 5, 3))
    assert needs_unconditional(guidance_table("ucf", 1, 5, 3))
