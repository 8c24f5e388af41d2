"""Many clips in one: a row a prompt, a column a sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tokenizer.errors import UserError

GAP, LABEL, FONT_SIZE = 4, 160, 14  # pixels
MOST_PIXELS = 64 * 10**6
"""Of one frame of a grid: more would not be a picture that anybody can look at, and H.264 takes no larger ones."""


def grid(prompts: Sequence[str], rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Clips with their prompts at the left.

    Args:
        prompts: one a row.
        rows: clips of one shape, uint8 [T, H, W, 3]; as many in each row.

    Returns:
        uint8 [T, height, width, 3], with even sides.
    """
    frames, height, width = rows[0][0].shape[:3]
    tall, wide = grid_size(len(rows), len(rows[0]), height, width)
    sheet = np.full((frames, tall, wide, 3), 255, dtype=np.uint8)
    for line, (prompt, clips) in enumerate(zip(prompts, rows)):
        top = GAP + line * (height + GAP)
        sheet[:, top : top + height, GAP : GAP + LABEL] = _label(prompt, height)
        for column, clip in enumerate(clips):
            left = LABEL + 2 * GAP + column * (width + GAP)
            sheet[:, top : top + height, left : left + width] = clip
    return sheet


def grid_size(rows: int, columns: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) of the grid in pixels.

    Raises:
        UserError: it would be too large.
    """
    tall, wide = GAP + rows * (height + GAP), LABEL + 2 * GAP + columns * (width + GAP)
    tall, wide = tall + tall % 2, wide + wide % 2
    if tall * wide > MOST_PIXELS or max(tall, wide) > 16384:
        raise UserError(
            f"a grid of {rows} x {columns} clips of {height}x{width} would have {tall}x{wide} pixels: use fewer prompts or samples."
        )
    return tall, wide


def _label(text: str, height: int) -> np.ndarray:
    """Text on white, wrapped, and cut where it does not fit, uint8 [height, LABEL, 3]."""
    picture = Image.new("RGB", (LABEL, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE)
    lines = [""]
    for word in text.split()[:100]:
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font) > LABEL - GAP:
            lines.append(word)
        else:
            lines[-1] = longer
    draw.multiline_text((0, 0), "\n".join(lines), "black", font, spacing=2)
    return np.asarray(picture)
