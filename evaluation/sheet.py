"""A contact sheet of generated clips: a row a prompt, a column a moment."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evaluation.media import enlarge, first_of_each_caption, read_video
from evaluation.videos import read_table
from tokenizer.errors import UserError

SIDE = 128  # pixels of a frame, for clips up to that size
GAP, TEXT_WIDTH, FONT_SIZE = 6, 190, 19
PAPER, INK = (255, 255, 255), (28, 29, 32)


def write_sheet(table: str | Path, out: str | Path, rows: int = 6, frames: int = 6) -> Path:
    """Draws the first clip of some prompts, each with its prompt beside it.

    Args:
        table: a CSV with the columns path and caption.
        out: the PNG to write; it appears whole or not at all.
        rows: prompts, evenly spaced in the order of the table.
        frames: moments of each clip, evenly spaced from its first frame to its last.

    Raises:
        UserError: there are no clips, or one can't be read.
    """
    if rows < 1 or frames < 1:
        raise UserError(f"a sheet of {rows} rows and {frames} frames is impossible: give 1 or more of both.")
    listed = read_table(Path(table))
    prompts = first_of_each_caption(listed, len({row["caption"] for row in listed}))
    picked = [prompts[i] for i in np.unique(np.linspace(0, len(prompts) - 1, rows).round().astype(int))]
    strips = [_strip(Path(row["path"]), frames) for row in picked]
    height = sum(strip.shape[0] + GAP for strip in strips) + GAP
    width = TEXT_WIDTH + max(strip.shape[1] for strip in strips) + GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_SIZE)
    top = GAP
    for row, strip in zip(picked, strips):
        sheet.paste(Image.fromarray(strip), (TEXT_WIDTH, top))
        text = _wrapped(row["caption"], draw, font)
        draw.multiline_text((2 * GAP, top + strip.shape[0] / 2), text, INK, font, anchor="lm", spacing=5)
        top += strip.shape[0] + GAP
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{uuid.uuid4().hex}.png")
    try:
        sheet.save(temporary, "PNG", optimize=True)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return out


def _strip(file: Path, count: int) -> np.ndarray:
    """Frames of a clip side by side, uint8 [H, W, 3]."""
    clip = read_video(file)[0]
    chosen = enlarge(clip[np.linspace(0, len(clip) - 1, count).round().astype(int)], SIDE)
    between = np.full((chosen.shape[1], GAP, 3), PAPER, dtype=np.uint8)
    parts = [part for frame in chosen for part in (between, frame)]
    return np.concatenate(parts[1:], axis=1)


def _wrapped(text: str, draw: ImageDraw.ImageDraw, font) -> str:
    """Lines that fit beside the frames."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font) > TEXT_WIDTH - 3 * GAP:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
