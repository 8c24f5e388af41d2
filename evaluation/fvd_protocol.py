"""gFVD and rFVD: real videos against generated ones, or against what a tokenizer brings back of them.

videoar evaluate fvd --real UCF-101 --split ucfTrainTestlist/trainlist01.txt --generated DIR --i3d FILE --out gfvd.json
videoar evaluate fvd --real UCF-101 --split ucfTrainTestlist/testlist01.txt --tokenizer DIR --i3d FILE --out rfvd.json
python -m torch.distributed.run --nproc-per-node 8 -m videoar evaluate fvd --device cuda ...     the same result, sooner
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from data_pipelines import ucf101
from data_pipelines.clips import read_clip
from data_pipelines.decode import DecodeError, choose_decoder
from data_pipelines.probe import Rejected, probe
from data_pipelines.sampling import Start
from data_pipelines.sources import Source, find_sources, fingerprint
from evaluation.fvd import I3D, LEAST_FRAMES, FeatureStatistics, frechet_video_distance, i3d_file
from evaluation.round_trip import round_trip
from tokenizer import VideoTokenizer
from tokenizer.clip_shape import ClipShape
from tokenizer.data_parallel import Ranks, joined
from tokenizer.errors import UserError
from tokenizer.files import write_whole
from tokenizer.progress import Meter
from tokenizer.version import program_version
from tokenizer.video_metadata import read_metadata

FORMAT = 1
NO_I3D = (
    "the features of FVD come from I3D, and no file of it was named: name the torchscript file, the one that published figures use, "
    "with --i3d."
)
PROTOCOL = (
    "Frechet distance between Gaussians fitted to the 400 logits of the torchscript I3D (Kinetics-400) at 224x224, unbiased covariances, "
    "all in float64. One clip a video; FVD falls with the number of clips, so compare equal numbers, frames, sizes and splits only."
)
Statistics = tuple[FeatureStatistics, ...]


@dataclass(frozen=True)
class Clips:
    """Which clip of each video counts.

    Args:
        shape: frames and size; larger frames are scaled to cover it and cropped at the centre.
        fps: frames a second; None: every frame of the video.
        start: "random", by the seed and the video's name, or "centre".
        seed: of the starts, and of which videos are taken where not all are.
    """

    shape: ClipShape = ClipShape(128, 128, 17)
    fps: float | None = None
    start: Start = "random"
    seed: int = 0

    def choose(self, sources: Sequence[Source], count: int) -> list[Source]:
        """`count` of the videos, in their order."""
        order = np.random.default_rng(self.seed).permutation(len(sources))[:count]
        return [sources[index] for index in sorted(order)]

    def read(self, source: Source) -> np.ndarray:
        """The clip of a video, uint8 [T, H, W, 3].

        Raises:
            Rejected, DecodeError, OSError: it gives none.
        """
        info = probe(source.path, self.shape.frames)
        record = {"video": source.path.read_bytes(), "timestamps": info.timestamps, "rotation": info.rotation}
        generator = np.random.default_rng([self.seed, zlib.crc32(source.name.encode(errors="backslashreplace"))])
        decoder = choose_decoder("pyav")  # the same pixels on every machine
        shape = self.shape
        return read_clip(record, decoder, shape.frames, shape.height, shape.width, self.fps, self.start, generator)


def evaluate_fvd(
    real: str | Path,
    out: str | Path,
    i3d: str | Path | None,
    generated: str | Path | None = None,
    tokenizer: str | Path | None = None,
    splits: Sequence[str | Path] = (),
    shape: str = "128x128x17",
    fps: float | None = None,
    start: Start = "random",
    count: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    device: str = "cpu",
) -> dict[str, Any] | None:
    """Measures, or returns what `out` holds if it was measured of the same things. Every process under torchrun calls it.

    Videos go through in batches of fixed members; each batch's statistics are computed by one process and added in the batches'
    order, so any number of processes gives the same numbers, and memory does not grow with the number of videos.

    Args:
        real: UCF-101's folder, any folder of videos, or a table (see `data_pipelines.sources`).
        out: the JSON file.
        i3d: the torchscript file of I3D (`evaluation.fvd.I3D`: loading it runs its code).
        generated: gFVD: a folder that `videoar generate` wrote, or anything that `real` may be.
        tokenizer: rFVD: the tokenizer whose reconstructions of the real clips are measured.
        splits: UCF-101's lists of the real videos to take; none: all.
        shape: of the clips, HEIGHTxWIDTHxFRAMES.
        fps: of the real clips; None: every frame of the video. Generated clips are taken frame by frame.
        start: where in a longer video its clip starts.
        count: videos of each side, drawn with the seed; None: as many as both sides have.
        seed: of all that is drawn.
        batch_size: clips at once.
        device: where I3D and the tokenizer run.

    Returns:
        the result, on the first process; None on the others.

    Raises:
        UserError: a file is missing or something else, there are too few videos, or `out` holds another result.
    """
    wanted = ClipShape.parse(shape)
    if wanted.frames < LEAST_FRAMES:
        raise UserError(f"I3D needs clips of at least {LEAST_FRAMES} frames, not {wanted.frames}: ask for longer ones.")
    if batch_size < 1 or not 0 <= seed < 2**62:
        raise UserError(
            f"a batch size of {batch_size} with the seed {seed} is impossible: give 1 or more, and a seed from 0."
        )
    if (generated is None) == (tokenizer is None):
        raise UserError(
            "FVD compares with generated videos or with a tokenizer's: give one of --generated and --tokenizer."
        )
    if i3d is None:
        raise UserError(NO_I3D)
    file, out = i3d_file(i3d), Path(out)
    lists = [Path(split) for split in splits]
    clips = Clips(wanted, fps, start, seed)
    real_sources = find_sources(Path(real))[0]
    real_sources = ucf101.select(real_sources, lists) if lists else real_sources
    sides = [real_sources] if generated is None else [real_sources, find_sources(Path(generated))[0]]
    sides = [clips.choose(side, _count(count, sides)) for side in sides]
    network = None if tokenizer is None else VideoTokenizer.from_pretrained(tokenizer)
    arguments = {
        "format": FORMAT, "protocol": "gFVD" if network is None else "rFVD", "shape": wanted.name, "fps": fps, "start": start,
        "seed": seed, "batch_size": batch_size, "i3d": _digest(file), "split": ucf101.describe(lists),
        "inputs": [fingerprint(side) for side in sides], "tokenizer": network and network.fingerprint,
    }  # fmt: skip
    if (known := _known(out, arguments)) is not None:
        return known if int(os.environ.get("RANK", "0")) == 0 else None
    with joined(device) as ranks:
        detector = I3D(file, ranks.device)
        network = network and network.to(ranks.device)
        skipped: list[dict[str, str]] = []

        def features(batch: np.ndarray) -> Statistics:
            made = () if network is None else (round_trip(network, batch)[1],)
            return tuple(FeatureStatistics.of(detector(one)) for one in (batch, *made))

        parts: list[FeatureStatistics] = []
        for side, label in zip(sides, ("real", "generated")):
            own = clips if label == "real" else Clips(wanted, None, start, seed)
            unread: list[dict[str, str]] = []
            parts += statistics(side, own.read, features, batch_size, ranks, unread, f"I3D of {label} videos")
            skipped += [{"side": label, **item} for item in unread]
        if ranks.rank:
            return None
    if len(parts) < 2 or min(part.count for part in parts) < 2:
        reasons = "; ".join(f"{item['source']}: {item['reason']}" for item in skipped[:3])
        raise UserError(f"FVD needs at least 2 clips of each side ({reasons}): give longer videos, or more.")
    result = {
        "fvd": frechet_video_distance(*parts),
        "arguments": arguments,
        "explained": PROTOCOL,
        "real": {"name": Path(real).name, "clips": parts[0].count},
        "generated": {"clips": parts[1].count} | (_origin(sides[1]) if network is None else {}),
        "skipped": skipped,
        "versions": versions(),
        "device": str(ranks.device),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, json.dumps(result, indent=1))
    return result


def statistics(
    sources: Sequence[Source],
    read: Callable[[Source], np.ndarray],
    features: Callable[[np.ndarray], Statistics],
    batch_size: int,
    ranks: Ranks,
    skipped: list[dict[str, str]],
    label: str,
) -> list[FeatureStatistics]:
    """Statistics of videos, the same for any number of processes; every process calls it.

    Args:
        sources: the videos.
        read: gives a video's clip.
        features: statistics of a batch of clips, one or several of them.
        batch_size: batch i holds the readable ones of videos i * batch_size to (i + 1) * batch_size - 1.
        ranks: this process.
        skipped: on the first process videos that give no clip are added here.
        label: for the progress.

    Returns:
        the sums, on the first process; [] on the others, or where no video can be read.
    """
    total: list[FeatureStatistics] = []
    meter = Meter(label, len(sources)) if ranks.rank == 0 else None
    for start in range(0, len(sources), batch_size * ranks.size):
        first = start + batch_size * ranks.rank
        mine = _batch(sources[first : first + batch_size], read, features)
        parts: list[Any] | None = [None] * ranks.size if ranks.rank == 0 else None
        if ranks.size > 1:
            dist.gather_object(mine, parts, dst=0)
        else:
            parts = [mine]
        for found, unread in parts or ():
            skipped += unread
            if found:
                total = [one + other for one, other in zip(total, found)] if total else list(found)
        if meter is not None:
            meter.advance(min(batch_size * ranks.size, len(sources) - start))
    return total


def _batch(
    sources: Sequence[Source], read: Callable[[Source], np.ndarray], features: Callable[[np.ndarray], Statistics]
) -> tuple[Statistics, list[dict[str, str]]]:
    clips, skipped = [], []
    for source in sources:
        try:
            clips.append(read(source))
        except (Rejected, DecodeError, OSError) as error:
            skipped.append({"source": source.name, "reason": str(error)})
    return features(np.stack(clips)) if clips else (), skipped


def summary(result: dict[str, Any]) -> str:
    """One line for a terminal."""
    arguments = result["arguments"]
    split = " + ".join(item["list"] for item in arguments["split"]) or "all videos"
    left_out = f"; {len(result['skipped'])} videos give no clip" if result["skipped"] else ""
    counts = (
        f"{result['real']['clips']} real and {result['generated']['clips']} generated clips of {arguments['shape']}"
    )
    return f"{arguments['protocol']} {result['fvd']:.2f}: {counts}, {split}, seed {arguments['seed']}{left_out}"


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    names = ("torch", "numpy", "av")
    return {
        "program": program_version(),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def _count(count: int | None, sides: Sequence[Sequence[Source]]) -> int:
    most = min(len(side) for side in sides)
    if count is not None and not 2 <= count <= most:
        raise UserError(f"{count} clips of each side were asked for, of {most} that there are: ask for 2 to {most}.")
    return most if count is None else count


def _origin(sources: Sequence[Source]) -> dict[str, Any]:
    """What generated videos say about themselves: prompts and seeds in the files' order, their models, and the first file's own words."""
    said = []
    for source in sources:
        try:
            said.append(read_metadata(source.path))
        except UserError:  # of another program
            said.append({})
    return {
        "files": [source.name for source in sources],
        "prompts": [source.caption for source in sources],
        "seeds": [one.get("seed") for one in said],
        "models": sorted({one["model"] for one in said if "model" in one}),
        "first": said[0],
    }


def _known(out: Path, arguments: dict[str, Any]) -> dict[str, Any] | None:
    if not out.exists():
        return None
    try:
        result = json.loads(out.read_text())
        same = result["arguments"] == json.loads(json.dumps(arguments))
    except (ValueError, KeyError, TypeError, OSError):
        raise UserError(f"{out} is there already and holds no FVD: name another file.") from None
    if not same:
        raise UserError(f"{out} holds the FVD of something else: delete it or name another file.")
    print(f"{out} was measured already, of the same videos", file=sys.stderr)
    return result


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
