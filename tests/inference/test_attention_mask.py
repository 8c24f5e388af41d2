"""The attention mask, entry by entry, against Eq. 9 written as loops."""

from __future__ import annotations

import pytest
import torch

from tokenizer.scales import ScaleSchedule
from tokenizer.sequence import SequenceLayout

SCHEDULE = ScaleSchedule(((1, 1), (1, 2), (2, 3)))


def slow_tokens(layout: SequenceLayout) -> list[tuple]:
    """What each place of the sequence holds: ("text", i), ("video", t, k) or ("end",)."""
    places: list[tuple] = [("text", i) for i in range(layout.text_length)]
    for t in range(layout.num_frames):
        grids = list(SCHEDULE.scales) + ([SCHEDULE.grid] if layout.context_block else [])
        for k, (height, width) in enumerate(grids):
            places += [("video", t, k)] * (height * width)
    while len(places) % layout.multiple:
        places.append(("end",))
    return places


def slow_visible(query, key, same: bool, words: int, frame_mask, window: int | None) -> bool:
    if same:
        return True
    if key[0] == "end" or query[0] == "end":
        return False
    if key[0] == "text":
        valid_query = query[0] == "video" or query[1] < words
        return key[1] < words and valid_query
    if query[0] == "text":
        return False
    (_, t, k), (_, earlier, other) = query, key
    if earlier == t:
        return other <= k
    if earlier > t or (window is not None and earlier < t - window):
        return False
    return bool(frame_mask[t][earlier]) if frame_mask is not None else True


@pytest.mark.parametrize("context_block", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("multiple", [1, 8])
def test_mask_against_the_definition(context_block: bool, window: int | None, masked: bool, multiple: int):
    layout = SequenceLayout(SCHEDULE, 4, 3, context_block, multiple)
    lengths = torch.tensor([3, 1, 0])
    generator = torch.Generator().manual_seed(0)
    frame_mask = torch.rand(3, 4, 4, generator=generator) < 0.5 if masked else None
    mask = layout.attention_mask(lengths, frame_mask, window)
    places = slow_tokens(layout)
    assert mask.shape == (3, len(places), len(places))
    for clip, words in enumerate(lengths.tolist()):
        drawn = frame_mask[clip].tolist() if frame_mask is not None else None
        expected = [
            [slow_visible(query, key, i == j, words, drawn, window) for j, key in enumerate(places)]
            for i, query in enumerate(places)
        ]
        assert mask[clip].tolist() == expected


def test_positions_of_text_and_video():
    layout = SequenceLayout(SCHEDULE, 2, 3, multiple=8)
    positions = layout.positions(torch.tensor([3, 1]))
    for clip, words in enumerate((3, 1)):
        rows = [(i, i, i) for i in range(3)]
        for t in range(2):
            for height, width in SCHEDULE.scales:
                rows += [(t + words, h + words, w + words) for h in range(height) for w in range(width)]
        rows += [(0, 0, 0)] * (layout.length - len(rows))
        assert positions[clip].tolist() == [list(map(float, row)) for row in rows]


def test_scaled_and_flat_positions():
    layout = SequenceLayout(SCHEDULE, 2, 1)
    scaled = layout.positions(torch.tensor([1]), scaled_spatial=True)[0, 1:]
    assert scaled[0].tolist() == [1, 1.5, 2]  # the one cell of the coarsest scale lies in the middle of the 2 x 3 grid
    assert scaled[3:9].tolist() == [
        [1, 1 + h, 1 + w] for h in range(2) for w in range(3)
    ]  # the finest scale keeps its own
    flat = layout.positions(torch.tensor([1]), flat=True)[0]
    assert flat.tolist() == [[i, i, i] for i in range(layout.length)]
