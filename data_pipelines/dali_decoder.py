"""NVIDIA DALI as a decoder: a GPU's video engines, or DALI's own CPU operators.

DALI takes numbers of frames, not times, and fails a whole pipeline at one bad file; so FFmpeg reads the container first, without
decoding: when each frame is shown, and whether this is a file for DALI at all.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from typing import Any, Literal

import av
import numpy as np
from nvidia.dali import fn, pipeline_def, types

from data_pipelines.decode import DecodeError, Decoder, ascending
from tokenizer.frames import TOLERANCE, Covering, only_video_stream

CODECS = {"cuda": ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4"), "cpu": ("vp9", "mjpeg")}


class NotForDALI(DecodeError):
    """A file that DALI can't decode, and others perhaps can."""


class DALIDecoder:
    """Decodes with DALI; scales to cover the size and crops at the centre, as every decoder here does.

    Frames are those of `PyAVDecoder`; pixels differ by rounding, the colour matrix and the scaling's kernel, by a few of 255 steps.

    Args:
        device: "cuda" (this process's current GPU) or "cpu".
        fallback: what decodes the files that DALI can't; None: they are errors.
    """

    def __init__(self, device: Literal["cuda", "cpu"], fallback: Decoder | None = None):
        self.device, self.fallback = device, fallback
        self._threads = threading.local()  # a pipeline is for one thread

    def decode(
        self, video: bytes, times: Sequence[float] | np.ndarray, height: int, width: int, rotation: int = 0
    ) -> np.ndarray:
        wanted = ascending(times)
        try:
            return self._decode(video, wanted, height, width, rotation)
        except NotForDALI:
            if self.fallback is None:
                raise
            return self.fallback.decode(video, times, height, width, rotation)

    def _decode(self, video: bytes, wanted: np.ndarray, height: int, width: int, rotation: int) -> np.ndarray:
        shown, size = _frame_times(video, self.device)
        if wanted[-1] > shown[-1] + TOLERANCE:
            raise DecodeError(f"the video ends at {shown[-1]:.3f} s, {wanted[-1]:.3f} s was wanted")
        numbers = np.searchsorted(shown, wanted + TOLERANCE, side="right") - 1  # the last frame at or before each time
        cover = Covering.of(*size, rotation, height, width)
        try:
            frames = self._run(video, numbers.clip(0).astype(np.int32), (cover.tall, cover.wide))  # [T, tall, wide, 3]
        except RuntimeError as error:
            self._threads.pipeline = None  # it is of no use after an error
            reason = next((line for line in str(error).splitlines() if "Assert" in line), str(error).splitlines()[-1])
            raise NotForDALI(f"decoding failed: {reason.strip()[:200]}") from error
        return np.rot90(frames[:, cover.rows, cover.columns], cover.quarter_turns, (1, 2))

    def _run(self, video: bytes, numbers: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        if getattr(self._threads, "pipeline", None) is None:
            self._threads.pipeline = _build(self.device)
        (clips,) = self._threads.pipeline.run(
            video=[np.frombuffer(video, dtype=np.uint8)], numbers=[numbers], size=[np.array(size, dtype=np.float32)]
        )
        return np.asarray(clips.as_cpu()[0])


def _build(device: str) -> Any:
    """A pipeline for one clip at a time."""
    gpu: Any = None
    if device == "cuda":
        import torch

        gpu = torch.cuda.current_device()

    @pipeline_def(batch_size=1, num_threads=1, device_id=gpu, prefetch_queue_depth=1)
    def clip() -> Any:
        video = fn.external_source(name="video", dtype=types.DALIDataType.UINT8, ndim=1)
        numbers = fn.external_source(name="numbers", dtype=types.DALIDataType.INT32, ndim=1)
        size = fn.external_source(name="size", dtype=types.DALIDataType.FLOAT, ndim=1)
        frames = fn.decoders.video(video, device="mixed" if device == "cuda" else "cpu", frames=numbers)  # [T, H, W, 3]
        down, up = types.DALIInterpType.INTERP_TRIANGULAR, types.DALIInterpType.INTERP_CUBIC
        return fn.resize(frames, size=size, min_filter=down, mag_filter=up)

    pipeline = clip()
    pipeline.build()
    return pipeline


def _frame_times(video: bytes, device: str) -> tuple[np.ndarray, tuple[int, int]]:
    """When each frame is shown, in seconds and in DALI's order, and the frames' height and width before any turning.

    Raises:
        NotForDALI: DALI can't decode this codec, or would number the frames otherwise.
        DecodeError: there is no video.
    """
    try:
        with av.open(io.BytesIO(video), "r") as container:
            stream = only_video_stream(container)
            if stream is None:
                raise DecodeError("no video stream")
            codec, pixels = stream.codec_context.codec.canonical_name, stream.codec_context.pix_fmt
            if codec not in CODECS[device]:
                where = "a GPU" if device == "cuda" else "a CPU"
                raise NotForDALI(f"DALI decodes {', '.join(CODECS[device])} on {where}, not {codec}")
            if pixels not in ("yuv420p", "yuvj420p", None):
                raise NotForDALI(f"DALI decodes 8-bit 4:2:0 video, not {pixels}")
            packets = [packet for packet in container.demux(stream) if packet.size]
            size = (stream.codec_context.height, stream.codec_context.width)
    except (av.FFmpegError, ValueError, EOFError) as error:
        raise DecodeError(f"decoding failed: {error}") from error
    tick = stream.time_base
    unsure = any(packet.pts is None or packet.is_discard or packet.is_corrupt for packet in packets)
    if unsure or not packets or tick is None:
        raise NotForDALI("frames without timestamps, hidden by an edit list, or damaged")
    ticks = sorted(packet.pts for packet in packets if packet.pts is not None)
    if len(set(ticks)) < len(ticks):
        raise NotForDALI("repeated timestamps")
    return np.array(ticks) * float(tick), size
