"""Originals beside what a tokenizer makes of them, as videos and as a table: to look at.

    videoar tokenizer reconstruct --tokenizer DIR --videos FILE_OR_FOLDER_OR_CSV --out DIR

Scores of a tokenizer over many videos are another command, `videoar evaluate reconstruction`.
"""

from __future__ import annotations

import csv
import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from data_pipelines.probe import VideoInfo
from data_pipelines.sources import find_sources, fingerprint
from evaluation.fidelity import squared_error, ssim
from evaluation.media import beside
from evaluation.round_trip import Clip, Skipped, first_reasons, read_clips, round_trip
from evaluation.tables import markdown_table
from tokenizer import VideoTokenizer
from tokenizer.clip_shape import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, ClipShape, check_num_frames, check_size
from tokenizer.errors import UserError
from tokenizer.progress import Meter
from tokenizer.receipts import finished, new_folder
from tokenizer.video_file import write_video

FORMAT = 1
TABLE, READABLE = "table.csv", "table.md"
MOST_FRAMES = 65  # the paper's longest clips: longer ones no tokenizer has seen
MOST_PIXELS = (
    MOST_FRAMES * 384 * 672
)  # of a whole clip, the paper's largest: all of it is in memory at once, at the network's width
VISUALLY_LOSSLESS = 12  # the side-by-side video must not add errors that one sees
NOTE = (
    "PSNR (dB) and SSIM compare whole pixel values before any video compression. Code bytes: the packed bits of this clip. Bits a "
    "pixel: of the codes, and of the source file as it is on disk (its whole length at its own size, sound included)."
)


@dataclass(frozen=True)
class Row:
    """A line of table.csv; of a skipped video only `name` and `skipped` are filled.

    Attributes:
        name: the video's path within the input.
        file: the side-by-side video.
        frames, height, width: of the clip that was coded.
        fps: of the side-by-side video, the source's.
        psnr: dB.
        ssim: at most 1.
        code_bytes: of the clip's packed bits.
        bits_per_pixel: of the codes: bits over frames * height * width.
        source_bits_per_pixel: the same of the source file, at its own length and size.
        skipped: why there is no reconstruction.
    """

    name: str
    file: str = ""
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    code_bytes: int | None = None
    bits_per_pixel: float | None = None
    source_bits_per_pixel: float | None = None
    skipped: str = ""


def reconstruct(
    tokenizer_dir: str | Path,
    videos: str | Path,
    out: str | Path,
    size: int | None = None,
    num_frames: int | None = None,
    device: str = "cpu",
) -> str:
    """Encodes and decodes videos, or reads what `out` holds if it was made from the same videos and tokenizer.

    `out` then holds an mp4 a video (original left, reconstruction right), table.csv (`Row`) and table.md; it appears under its name
    when it is whole. Videos that can't be used are skipped and listed with their reason.

    Args:
        tokenizer_dir: what `VideoTokenizer.from_pretrained` reads.
        videos: a video file, a folder of videos, or a CSV with the columns path and caption.
        out: the folder to make.
        size: height and width of every clip, a multiple of 16; None: `own_shape`.
        num_frames: 1+4n, from the middle of each video; None: `own_shape`.
        device: where to run.

    Returns:
        the text of table.md.

    Raises:
        UserError: no tokenizer, no videos, an impossible clip shape, or `out` holds something else.
    """
    if size is not None:
        check_size(size, size)
    if num_frames is not None:
        check_num_frames(num_frames)
    videos, out = Path(videos), Path(out)
    sources, _ = find_sources(videos)
    tokenizer = VideoTokenizer.from_pretrained(tokenizer_dir, device)
    arguments = {
        "kind": "side by side", "format": FORMAT, "tokenizer": tokenizer.fingerprint, "input": fingerprint(sources),
        "size": size, "num_frames": num_frames,
    }  # fmt: skip
    if finished(out, arguments) is not None:
        return (out / READABLE).read_text()

    def shape(info: VideoInfo) -> ClipShape:
        return own_shape(info, size, num_frames)

    rows: list[Row] = []
    skipped: list[Skipped] = []
    with new_folder(out, arguments) as (folder, receipt), Meter("reconstructing", len(sources)) as meter:
        for clip in read_clips(sources, shape, skipped, num_frames or 1):
            rows.append(_write(tokenizer, clip, folder, len(rows)))
            meter.advance(len(rows) + len(skipped) - meter.done, f"psnr {rows[-1].psnr:.2f} dB")
        if not rows:
            raise UserError(
                f"no video of {videos} can be reconstructed ({first_reasons(skipped)}): give videos that can be decoded and are long "
                "enough."
            )
        _write_table(folder / TABLE, [*rows, *(Row(item.source, skipped=item.reason) for item in skipped)])
        text = _readable(rows, skipped)
        (folder / READABLE).write_text(text)
        receipt["clips"] = len(rows)
    return text


def own_shape(info: VideoInfo, size: int | None = None, num_frames: int | None = None) -> ClipShape:
    """The shape at which a video is coded.

    Each side is the nearest multiple of 16 (halves up, at least 16), so that the aspect ratio is the video's own but for less than 8
    pixels a side. Frames are the longest 1+4n that the video has, at most 65, and fewer where they are so large that the clip would
    have more pixels than 65 frames of 384x672.

    Args:
        info: of the video.
        size: height and width, instead of its own.
        num_frames: instead of its own.
    """
    height, width = (size, size) if size else (_nearest(info.height), _nearest(info.width))
    most = min(info.frames, MOST_FRAMES, max(1, MOST_PIXELS // (height * width)))
    return ClipShape(height, width, num_frames or 1 + (most - 1) // TEMPORAL_COMPRESSION * TEMPORAL_COMPRESSION)


def _nearest(side: int) -> int:
    return max(1, (side + SPATIAL_COMPRESSION // 2) // SPATIAL_COMPRESSION) * SPATIAL_COMPRESSION


def _write(tokenizer: VideoTokenizer, clip: Clip, folder: Path, number: int) -> Row:
    codes, others = round_trip(tokenizer, clip.frames[None])
    original, other = clip.frames, others[0]
    # the number makes it unique, the video's own name finds it
    name = f"{number:05d}_{re.sub(r'[^A-Za-z0-9._-]+', '_', clip.source.path.stem)[:60]}.mp4"
    write_video(beside(original, other), folder / name, clip.info.fps, VISUALLY_LOSSLESS)
    frames, height, width = original.shape[:3]
    bits = codes.tokens()[0].numel()
    info = clip.info
    return Row(
        name=clip.source.name,
        file=name,
        frames=frames,
        height=height,
        width=width,
        fps=info.fps,
        psnr=squared_error(original, other).psnr,
        ssim=ssim(original, other),
        code_bytes=math.ceil(bits / 8),
        bits_per_pixel=bits / (frames * height * width),
        source_bits_per_pixel=8 * clip.source.path.stat().st_size / (info.frames * info.height * info.width),
    )


def _write_table(file: Path, rows: list[Row]) -> None:
    with open(file, "w", newline="") as lines:
        writer = csv.DictWriter(lines, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def _readable(rows: list[Row], skipped: list[Skipped]) -> str:
    titles = ("name", "frames", "size", "PSNR, dB", "SSIM", "code bytes", "bits a pixel", "source's bits a pixel")
    lines = [
        (row.name, f"{row.frames}", f"{row.height}x{row.width}", f"{row.psnr:.2f}", f"{row.ssim:.4f}", f"{row.code_bytes}",
         f"{row.bits_per_pixel:.4f}", f"{row.source_bits_per_pixel:.4f}")
        for row in rows
    ]  # fmt: skip
    if len(rows) > 1:
        mean = {key: np.mean([getattr(row, key) for row in rows]) for key in ("psnr", "ssim")}
        lines.append((f"mean of {len(rows)}", "", "", f"{mean['psnr']:.2f}", f"{mean['ssim']:.4f}", "", "", ""))
    text = markdown_table(titles, lines) + f"\n{NOTE}\n"
    if skipped:
        text += f"\n{len(skipped)} skipped:\n\n" + "".join(f"- {item.source}: {item.reason}\n" for item in skipped)
    return text
