"""How well a tokenizer brings videos back: PSNR, SSIM, LPIPS, rFVD and the use of its bits, overall and by size.

videoar evaluate reconstruction --tokenizer DIR --videos CSV --out DIR --variants 64x64x17,128x128x17
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipelines.moving_shapes import parse_caption
from data_pipelines.sources import find_sources, fingerprint
from evaluation.bit_usage import BitUsage
from evaluation.fidelity import SquaredError, psnr_summary, squared_error, ssim
from evaluation.fvd import I3D, LEAST_FRAMES, FeatureStatistics, frechet_video_distance, i3d_file
from evaluation.reconstruction_figure import write_figure
from evaluation.round_trip import Clip, Skipped, first_reasons, in_batches, read_clips, round_trip
from evaluation.shapes import moving_foreground
from evaluation.tables import markdown_table
from tokenizer import VideoTokenizer
from tokenizer.clip_shape import ClipShape
from tokenizer.errors import UserError
from tokenizer.perceptual import Perceptual, weights_file
from tokenizer.pixels import from_pixels
from tokenizer.progress import Meter
from tokenizer.receipts import finished, new_folder
from tokenizer.video_file import write_video

FORMAT = 2
RESULT, FIGURE, TABLE = "reconstruction.json", "reconstruction.png", "reconstructed.csv"
PROTOCOL = (
    "PSNR in dB of pixel values 0-255 rounded to whole numbers, before any video compression of the reconstruction, "
    "against the decoded originals. psnr: the mean over clips of each clip's own PSNR (from its mean squared error over all "
    "frames, pixels and channels); psnr_pooled: of the mean squared error over all clips. The *_foreground values take only "
    "the moving shape's own pixels, found in the original; clips without one do not count there."
)
PROTOCOLS = {
    "ssim": "The mean over clips, frames, channels and places; Gaussian windows of 11 pixels, sigma 1.5, mirrored at the edges.",
    "lpips": "AlexNet, calibrated; the mean over clips of the mean over frames; frames below 32 pixels a side are enlarged.",
    "rfvd": (
        "Between originals at the size of the clips and their reconstructions, rfvd_clips of each; 400 features of the torchscript "
        "I3D at 224x224, unbiased covariances. It falls with the number of clips: compare equal numbers, frames and splits only. "
        "Overall: the clips of all sizes pooled."
    ),
    "bits": (
        "share of ones, and entropy in bits, of each bit on each scale, over all tokens (their number stands beside); dead: ones in "
        "less than 1% or more than 99% of the tokens. Overall: scales of different sizes pooled by their number, coarse to fine."
    ),
}
NO_I3D = "rFVD needs the features of I3D, which no file was named for: name the torchscript file with --i3d."


def evaluate_reconstruction(
    tokenizer_dir: str | Path,
    videos: str | Path,
    out: str | Path,
    variants: Sequence[str] = ("64x64x17",),
    lpips_weights: str | Path | None = None,
    i3d: str | Path | None = None,
    batch_size: int = 8,
    device: str = "cpu",
) -> dict[str, Any]:
    """Encodes and decodes videos and measures, or returns what `out` holds if it was made from the same things.

    `out` then holds an mp4 a clip, reconstructed.csv (path, original, caption, variant), reconstruction.json (what is returned) and
    reconstruction.png; it appears under its name when it is whole. Videos that give no such clip are skipped and listed with
    their reason.

    Args:
        tokenizer_dir: what `VideoTokenizer.from_pretrained` reads.
        videos: a CSV with the columns path and caption, a folder of videos, or one video.
        out: the folder to make.
        variants: sizes of the clips, each HEIGHTxWIDTHxFRAMES, from the middle of each video; each is a bucket of its own.
        lpips_weights: a file with AlexNet's weights; None: where torch.hub keeps them, and no LPIPS where they are not.
        i3d: the torchscript file of I3D (`evaluation.fvd.I3D`: loading it runs its code); None: no rFVD.
        batch_size: clips at once.
        device: where to run.

    Returns:
        the measures over all clips, {"clips", "psnr", "psnr_pooled", "psnr_foreground", "psnr_foreground_pooled": dB or None,
        "ssim", "lpips", "lpips_missing", "rfvd", "rfvd_clips", "rfvd_missing", "bits": `BitUsage.report`}, and "buckets": the same for
        each variant, with its scales as "schedule"; "protocol", "protocols", "each": [{"path", "variant", "psnr",
        "psnr_foreground", "ssim", "lpips"}], "skipped": [{"source", "reason", "variant"}]. Where lpips or rfvd is None a sentence
        under *_missing says why. The foreground is measured where the caption is one of the moving shapes.

    Raises:
        UserError: no tokenizer, no videos, an impossible clip shape, a file that was named is missing or is something else, or `out`
            holds something else.
    """
    wanted = [ClipShape.parse(name) for name in variants]
    if not wanted or len(set(wanted)) < len(wanted):
        raise UserError(f"the variants {', '.join(variants)} are empty or repeat themselves: name each size once.")
    if batch_size < 1:
        raise UserError(f"a batch size of {batch_size} is impossible: give 1 or more.")
    videos, out = Path(videos), Path(out)
    sources, _ = find_sources(videos)
    tokenizer = VideoTokenizer.from_pretrained(tokenizer_dir, device)
    backbone, lpips_missing = _backbone(lpips_weights)
    detector = None if i3d is None else i3d_file(i3d)
    arguments = {
        "kind": "reconstructions", "format": FORMAT, "tokenizer": tokenizer.fingerprint, "input": fingerprint(sources),
        "variants": [variant.name for variant in wanted], "batch_size": batch_size,
        "lpips": backbone and _digest(backbone), "i3d": detector and _digest(detector),
    }  # fmt: skip
    if finished(out, arguments) is not None:
        return json.loads((out / RESULT).read_text())
    for sentence in (lpips_missing, NO_I3D if detector is None else None):
        if sentence:
            print(f"not measured: {sentence}", file=sys.stderr)
    measure = _Measure(
        Perceptual("alex", backbone).to(device) if backbone else None, I3D(detector, device) if detector else None
    )
    buckets: dict[str, _Bucket] = {}
    rows: list[dict[str, str]] = []
    skipped: list[dict[str, str]] = []
    with (
        new_folder(out, arguments) as (folder, receipt),
        Meter("reconstructing", len(sources) * len(wanted)) as meter,
    ):
        for variant in wanted:
            bucket = buckets[variant.name] = _Bucket()
            left_out: list[Skipped] = []
            clips = read_clips(sources, _always(variant), left_out, variant.frames)
            for batch in in_batches(clips, batch_size):
                others = measure(tokenizer, batch, bucket)
                for clip, other in zip(batch, others):
                    name = f"{len(rows):05d}.mp4"
                    write_video(other, folder / name, clip.info.fps)
                    # relative: a run can be moved as a whole
                    original = os.path.relpath(clip.source.path.resolve(), out.resolve())
                    rows.append(
                        {"path": name, "original": original, "caption": clip.source.caption, "variant": variant.name}
                    )
                done = len(rows) + len(skipped) + len(left_out)
                meter.advance(done - meter.done, f"psnr {bucket.whole[-1].psnr:.2f} dB")
            skipped += [{**asdict(item), "variant": variant.name} for item in left_out]
        if not rows:
            reasons = first_reasons([Skipped(item["source"], item["reason"]) for item in skipped])
            raise UserError(
                f"no video of {videos} gives a clip of {', '.join(arguments['variants'])} ({reasons}): ask for fewer frames or give "
                "longer videos."
            )
        _write_rows(folder / TABLE, rows)
        result = _result(rows, buckets, skipped, lpips_missing, detector is not None)
        for name, values in result["buckets"].items():
            values["schedule"] = tokenizer.schedule_for(
                ClipShape.parse(name).height, ClipShape.parse(name).width
            ).to_list()
        result["tokenizer"] = tokenizer.fingerprint
        (folder / RESULT).write_text(json.dumps(result, indent=1))
        write_figure(result, folder / FIGURE)
        receipt["clips"] = len(rows)
    return result


def summary(result: dict[str, Any]) -> str:
    """The measures by size and overall as a readable table, and what was not measured."""
    titles = ("size", "clips", "PSNR, dB", "SSIM", "LPIPS", "rFVD", "bits used a token", "dead bits")
    lines = []
    everything = [("all", result)] if len(result["buckets"]) > 1 else []
    for name, values in [*result["buckets"].items(), *everything]:
        bits = values["bits"]
        cells = [_number(values[key], digits) for key, digits in (("psnr", 2), ("ssim", 4), ("lpips", 4), ("rfvd", 1))]
        used = "-" if bits is None else f"{np.mean(bits['entropy_mean']) * bits['dim']:.1f} of {bits['dim']}"
        dead = "-" if bits is None else f"{bits['dead_bits']} of {bits['dim'] * len(bits['tokens'])}"
        lines.append((name, str(values["clips"]), *cells, used, dead))
    text = markdown_table(titles, lines)
    text += "\nBits used: the sum of the entropies of a token's bits, the mean over scales. Dead: the same value in over 99% of tokens.\n"
    for reason in (result["lpips_missing"], result["rfvd_missing"]):
        text += f"Not measured: {reason}\n" if reason else ""
    if result["skipped"]:
        first = result["skipped"][0]
        text += f"{len(result['skipped'])} skipped, the first: {first['source']}: {first['reason']}.\n"
    return text


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


@dataclass
class _Bucket:
    """What was measured of the clips of one size, or of several added up."""

    whole: list[SquaredError] = field(default_factory=list)
    foreground: list[SquaredError] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    lpips: list[float] = field(default_factory=list)
    bits: BitUsage | None = None
    real: FeatureStatistics | None = None
    made: FeatureStatistics | None = None

    def add(self, other: _Bucket) -> None:
        """Appends the clips of another one."""
        self.whole += other.whole
        self.foreground += other.foreground
        self.ssim += other.ssim
        self.lpips += other.lpips
        self.bits = _sum(self.bits, other.bits)
        self.real, self.made = _sum(self.real, other.real), _sum(self.made, other.made)


def _sum(one: Any, other: Any) -> Any:
    """one + other, where None is nothing."""
    return one + other if one is not None and other is not None else (other if one is None else one)


@dataclass(frozen=True)
class _Measure:
    """Takes clips through the tokenizer and measures them with what is at hand."""

    perceptual: Perceptual | None
    i3d: I3D | None

    def __call__(self, tokenizer: VideoTokenizer, batch: list[Clip], bucket: _Bucket) -> np.ndarray:
        """Adds clips of one shape to a bucket; gives their reconstructions, uint8 [B, T, H, W, 3]."""
        originals = np.stack([clip.frames for clip in batch])  # [B, T, H, W, 3]
        codes, others = round_trip(tokenizer, originals)
        new = _Bucket(bits=BitUsage.of(codes))
        for clip, other in zip(batch, others):
            mask = moving_foreground(clip.frames) if _is_moving_shape(clip.source.caption) else None
            new.whole.append(squared_error(clip.frames, other))
            new.foreground.append(SquaredError() if mask is None else squared_error(clip.frames, other, mask))
            new.ssim.append(ssim(clip.frames, other))
            if self.perceptual is not None:
                new.lpips.append(self._distance(clip.frames, other))
        if self.i3d is not None and originals.shape[1] >= LEAST_FRAMES:
            new.real, new.made = (FeatureStatistics.of(self.i3d(clips)) for clips in (originals, others))
        bucket.add(new)
        return others

    @torch.no_grad()
    def _distance(self, original: np.ndarray, other: np.ndarray) -> float:
        # a clip at a time: its frames are a batch of their own
        assert self.perceptual is not None
        device = next(self.perceptual.parameters()).device
        return self.perceptual(from_pixels(other[None], device), from_pixels(original[None], device)).item()


def _result(
    rows: list[dict[str, str]],
    buckets: dict[str, _Bucket],
    skipped: list[dict[str, str]],
    lpips_missing: str | None,
    has_i3d: bool,
) -> dict[str, Any]:
    everything = _Bucket()
    for bucket in buckets.values():
        everything.add(bucket)
    each = [
        {
            "path": row["path"],
            "variant": row["variant"],
            "psnr": whole.psnr,
            "psnr_foreground": foreground.psnr if foreground.count else None,
            "ssim": similarity,
            "lpips": everything.lpips[i] if everything.lpips else None,
        }
        for i, (row, whole, foreground, similarity) in enumerate(
            zip(rows, everything.whole, everything.foreground, everything.ssim)
        )
    ]
    return {
        **_measures(everything, lpips_missing, has_i3d),
        "protocol": PROTOCOL,
        "protocols": PROTOCOLS,
        "buckets": {name: _measures(bucket, lpips_missing, has_i3d) for name, bucket in buckets.items()},
        "each": each,
        "skipped": skipped,
    }


def _measures(bucket: _Bucket, lpips_missing: str | None, has_i3d: bool) -> dict[str, Any]:
    psnr, psnr_pooled = psnr_summary(bucket.whole)
    psnr_foreground, psnr_foreground_pooled = psnr_summary(bucket.foreground)
    rfvd_clips = 0 if bucket.real is None else bucket.real.count
    rfvd_missing = None
    if not has_i3d:
        rfvd_missing = NO_I3D
    elif rfvd_clips < 2:
        rfvd_missing = f"rFVD needs at least 2 clips of at least {LEAST_FRAMES} frames, not {rfvd_clips}: give more videos or longer clips."
    return {
        "clips": len(bucket.whole),
        "psnr": psnr,
        "psnr_pooled": psnr_pooled,
        "psnr_foreground": psnr_foreground,
        "psnr_foreground_pooled": psnr_foreground_pooled,
        "clips_with_foreground": sum(error.count > 0 for error in bucket.foreground),
        "ssim": float(np.mean(bucket.ssim)) if bucket.ssim else None,
        "lpips": float(np.mean(bucket.lpips)) if bucket.lpips else None,
        "lpips_missing": lpips_missing,
        "rfvd": None if rfvd_missing else frechet_video_distance(bucket.real, bucket.made),  # type: ignore[arg-type]
        "rfvd_clips": rfvd_clips,
        "rfvd_missing": rfvd_missing,
        "bits": bucket.bits and bucket.bits.report(),
    }


def _always(variant: ClipShape) -> Callable[[Any], ClipShape]:
    return lambda _: variant


def _backbone(weights: str | Path | None) -> tuple[Path | None, str | None]:
    """The file of LPIPS's backbone, or why there is none; a file that was named must be there."""
    try:
        return weights_file("alex", weights), None
    except UserError as error:
        if weights is not None:
            raise
        return None, f"{str(error).rstrip('.')} with --lpips-weights."


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]


def _write_rows(file: Path, rows: list[dict[str, str]]) -> None:
    with open(file, "w", newline="") as lines:
        writer = csv.DictWriter(lines, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _is_moving_shape(caption: str) -> bool:
    try:
        parse_caption(caption)
    except UserError:
        return False
    return True
