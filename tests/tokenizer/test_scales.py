"""Scale schedules for every grid: they grow, end at the grid, and hold no grid twice."""

import pytest

from tokenizer import ScaleSchedule, UserError
from tokenizer.scales import LADDER, natural_scales


def test_the_papers_grids():
    assert [side for side, _ in ScaleSchedule.square(8, 6).scales] == [1, 2, 3, 4, 6, 8]
    wide = ScaleSchedule.for_grid(24, 42, natural_scales(42)).scales  # 384x672
    assert wide[:4] == ((1, 1), (1, 2), (2, 3), (2, 4)) and wide[-2:] == ((18, 32), (24, 42))


@pytest.mark.parametrize("height", [1, 2, 3, 4, 7, 8, 16, 24, 32, 42, 63])
def test_every_grid_and_every_number_of_scales(height):
    for width in (1, 2, 5, 8, 13, 24, 42, 64):
        longer = max(height, width)
        for count in sorted({1, 2, min(6, longer), natural_scales(longer), longer} & set(range(1, longer + 1))):
            scales = ScaleSchedule.for_grid(height, width, count).scales
            assert len(scales) == count and scales[-1] == (height, width)
            for coarse, fine in zip(scales, scales[1:]):
                assert coarse[0] <= fine[0] and coarse[1] <= fine[1] and coarse != fine
            for h, w in scales[1:]:  # the grid's own aspect ratio, to the rounding of the shorter side
                assert abs(h * width - w * height) <= longer


def test_a_larger_grids_first_scales_are_a_smaller_ones():
    for small, large in zip(LADDER[1:], LADDER[2:]):
        few, many = (ScaleSchedule.square(side, natural_scales(side)).scales for side in (small, large))
        assert many[: len(few)] == few


def test_schedules_that_cannot_be():
    with pytest.raises(UserError, match="9 scales do not fit a grid of 8"):
        ScaleSchedule.square(8, 9)
    with pytest.raises(UserError, match="shrinks from"):
        ScaleSchedule(((2, 2), (1, 1)))
    with pytest.raises(UserError, match="shrinks from"):
        ScaleSchedule(((1, 1), (1, 1)))
    with pytest.raises(UserError, match="empty"):
        ScaleSchedule(())
