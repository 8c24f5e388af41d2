"""Data: clip loader against bare decoding, code loader against training, bytes a latent frame, Ray actors and what they cost.

    python -m benchmarks.data --keep          some four minutes on 2 cores

clip_loader_ratio         clips a second of `ClipDataset` (read, decode, scale, stack) over those of PyAV decoding the same frames and doing
                          nothing with them; one thread each, by turns, 320x240 and 1280x720 H.264
code_loader_ratio         tokens a second of `CodeStream` in this process over those that the demo's training consumes (its network,
                          forward, backward and update, on one process with as many threads as the machine has cores)
bytes_per_latent_frame    of code shards without latents and text features: 8x8 tokens, K = 6, d = 48
two_actor_speedup         clips a second with two encoding actors over one, one thread each; start-up taken off by the difference of a
                          long and a short run
orchestration_share       of an encoding worker's time on a shard of 256 clips: what is neither decoding nor the tokenizer's forward pass
                          (Ray's own part shows in the speedup)
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from streaming import MDSWriter

from benchmarks.report import hardware, report
from benchmarks.timing import best, by_turns
from benchmarks.training import BITS, Training, clips, network
from data_pipelines import encode_worker
from data_pipelines.clips import ClipDataset
from data_pipelines.code_stream import CodeStream, Source
from data_pipelines.codes import MANIFEST, Bucket, Manifest, columns, to_record
from data_pipelines.encode import EncodeConfig, encode, make_job
from data_pipelines.moving_shapes import write_corpus
from data_pipelines.random_access import HASH, ShardFolder
from data_pipelines.shard_index import merge_indexes
from data_pipelines.shard_part import ShardsConfig
from data_pipelines.shards import write_shards
from parallel.setup import ParallelConfig, destroy, initialize
from tokenizer import MultiScaleQuantizer, ScaleSchedule, VideoTokenizer, settings
from tokenizer.train_config import TokenizerTrainConfig

ROOT = Path(__file__).parents[1]
TEXT_WIDTH, FRAMES, CLIP = 64, 5, 17


def main() -> None:
    """Runs all measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results/")
    args = parser.parse_args()
    cores, results = os.cpu_count() or 1, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for width, height in ((320, 240), (1280, 720)):
            results[f"clip_loader_ratio_{width}x{height}"] = clip_loader(
                folder / f"{height}", width, height, args.repeat
            )
        results |= code_loader(folder / "codes", cores, args.repeat)
        results |= encoding(folder / "encoding")
    report("data", hardware("cpu", cores), results, args.keep)


def clip_loader(folder: Path, width: int, height: int, repeat: int) -> float:
    """Whole videos of 17 frames, scaled to 128x128."""
    torch.set_num_threads(1)
    for number in range(12):
        _film(folder / "videos" / f"{number}.mp4", width, height, number)
    write_shards(folder / "videos", folder / "shards")
    loader = ClipDataset(folder / "shards", CLIP, 128, start="centre")
    videos = [loader.shards[row]["video"] for row in range(len(loader))]

    def bare() -> None:
        for video in videos:
            with av.open(io.BytesIO(video), "r") as container:
                container.streams.video[0].codec_context.thread_count = 1
                for _ in islice(container.decode(container.streams.video[0]), CLIP):
                    pass

    def load() -> None:
        torch.stack([loader[row]["video"] for row in range(len(loader))])

    bare_seconds, load_seconds = by_turns((bare, load), repeat)
    return round(bare_seconds / load_seconds, 3)


def code_loader(folder: Path, cores: int, repeat: int) -> dict[str, float]:
    """Random codes of the paper's 17x128x128 clips, and the demo's training step."""
    schedule, draw, rows = ScaleSchedule.square(8, 6), torch.Generator().manual_seed(0), 512
    quantizer = MultiScaleQuantizer(BITS)
    writer = MDSWriter(columns=columns(False), out=str(folder / "00000"), hashes=[HASH])
    for number in range(rows):
        latent = torch.randn(1, BITS, FRAMES, 8, 8, generator=draw)
        tokens = quantizer.quantize(latent, schedule).tokens()[0]
        text = np.random.default_rng(number).standard_normal((8, TEXT_WIDTH)).astype(np.float16)
        raw = {"caption": f"clip number {number}", "source": f"{number}.mp4", "class_id": -1}
        writer.write(to_record(tokens, None, text, raw))
    writer.finish()
    merge_indexes(folder, ["00000"])
    manifest = Manifest(
        fingerprint="0" * 16, buckets=[Bucket(128, 128, CLIP, schedule.to_list(), rows, 1)], dim=BITS, fps=8.0, text_encoder="bytes",
        text_fingerprint="bytes", text_dim=TEXT_WIDTH, has_latents=False, dead=0,
    )  # fmt: skip
    (folder / MANIFEST).write_text(manifest.to_json())
    text_bytes = rows * 8 * TEXT_WIDTH * 2
    size = sum(file.stat().st_size for file in folder.rglob("*.mds")) - text_bytes
    stream = CodeStream([Source(str(folder), FRAMES)], 32)
    torch.set_num_threads(1)
    seconds = best(lambda: [next(stream) for _ in range(8)], repeat=repeat)
    loaded = 8 * 32 * FRAMES * schedule.tokens_per_frame / seconds
    trained = _demo_tokens_per_second(cores, repeat)
    return {
        "code_loader_ratio": round(loaded / trained, 1),
        "loaded_tokens_per_second": round(loaded),
        "trained_tokens_per_second": round(trained),
        "bytes_per_latent_frame": round(size / (rows * FRAMES), 1),
    }


def _demo_tokens_per_second(cores: int, repeat: int) -> float:
    """Of the demo's longest clips: 32 of them a step."""
    torch.set_num_threads(cores)
    schedule, parallel = ScaleSchedule.square(4, 4), ParallelConfig(precision="auto")
    model = network("demo/pretrain", schedule, FRAMES, TEXT_WIDTH)
    training = Training(model, parallel, initialize(parallel, 0), [clips(model, 32, model.layout())])
    training.step()
    seconds = best(training.step, repeat=repeat)
    destroy()
    return 32 * FRAMES * schedule.tokens_per_frame / seconds


def encoding(folder: Path) -> dict[str, float]:
    """The demo's tokenizer with random weights, on the moving shapes."""
    config = settings.load(TokenizerTrainConfig, ROOT / "tokenizer" / "configs" / "demo.yaml")
    torch.manual_seed(0)
    VideoTokenizer(config.tokenizer).eval().save_pretrained(folder / "tokenizer")
    write_corpus(folder / "corpus", 640, 0, validation=1)
    for name, number in (("short", 128), ("long", 640), ("one", 256)):
        table = folder / "corpus" / f"{name}.csv"
        table.write_text("\n".join((folder / "corpus" / "train.csv").read_text().splitlines()[: number + 1]) + "\n")
        write_shards(table, folder / name, ShardsConfig(part_files=number if name == "one" else 64))

    def seconds(name: str, actors: int) -> float:
        out = folder / f"{name}-{actors}"
        started = time.perf_counter()
        encode(
            EncodeConfig(
                str(folder / name), str(folder / "tokenizer"), str(out), latents=True, num_workers=actors, threads=1
            )
        )
        return time.perf_counter() - started

    rates = [512 / (seconds("long", actors) - seconds("short", actors)) for actors in (1, 2)]
    return {
        "two_actor_speedup": round(rates[1] / rates[0], 3),
        "encoded_clips_per_second_one_actor": round(rates[0], 1),
        "orchestration_share": _orchestration(folder),
    }


def _orchestration(folder: Path) -> float:
    config = EncodeConfig(str(folder / "one"), str(folder / "tokenizer"), str(folder / "one-codes"), latents=True)
    worker = encode_worker.ShardEncoder(config.shards, config.tokenizer, "cpu", 1)
    job = make_job(config, worker.tokenizer.fingerprint, "64x64x17")
    rows, spent = len(ShardFolder(folder / "one")), [0.0]
    originals = {name: getattr(encode_worker, name) for name in ("read_clip", "encode_clips")}

    def timed(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                spent[0] += time.perf_counter() - started

        return call

    for name, original in originals.items():
        setattr(encode_worker, name, timed(original))
    try:
        Path(config.out, encode_worker.TEMPORARY).mkdir(parents=True)
        started = time.perf_counter()
        receipt = worker.encode(encode_worker.Task(replace(job), config.out, 0, "benchmark"))
        passed = time.perf_counter() - started
    finally:
        for name, original in originals.items():
            setattr(encode_worker, name, original)
    assert receipt["rows_out"] == rows == 256
    return round(1 - spent[0] / passed, 4)


def _film(path: Path, width: int, height: int, seed: int) -> None:
    """A video of as many frames as a clip: a smooth field that drifts, with a little noise, as a camera gives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    field = np.kron(draw.integers(0, 255, (height // 40 + 1, width // 40 + 2, 3)), np.ones((40, 40, 1))).astype(
        np.uint8
    )
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(CLIP):
            image = field[:height, index : index + width].astype(np.int16) + draw.integers(-6, 7, (height, width, 1))
            frame = av.VideoFrame.from_ndarray(image.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


if __name__ == "__main__":
    main()
