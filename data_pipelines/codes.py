"""Code shards: what a record and a manifest hold, and the dataset that reads them (DESIGN section 5).

A folder of code shards holds `index.json` (streaming's), `codes.json` (the manifest; written last, so a folder without it
is not finished) and one sub-folder for each raw shard, with one for each shape of clips. The index lists the shards by shape, so that the
clips of one shape are consecutive rows. Record of a clip:

    packed    bytes  bits of all scales in sequence order, d/8 bytes a token
    latent    bytes  float16 [T, d, H, W], only where the manifest says so; the bits are exactly those of this latent
    text      bytes  float16 [n, text_dim], features of the caption
    caption, source  str
    class_id  int    -1: none
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipelines.random_access import ShardFolder
from data_pipelines.remote import TIMEOUT, Remote, TimeLimit
from tokenizer.clip_shape import TEMPORAL_COMPRESSION
from tokenizer.codes import pack_tokens, unpack_tokens
from tokenizer.errors import UserError
from tokenizer.scales import ScaleSchedule

MANIFEST = "codes.json"
FORMAT = 2
COLUMNS = {"packed": "bytes", "text": "bytes", "caption": "str", "source": "str", "class_id": "int"}


@dataclass(frozen=True)
class Bucket:
    """The clips of one shape.

    Args:
        height, width: of the frames, in pixels.
        clip_frames: video frames a clip.
        schedule: the grids of the scales, as lists.
        rows: clips.
        shards: in the index.
    """

    height: int
    width: int
    clip_frames: int
    schedule: list[list[int]]
    rows: int
    shards: int

    @property
    def num_frames(self) -> int:
        """T, latent frames a clip."""
        return 1 + (self.clip_frames - 1) // TEMPORAL_COMPRESSION

    @property
    def scale_schedule(self) -> ScaleSchedule:
        """`schedule` as the object."""
        return ScaleSchedule.from_list(self.schedule)


@dataclass(frozen=True)
class Manifest:
    """What all records of a folder have in common.

    Args:
        fingerprint: of the tokenizer that made the codes.
        buckets: the clips by shape, in the index's order.
        dim: d, bits a token.
        fps: the rate that clips were sampled at; None: each video's own.
        text_encoder: the text encoder's specification, such as "bytes".
        text_fingerprint: changes when its features change.
        text_dim: width of the text features.
        has_latents: records hold latents.
        dead: clips that could not be encoded (listed in `dead_letter.jsonl`).
        classes: names of the classes in the order of `class_id`; empty where there are none.
        format: of the records.
    """

    fingerprint: str
    buckets: list[Bucket]
    dim: int
    fps: float | None
    text_encoder: str
    text_fingerprint: str
    text_dim: int
    has_latents: bool
    dead: int
    classes: list[str] = field(default_factory=list)
    format: int = FORMAT

    @property
    def rows(self) -> int:
        """Records in all shards."""
        return sum(bucket.rows for bucket in self.buckets)

    def to_json(self) -> str:
        """The manifest's file content."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Reads a folder's manifest.

        Raises:
            UserError: it is missing, of another format, or damaged.
        """
        file = Path(folder) / MANIFEST
        if not file.is_file():
            raise UserError(
                f"{folder} holds no finished code shards: {MANIFEST} is missing; run `videoar encode` to its end."
            )
        try:
            content = json.loads(file.read_text())
            if content["format"] != FORMAT:
                raise UserError(
                    f"{file} has format {content['format']}, this program reads {FORMAT}: encode the clips again."
                )
            return cls(**content | {"buckets": [Bucket(**bucket) for bucket in content["buckets"]]})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} can't be read ({str(error)[:200]}): encode the clips again.") from error


def columns(has_latents: bool) -> dict[str, str]:
    """The MDS columns of a code record."""
    return COLUMNS | ({"latent": "bytes"} if has_latents else {})


def to_record(tokens: Tensor, latent: Tensor | None, text: np.ndarray, raw: dict[str, Any]) -> dict[str, Any]:
    """A record of one clip.

    Args:
        tokens: bool [T, N, d].
        latent: float16 [T, d, H, W], or None.
        text: float16 [n, text_dim].
        raw: the clip's raw record; its caption, source and class are carried over.
    """
    record = {
        "packed": pack_tokens(tokens),
        "text": text.astype(np.float16).tobytes(),
        "caption": raw["caption"],
        "source": raw["source"],
        "class_id": int(raw["class_id"]),
    }
    if latent is not None:
        record["latent"] = latent.contiguous().numpy().tobytes()
    return record


class CodeFolder:
    """A finished folder of code shards.

    Args:
        path: the folder, or a URL.
        expected_fingerprint: of the tokenizer in use; None: any.
        cache: where a remote folder's shards are kept.
        timeout: seconds that opening the folder or reading a clip may take, downloads and their retries included.

    Raises:
        UserError: the folder is not finished, or codes are another tokenizer's.
    """

    def __init__(
        self,
        path: str | Path,
        expected_fingerprint: str | None = None,
        cache: str | Path | None = None,
        timeout: float = TIMEOUT,
    ):
        self.path = str(path)
        self.manifest = _fetch_manifest(self.path, cache, timeout)
        if expected_fingerprint is not None and self.manifest.fingerprint != expected_fingerprint:
            raise UserError(
                f"the codes in {path} were made by the tokenizer {self.manifest.fingerprint}, not by {expected_fingerprint}: "
                "encode the clips again with this tokenizer, or name the codes that it made."
            )
        self.shards = ShardFolder(path, cache, timeout)
        listed = (len(self.shards.shards), len(self.shards))
        if listed != (sum(bucket.shards for bucket in self.manifest.buckets), self.manifest.rows):
            raise UserError(
                f"the index of {path} lists {listed[1]} clips in {listed[0]} shards, which is not what {MANIFEST} says: "
                "encode the clips again."
            )


class CodeDataset(torch.utils.data.Dataset):
    """The clips of one shape in a folder of code shards.

    Item i is {"tokens": bool [T, N, d], "latent": float32 [T, d, H, W] or None, "text": float32 [n, text_dim],
    "caption": str, "source": str, "class_id": int, "sample_index": i}.

    Args:
        path: the folder, or a URL, or what was opened already.
        expected_fingerprint: of the tokenizer in use; None: any.
        num_frames: T; only the first T latent frames are given (by causality they are the code of the clip's first
            1 + 4 (T - 1) frames). None: all.
        cache: where a remote folder's shards are kept.
        bucket: which shape; may be left out where there is one only.
        timeout: seconds that opening the folder or reading a clip may take, downloads and their retries included.

    Raises:
        UserError: as `CodeFolder` does; or clips have fewer frames.
    """

    def __init__(
        self,
        path: str | Path | CodeFolder,
        expected_fingerprint: str | None = None,
        num_frames: int | None = None,
        cache: str | Path | None = None,
        bucket: int | None = None,
        timeout: float = TIMEOUT,
    ):
        folder = path if isinstance(path, CodeFolder) else CodeFolder(path, expected_fingerprint, cache, timeout)
        self.path, self.manifest, self.shards = folder.path, folder.manifest, folder.shards
        buckets = self.manifest.buckets
        if bucket is None and len(buckets) != 1:
            raise UserError(f"{self.path} holds clips of {len(buckets)} shapes: name one of them by its number.")
        self.number = bucket or 0
        self.bucket = buckets[self.number]
        first_shard = sum(one.shards for one in buckets[: self.number])
        self.rows_per_shard = self.shards.rows_per_shard[first_shard : first_shard + self.bucket.shards]
        self.first_row = sum(one.rows for one in buckets[: self.number])
        self.num_frames = self.bucket.num_frames if num_frames is None else num_frames
        if not 1 <= self.num_frames <= self.bucket.num_frames:
            raise UserError(
                f"{self.path} holds clips of {self.bucket.num_frames} latent frames, {num_frames} were asked for: "
                "ask for fewer, or encode longer clips."
            )
        self.schedule = self.bucket.scale_schedule

    def __len__(self) -> int:
        return self.bucket.rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.get(row)

    def get(self, row: int, limit: TimeLimit | None = None) -> dict[str, Any]:
        """Item `row` within what is left of a time that several clips share."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} in {self.path}")
        record, bucket = self.shards.get(self.first_row + row, limit), self.bucket
        tokens = unpack_tokens(record["packed"], bucket.num_frames, self.schedule, self.manifest.dim)
        latent = None
        if self.manifest.has_latents:
            shape = (bucket.num_frames, self.manifest.dim, *self.schedule.grid)
            latent = _floats(record["latent"]).reshape(shape)[: self.num_frames]  # [T, d, H, W]
        return {
            "tokens": tokens[: self.num_frames],
            "latent": latent,
            "text": _floats(record["text"]).reshape(-1, self.manifest.text_dim),
            "caption": record["caption"],
            "source": record["source"],
            "class_id": record["class_id"],
            "sample_index": row,
        }


def _floats(stored: bytes) -> Tensor:
    # the copy to float32 also detaches the tensor from the record's read-only bytes
    return torch.from_numpy(np.frombuffer(stored, dtype=np.float16).astype(np.float32))


def _fetch_manifest(path: str, cache: str | Path | None, timeout: float) -> Manifest:
    if cache is None:
        return Manifest.read(path)
    Remote(path).fetch_index(MANIFEST, Path(cache), TimeLimit(timeout))
    return Manifest.read(cache)
