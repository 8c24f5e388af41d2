"""One raw shard -> one folder of code shards: what an encoding worker does. Knows nothing of Ray.

A worker writes to `<out>/.tmp/<shard>.<attempt>/`, finishes the MDS files, syncs a receipt to disk and renames the folder to
`<out>/<shard>/`: a shard is done if and only if its receipt is there, wherever the worker was killed. Nothing in the
folder depends on time, attempt or worker, so two runs write the same bytes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming import MDSWriter
from torch import Tensor

from data_pipelines.clips import read_clip
from data_pipelines.codes import columns, to_record
from data_pipelines.decode import DecodeError, Decoder, choose_decoder
from data_pipelines.random_access import HASH, ShardFolder
from data_pipelines.variants import Variant
from tokenizer import UserError, VideoTokenizer
from tokenizer.clip_shape import ClipShape
from tokenizer.files import sync
from tokenizer.pixels import from_pixels
from tokenizer.receipts import RECEIPT, read_receipt
from tokenizer.text import TextEncoder, text_encoder

TEMPORARY = ".tmp"
SIZE_LIMIT = 1 << 29  # bytes a code file; MDS can address 4 GiB
NO_ROW, SOME_ROW = -1, -2  # in a breadcrumb: no row is to blame; one of several that are being decoded may be


@dataclass(frozen=True)
class Job:
    """Everything that decides the content of a variant's code shards; two outputs with equal jobs are interchangeable.

    Args:
        variant: the clips' shapes.
        shards: digest of the raw shards' index.
        fingerprint: of the tokenizer.
        text_encoder: specification, text_fingerprint: of its features, text_dim: their width.
        latents: store float16 latents too.
        batch_size: clips a tokenizer call (a convolution's last bits may depend on it).
        fps: rate that clips are sampled at; None: each video's own.
        decoder: of the clips; two of them differ in some pixels.
    """

    variant: str
    shards: str
    fingerprint: str
    text_encoder: str
    text_fingerprint: str
    text_dim: int
    latents: bool
    batch_size: int
    fps: float | None
    decoder: str


@dataclass(frozen=True)
class Task:
    """One raw shard at one size.

    Args:
        job: what to make.
        out: the variant's folder.
        shard: number of the raw shard.
        attempt: a name of its own for this try.
        quarantined: rows that killed earlier tries; they go to the dead letters unseen.
        one_by_one: decode no row ahead, so that one which kills the process is known.
    """

    job: Job
    out: str
    shard: int
    attempt: str
    quarantined: tuple[int, ...] = ()
    one_by_one: bool = False

    @property
    def name(self) -> str:
        return f"{self.shard:05d}"

    @property
    def breadcrumb(self) -> Path:
        """Where this try notes the row that it is working on."""
        return Path(self.out, TEMPORARY, f"{self.name}.{self.attempt}.row")


def shard_receipt(out: str | Path, shard: int) -> dict[str, Any] | None:
    """The receipt of a finished shard, or None."""
    return read_receipt(Path(out, f"{shard:05d}"))


class ShardEncoder:
    """Encodes raw shards; holds the tokenizer and the text encoder.

    Args:
        shards: folder of raw shards, or its URL.
        tokenizer: folder of the tokenizer.
        device: "cpu" or "cuda".
        threads: of torch, in this process; and on a GPU, which leaves the CPU free, as many more that decode ahead.
        cache: a local folder for the shards of a URL.
    """

    def __init__(self, shards: str, tokenizer: str, device: str, threads: int, cache: str | None = None):
        torch.set_num_threads(threads)
        self.shards = ShardFolder(shards, cache)
        self.decoder: Decoder | None = None  # as the first task's job has it
        self.decoding = ThreadPoolExecutor(threads) if device == "cuda" else None
        self.tokenizer = VideoTokenizer.from_pretrained(tokenizer, device)
        self.device = device

    def encode(self, task: Task) -> dict[str, Any]:
        """Encodes one shard and puts it in its place.

        Returns:
            the receipt: {"job", "shard", "rows_in", "rows_out", "shapes": {name: rows}, "dead": [{"row", "source", "reason"}]}.

        Raises:
            UserError: the raw shard is damaged, or the tokenizer is not the job's.
        """
        job, final = task.job, Path(task.out, task.name)
        if self.tokenizer.fingerprint != job.fingerprint:
            raise UserError(
                f"the tokenizer changed while it was in use (now {self.tokenizer.fingerprint}): start `videoar encode` again."
            )
        folder = Path(task.out, TEMPORARY, f"{task.name}.{task.attempt}")
        folder.mkdir(parents=True)
        self.breadcrumb = _Breadcrumb(task)
        try:
            dead: list[dict[str, Any]] = []
            rows: Counter[str] = Counter()
            # finish() is called on success only: leaving MDSWriter's `with` by an exception would write an index that looks whole
            writers: dict[str, MDSWriter] = {}
            for shape, record in self._records(task, dead):
                if shape not in writers:
                    out, fields = str(folder / shape), columns(job.latents)
                    writers[shape] = MDSWriter(columns=fields, out=out, hashes=[HASH], size_limit=SIZE_LIMIT)
                writers[shape].write(record)
                rows[shape] += 1
            for writer in writers.values():
                writer.finish()
            receipt = {
                "job": asdict(job),
                "shard": task.shard,
                "rows_in": int(self.shards.rows_per_shard[task.shard]),
                "rows_out": rows.total(),
                "shapes": dict(sorted(rows.items())),
                "dead": dead,
            }
            for file in folder.rglob("*"):
                sync(file)
            with open(folder / RECEIPT, "w") as out:
                json.dump(receipt, out, indent=1, sort_keys=True)
            sync(folder / RECEIPT)
            sync(folder)
            try:
                os.rename(folder, final)
            except OSError:
                # another run has put the same shard there in the meantime
                if shard_receipt(task.out, task.shard) != receipt:
                    raise
            sync(Path(task.out))
            return receipt
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self.breadcrumb.close()
            task.breadcrumb.unlink(missing_ok=True)

    def _records(self, task: Task, dead: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Shape and code record of the shard's good rows, those of one shape in order; the others are added to `dead`."""
        job = task.job
        self.decoder = self.decoder or choose_decoder(job.decoder)
        encoder = text_encoder(job.text_encoder, job.text_dim, self.device)
        waiting: dict[ClipShape, list[tuple[Tensor, dict[str, Any]]]] = defaultdict(list)
        row = 0
        for row, raw, clip in self._clips(task):
            if isinstance(clip, DecodeError):
                # addresses of objects would make two runs' bytes differ
                dead.append({"row": row, "source": raw["source"], "reason": re.sub(r"0x[0-9a-f]+", "0x", str(clip))})
                continue
            shape = ClipShape(clip.shape[1], clip.shape[2], clip.shape[0])
            waiting[shape].append((from_pixels(clip), raw))
            if len(waiting[shape]) == job.batch_size:
                yield from self._encode_batch(task, row, encoder, shape, waiting.pop(shape))
        for shape in sorted(waiting):
            yield from self._encode_batch(task, row, encoder, shape, waiting[shape])

    def _clips(self, task: Task) -> Iterator[tuple[int, dict[str, Any], np.ndarray | DecodeError]]:
        """Number, raw record and decoded clip of all rows in order."""
        job, variant = task.job, Variant.parse(task.job.variant)

        def decode(row: int, raw: dict[str, Any]) -> np.ndarray | DecodeError:
            try:
                if row in task.quarantined:
                    raise DecodeError("the worker's process died at it, each time it was tried")
                shape = variant.shape(raw, job.fps)
                assert self.decoder is not None
                return read_clip(raw, self.decoder, shape.frames, shape.height, shape.width, job.fps)
            except DecodeError as error:
                return error

        rows = range(int(self.shards.rows_per_shard[task.shard]))
        if self._one_by_one(task):
            for row in rows:
                self.breadcrumb.note(row, row)
                raw = self.shards.read(task.shard, row)
                yield row, raw, decode(row, raw)
            return
        assert self.decoding is not None
        ahead: deque[tuple[int, dict[str, Any], Future[np.ndarray | DecodeError]]] = deque()
        for row in rows:
            self.breadcrumb.note(SOME_ROW, row)
            raw = self.shards.read(task.shard, row)
            ahead.append((row, raw, self.decoding.submit(decode, row, raw)))
            if len(ahead) > 2 * job.batch_size:
                first, raw, clip = ahead.popleft()
                yield first, raw, clip.result()
        for row, raw, clip in ahead:
            yield row, raw, clip.result()

    def _one_by_one(self, task: Task) -> bool:
        return self.decoding is None or task.one_by_one

    def _encode_batch(
        self, task: Task, row: int, encoder: TextEncoder, shape: ClipShape, batch: list[tuple[Tensor, dict[str, Any]]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        # a crash in here (memory, a device) is no row's fault
        self.breadcrumb.note(NO_ROW if self._one_by_one(task) else SOME_ROW, row)
        with torch.inference_mode():
            video = torch.stack([clip for clip, _ in batch]).to(self.device)  # [B, 3, 1+4n, H, W]
            latents, tokens = encode_clips(self.tokenizer, video)
        for number, (_, raw) in enumerate(batch):
            text = encoder.encode(raw["caption"])
            yield shape.name, to_record(tokens[number], latents[number] if task.job.latents else None, text, raw)


def encode_clips(tokenizer: VideoTokenizer, video: Tensor) -> tuple[Tensor, Tensor]:
    """Video [B, 3, 1+4n, H, W] in [-1, 1] -> latents float16 [B, T, d, H, W] and tokens bool [B, T, N, d], on the CPU.

    The bits are those of the *rounded* latents, computed on the CPU: whoever quantises the stored latents again gets exactly
    the stored bits.
    """
    latents = tokenizer.encode_latent(video).movedim(1, 2).to("cpu", torch.float16).contiguous()  # [B, T, d, H, W]
    schedule = tokenizer.schedule_for(*video.shape[-2:])
    codes = tokenizer.quantizer.quantize(latents.float().movedim(1, 2), schedule)
    return latents, codes.tokens()


class _Breadcrumb:
    """Notes how far a try has come, for the driver to read should this process die.

    A crash of the machine is not the row's doing, so nothing is synced; and the file keeps its length, since cutting it for every row waits
    for the disk on a busy machine.
    """

    def __init__(self, task: Task):
        self.descriptor = os.open(task.breadcrumb, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def note(self, blame: int, row: int) -> None:
        os.pwrite(self.descriptor, b"%12d %12d" % (blame, row), 0)

    def close(self) -> None:
        os.close(self.descriptor)


def read_breadcrumb(task: Task) -> tuple[int, int]:
    """(the row to blame if the worker has died, NO_ROW or SOME_ROW; the row that it has come to)."""
    try:
        blame, row = task.breadcrumb.read_text().split()
        return int(blame), int(row)
    except (FileNotFoundError, ValueError):  # not begun, or cut off while writing
        return NO_ROW, 0
