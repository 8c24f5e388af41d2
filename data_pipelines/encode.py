"""Pre-encoding: raw shards -> code shards, by a pool of Ray actors (DESIGN section 5).

    videoar encode --shards shards/train --tokenizer runs/tokenizer --out codes --variants 32x32x17,64x64x17
    videoar encode ... --ray-address auto                  on a running Ray cluster with a shared file system

Each variant becomes a folder of its own below `out`, with the clips of all its shapes. One task is one raw shard in one variant
(`encode_worker`); this driver hands tasks to actors that are ready, re-queues the task of an actor that died, sets a row aside that
killed its actor three times, and merges the indexes when all receipts add up. It holds no state that a restart would miss.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data_pipelines.codes import MANIFEST, Bucket, Manifest
from data_pipelines.encode_worker import TEMPORARY, Job, Task, shard_receipt
from data_pipelines.random_access import INDEX, ShardFolder
from data_pipelines.remote import TIMEOUT, Remote, TimeLimit
from data_pipelines.shard_index import merge_indexes
from data_pipelines.shards import read_shards_receipt
from data_pipelines.variants import Variant
from tokenizer import UserError, VideoTokenizer
from tokenizer.clip_shape import ClipShape
from tokenizer.files import write_whole
from tokenizer.receipts import RECEIPT
from tokenizer.text import text_encoder

JOB = "job.json"
DEAD_LETTERS = "dead_letter.jsonl"


@dataclass(frozen=True)
class EncodeConfig:
    """Settings of `videoar encode`.

    Args:
        shards: folder of raw shards (`videoar shards`), or its URL.
        cache: a local folder, on each node its own, for the shards of a URL.
        tokenizer: folder of a trained tokenizer.
        out: where the code shards go, one folder a variant.
        variants: shapes of the clips, each HEIGHTxWIDTHxFRAMES, or SIDExFRAMES at each clip's own aspect ratio; FRAMES may list lengths,
            17+33+65. A list, or a text with commas.
        latents: store float16 latents too (eight times the size of the bits; makes re-quantised targets exact).
        text_encoder: "bytes", or "t5:" and a directory.
        text_dim: width of the text features.
        fps: rate that clips are sampled at; None: each video's own.
        decoder: "pyav"; "dali"; or "auto", which is pyav on CPUs, and on GPUs DALI for what it can decode, where it is installed.
        batch_size: clips a tokenizer call.
        num_workers: Ray actors; 0: as many as the machine's cores or GPUs hold.
        threads: CPU threads of an actor.
        device: "cpu" or "cuda" (one GPU an actor).
        ray_address: of a running cluster, such as "auto"; None: Ray inside this machine.
        parts, part: encode only every `parts`-th raw shard, from number `part` (0 and up) on, beside processes that encode the others, as a
            job array's do; who finds all shards encoded makes the output whole.
    """

    shards: str
    tokenizer: str
    out: str
    variants: list[str] | str = "64x64x17"
    latents: bool = False
    text_encoder: str = "bytes"
    text_dim: int = 64
    fps: float | None = None
    decoder: Literal["auto", "pyav", "dali"] = "auto"
    batch_size: int = 8
    num_workers: int = 0
    threads: int = 1
    device: str = "cpu"
    ray_address: str | None = None
    cache: str | None = None
    parts: int = 1
    part: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.part < self.parts:
            raise UserError(f"part is {self.part} of {self.parts} parts: it must be from 0 to parts - 1.")
        if not self.sizes or len(set(self.sizes)) < len(self.sizes):
            raise UserError(f"the variants {self.variants} are empty or repeat themselves: name each size once.")
        for size in self.sizes:
            Variant.parse(size)
        if min(self.batch_size, self.threads) < 1 or self.num_workers < 0:
            raise UserError("batch_size and threads must be at least 1 and num_workers at least 0: mend the settings.")
        if self.device not in ("cpu", "cuda"):
            raise UserError(f"the device '{self.device}' is unknown: choose cpu or cuda.")

    @property
    def sizes(self) -> list[str]:
        """The variants' names."""
        return self.variants.split(",") if isinstance(self.variants, str) else list(self.variants)


@dataclass(frozen=True)
class EncodeSummary:
    """What became of one variant's clips: rows_in = rows_out + dead.

    Args:
        variant: its name.
        rows_in: clips in the raw shards.
        rows_out: clips encoded.
        dead: clips listed in `dead_letter.jsonl`.
        already_done: nothing had to be done.
    """

    variant: str
    rows_in: int
    rows_out: int
    dead: int
    already_done: bool


def encode(config: EncodeConfig) -> list[EncodeSummary]:
    """Encodes all raw shards at all sizes, or what is left of that from an earlier run.

    Returns:
        one summary a variant; none of a variant of which other `parts` are not done.

    Raises:
        UserError: something is missing, the output was made otherwise, or no clip of a variant could be encoded.
    """
    config = replace(
        config,
        shards=config.shards if "://" in config.shards else os.path.abspath(config.shards),
        cache=config.cache and os.path.abspath(config.cache),
        tokenizer=os.path.abspath(config.tokenizer),
        out=os.path.abspath(config.out),
    )
    if config.cache is not None:
        Remote(config.shards).fetch_index(RECEIPT, Path(config.cache), TimeLimit(TIMEOUT))
    classes = read_shards_receipt(Path(config.cache or config.shards))["classes"]
    raw = ShardFolder(config.shards, config.cache)
    tokenizer = VideoTokenizer.from_pretrained(config.tokenizer)
    jobs = [make_job(config, tokenizer.fingerprint, variant) for variant in config.sizes]
    folders = [Path(config.out, variant) for variant in config.sizes]
    done_before = [_claim(folder, job) for folder, job in zip(folders, jobs)]
    tasks = [
        Task(job=job, out=str(folder), shard=shard, attempt="")
        for job, folder, done in zip(jobs, folders, done_before)
        if not done
        for shard in range(config.part, len(raw.shards), config.parts)
        if shard_receipt(folder, shard) is None
    ]
    if tasks:
        # Ray takes seconds to start, so only for work that is there
        from data_pipelines.encode_pool import EncoderPool

        worker = (config.shards, config.tokenizer, config.device, config.threads, config.cache)
        with EncoderPool(worker, config.device, config.num_workers, config.threads, config.ray_address) as pool:
            pool.run(tasks, raw.rows_per_shard.tolist())
    summaries = []
    for folder, job, done in zip(folders, jobs, done_before):
        if (
            not done
            and config.parts > 1
            and any(shard_receipt(folder, shard) is None for shard in range(len(raw.shards)))
        ):
            print(
                f"{job.variant}: part {config.part} of {config.parts} is done; the last one to end makes the output whole."
            )
            continue
        if not done:
            _finish(folder, job, raw, classes, tokenizer)
        manifest = Manifest.read(folder)
        summaries.append(EncodeSummary(job.variant, len(raw), manifest.rows, manifest.dead, done))
    for summary in summaries:
        state = "finished before, nothing to do" if summary.already_done else "done"
        print(
            f"{summary.variant}: {state}: {summary.rows_in} clips in, {summary.rows_out} encoded, {summary.dead} could not be read."
        )
    return summaries


def make_job(config: EncodeConfig, fingerprint: str, variant: str) -> Job:
    """What decides the content of a variant's code shards."""
    index = Path(config.cache or config.shards, INDEX).read_bytes()
    return Job(
        variant=variant,
        shards=hashlib.sha256(index).hexdigest()[:16],
        fingerprint=fingerprint,
        text_encoder=config.text_encoder,
        text_fingerprint=text_encoder(config.text_encoder, config.text_dim).fingerprint,
        text_dim=config.text_dim,
        latents=config.latents,
        batch_size=config.batch_size,
        fps=config.fps,
        decoder="pyav" if config.device == "cpu" and config.decoder == "auto" else config.decoder,
    )


def _claim(folder: Path, job: Job) -> bool:
    """Makes the folder this job's own; True if the job was finished before."""
    if not (folder / JOB).is_file():
        if folder.exists() and any(
            entry.name != TEMPORARY and not entry.name.startswith(f".{JOB}.") for entry in folder.iterdir()
        ):
            raise UserError(
                f"{folder} exists and was not written by `videoar encode`: name another --out, or move it away."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / JOB, json.dumps(asdict(job), indent=1, sort_keys=True))
    content = json.loads((folder / JOB).read_text())
    differing = sorted(key for key, value in asdict(job).items() if content.get(key) != value)
    if differing:
        what = ", ".join(f"{key} {content.get(key)} instead of {getattr(job, key)}" for key in differing)
        raise UserError(f"{folder} holds codes made with other settings ({what}): name another --out, or delete it.")
    return (folder / MANIFEST).is_file()


def _finish(folder: Path, job: Job, raw: ShardFolder, classes: list[str], tokenizer: VideoTokenizer) -> None:
    """Checks that all receipts add up, merges the indexes, and writes the manifest, which makes the folder whole."""
    receipts = []
    for shard, rows in enumerate(raw.rows_per_shard.tolist()):
        receipt = shard_receipt(folder, shard)
        if receipt is None or receipt["job"] != asdict(job):
            raise UserError(
                f"the shard {folder}/{shard:05d} is missing or of another run: start `videoar encode` again."
            )
        if not rows == receipt["rows_in"] == receipt["rows_out"] + len(receipt["dead"]):
            raise UserError(
                f"the counts of {folder}/{shard:05d} do not add up ({rows} rows, {receipt['rows_out']} encoded, "
                f"{len(receipt['dead'])} dead): delete it and start `videoar encode` again."
            )
        receipts.append(receipt)
    letters = [{"shard": receipt["shard"], **letter} for receipt in receipts for letter in receipt["dead"]]
    write_whole(folder / DEAD_LETTERS, "".join(json.dumps(letter, sort_keys=True) + "\n" for letter in letters))
    rows_out = sum(receipt["rows_out"] for receipt in receipts)
    if not rows_out:
        raise UserError(
            f"none of the {len(raw)} clips of {raw.path} could be encoded at {job.variant}: the reasons are in {folder / DEAD_LETTERS}."
        )
    buckets = _merge(folder, receipts, tokenizer)
    manifest = Manifest(
        fingerprint=job.fingerprint,
        buckets=buckets,
        dim=tokenizer.quantizer.dim,
        fps=job.fps,
        text_encoder=job.text_encoder,
        text_fingerprint=job.text_fingerprint,
        text_dim=job.text_dim,
        has_latents=job.latents,
        dead=len(letters),
        classes=classes,
    )
    assert manifest.rows == rows_out
    # before the manifest: a run that is killed right after it finds nothing to do when it is started again
    shutil.rmtree(folder / TEMPORARY, ignore_errors=True)
    write_whole(folder / MANIFEST, manifest.to_json())


def _merge(folder: Path, receipts: list[dict[str, Any]], tokenizer: VideoTokenizer) -> list[Bucket]:
    """Writes the index: all shards of one shape, then those of the next."""
    buckets, order = [], []
    for shape in sorted(ClipShape.parse(name) for name in {name for receipt in receipts for name in receipt["shapes"]}):
        holders = [receipt for receipt in receipts if shape.name in receipt["shapes"]]
        parts = [f"{receipt['shard']:05d}/{shape.name}" for receipt in holders]
        order += parts
        buckets.append(
            Bucket(
                height=shape.height,
                width=shape.width,
                clip_frames=shape.frames,
                schedule=tokenizer.schedule_for(shape.height, shape.width).to_list(),
                rows=sum(receipt["shapes"][shape.name] for receipt in holders),
                shards=sum(len(list(Path(folder, part).glob("*.mds"))) for part in parts),
            )
        )
    merge_indexes(folder, order)
    return buckets
