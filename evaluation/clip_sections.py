"""The sections of a report that show clips: generated ones, ones that go on from given frames, and reconstructions."""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np

from data_pipelines.moving_shapes import parse_caption
from evaluation.html_parts import Section, image, missing, section, video
from evaluation.media import beside, enlarge, first_of_each_caption, frame_border, read_video
from evaluation.metrics import RunFolder
from evaluation.shapes import ATTRIBUTES, measure
from evaluation.videos import read_table
from tokenizer.errors import UserError

GENERATED, PAIRS = 24, 8
GIVEN_COLOUR, MADE_COLOUR = (245, 158, 11), (59, 130, 246)  # as --given and --made in the page's style
BORDER = 6  # pixels, after enlarging
STRIP_FRAMES = 9


def generated_section(run: RunFolder) -> Section:
    """Clips of held-out prompts with what the ruler read; the first clip of each prompt."""
    anchor, title = "generated", "Generated clips"
    table = run.path / "samples" / "prompts" / "prompts.csv"
    if not table.is_file():
        return section(anchor, title, missing("No clip was generated from a prompt."))
    rows = read_table(table)
    shown = first_of_each_caption(rows, GENERATED)
    cards = "".join(_generated(row) for row in shown)
    prompts = len({row["caption"] for row in rows})
    text = (
        f"<p>{len(shown)} of {len(rows)} clips for {prompts} prompts, none of which is the caption of a training clip: the first "
        "of each prompt, not chosen by looks. Below each one stands what the ruler read in it, green where the prompt says so too.</p>"
    )
    return section(anchor, title, f'{text}<div class="grid clips">{cards}</div>')


def _generated(row: dict[str, str]) -> str:
    caption = row["caption"]
    try:
        frames, fps = read_video(Path(row["path"]))
    except UserError as error:
        return _broken(caption, error)
    seed = f' <span class="note">seed {escape(row["seed"])}</span>' if row.get("seed") else ""
    return (
        f'<figure class="clip">{video(enlarge(frames), fps, caption)}<figcaption><strong>{escape(caption)}</strong>{seed}'
        f"{_reading(frames, caption)}</figcaption></figure>"
    )


def _reading(frames: np.ndarray, caption: str) -> str:
    try:
        truth = parse_caption(caption)
    except UserError:  # another corpus: there is nothing to read
        return ""
    reading = measure(frames)
    chips = ""
    for name in ATTRIBUTES:
        read, right = getattr(reading, name), getattr(reading, name) == getattr(truth, name)
        mark, kind = ("✓", "yes") if right else ("✗", "no")
        chips += f'<span class="chip {kind}" title="{name}">{mark} {escape(read or f"no {name}")}</span>'
    return f'<div class="chips">{chips}</div>'


def given_section(run: RunFolder, given_frames: int | None) -> Section:
    """Image-to-video and continuation samples, the given part marked.

    Args:
        run: the run.
        given_frames: of the continuations; None: the pipeline's default.
    """
    anchor, title = "given", "From given frames"
    real = _first_validation_clip(run)
    parts = ""
    for name, kind in (("image_to_video", "Image to video"), ("continuation", "Continuation")):
        single = run.path / "samples" / f"{name}.mp4"
        files = [single] if single.is_file() else sorted((run.path / "samples" / name).glob("*.mp4"))
        files = [file for file in files if file.name != "given.mp4"]
        for file in files:
            parts += _continued(file, kind, 1 if name == "image_to_video" else given_frames, real)
        if not files:
            parts += f"<figure><strong>{kind}</strong>{missing('No clip was made.')}</figure>"
    text = (
        "<p>The model also goes on from an image or from the beginning of a video, here of a clip that no training saw. "
        '<span class="key" style="background:var(--given)"></span>Frames that were given, as the tokenizer brings them back; '
        '<span class="key" style="background:var(--made)"></span>frames that the model made.</p>'
    )
    return section(anchor, title, f'{text}<div class="grid samples">{parts}</div>')


def _first_validation_clip(run: RunFolder) -> tuple[np.ndarray, str] | None:
    """The clip, and its caption, that the demo takes the given frames from."""
    try:
        row = read_table(run.path / "corpus" / "validation.csv")[0]
        return read_video(Path(row["path"]))[0], row["caption"]
    except UserError:
        return None


def _continued(file: Path, kind: str, given: int | None, real: tuple[np.ndarray, str] | None) -> str:
    try:
        frames, fps = read_video(file)
    except UserError as error:
        return _broken(kind, error)
    if given is None:
        given = 1 + (len(frames) - 1) // 8 * 4  # 1 + 4n, at most half of the clip and one frame
    big = enlarge(frames)
    marked = np.concatenate(
        [frame_border(big[:given], GIVEN_COLOUR, BORDER), frame_border(big[given:], MADE_COLOUR, BORDER)]
    )
    caption = ""
    shown, sides = marked, ""
    if real is not None:
        caption = f": “{escape(real[1])}”"
        if real[0].shape == frames.shape:
            grey = frame_border(enlarge(real[0]), (128, 128, 128), BORDER)
            shown, sides = beside(grey, marked), " Left the real clip, right the sample."
    picked = np.unique(np.linspace(0, len(frames) - 1, STRIP_FRAMES).round().astype(int))
    strip = np.concatenate(list(marked[picked]), axis=1)
    numbers = f"frames {', '.join(str(i + 1) for i in picked)} of {len(frames)}"
    count = "1 frame" if given == 1 else f"{given} frames"
    return (
        f"<figure>{video(shown, fps, kind)}<div class='strip'>{image(strip, f'{kind}: {numbers}')}</div>"
        f"<figcaption><strong>{kind}</strong>{caption}. {count} given, {len(frames) - given} made.{sides} "
        f"Below: {numbers}.</figcaption></figure>"
    )


def reconstruction_section(run: RunFolder) -> Section:
    """Originals beside what the tokenizer makes of them."""
    anchor, title = "reconstructions", "Reconstructions"
    table = run.path / "reconstructions" / "reconstructed.csv"
    result = run.json("reconstructions/reconstruction.json")
    if result is None or not table.is_file():
        return section(anchor, title, missing("The tokenizer was not measured on held-out clips."))
    rows = read_table(table)
    picked = np.unique(np.linspace(0, len(rows) - 1, PAIRS).round().astype(int))
    cards = "".join(_pair(table.parent, rows[i], result["each"][i]) for i in picked)
    text = (
        f"<p>Clips that no training saw (left) and what remains of them after the tokenizer has turned them into bits and back "
        f"(right); {len(picked)} of {len(rows)}, evenly spaced in the list. Over all {result['clips']} clips: "
        f"{_both(result)}.</p><p class='note'>{escape(result['protocol'])}</p>"
    )
    skipped = result.get("skipped") or []
    if skipped:
        text += f"<p class='note'>{len(skipped)} videos were skipped, the first because of: {escape(skipped[0]['reason'])}.</p>"
    return section(anchor, title, f'{text}<div class="grid pairs">{cards}</div>')


def _pair(folder: Path, row: dict[str, str], values: dict) -> str:
    try:
        other, fps = read_video(Path(row["path"]))
        original = read_video(folder / row["original"])[0]
    except UserError as error:
        return _broken(row["caption"], error)
    start = (len(original) - len(other)) // 2  # the middle of a longer video
    original = original[start : start + len(other)]
    clips = (original, other) if original.shape == other.shape else (other,)
    return (
        f'<figure class="clip">{video(beside(*(enlarge(clip) for clip in clips)), fps, row["caption"])}'
        f"<figcaption><strong>{escape(row['caption'])}</strong><br>{_both(values)}</figcaption></figure>"
    )


def _both(values: dict) -> str:
    text = f"PSNR {values['psnr']:.1f} dB"
    if values["psnr_foreground"] is not None:
        text += f", the shape's own pixels {values['psnr_foreground']:.1f} dB"
    return text


def _broken(caption: str, error: UserError) -> str:
    return f'<figure class="clip"><strong>{escape(caption)}</strong><p class="note">{escape(str(error))}</p></figure>'
