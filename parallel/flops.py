"""Model FLOPs of a step, and the peak of a device that they are held against: the two halves of MFU, defined once."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from inference.config import ModelConfig
from parallel.context import visible_keys
from tokenizer.sequence import SequenceLayout

PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
}
"""FLOP/s of dense bfloat16 matrix products, as NVIDIA publishes them; the first name that fits counts."""
MATMUL = 1024
"""Side of the product that a device's rate is measured with where no peak is published; eight times that on a GPU."""


def model_flops(
    config: ModelConfig, layout: SequenceLayout, text_lengths: Tensor, frame_mask: Tensor | None = None
) -> Tensor:
    """Of a training step on some clips: 3 x (2 x matrix elements x tokens + 4 x width x visible pairs x layers).

    Forward plus twice that backward; the text's embedding, recomputation and the padding at a sequence's end are not counted.

    Args:
        config: the network.
        layout: of the clips.
        text_lengths: |text| of each clip, int [B].
        frame_mask: the step's random frame mask, bool [B, T, T]; None: all frames see each other.

    Returns:
        float64, of no dimension, on the lengths' device: nothing waits for a GPU here.
    """
    width, clips = config.hidden_size, len(text_lengths)
    matrices = config.num_layers * (4 * width**2 + 3 * width * config.feed_forward_size)
    used = layout.text_length + layout.video_tokens
    in_and_out = layout.video_tokens * 2 * width * config.bits
    pairs = visible_keys(layout, text_lengths, frame_mask, config.window)[:used].sum().double()
    return 3.0 * (2.0 * clips * (matrices * used + in_and_out) + 4.0 * width * config.num_layers * pairs)


def published_peak(name: str) -> float | None:
    """FLOP/s of a GPU by its name, None where it is not in `PEAKS`."""
    return next((flops for gpu, flops in PEAKS.items() if gpu in name), None)


def device_peak(device: torch.device, dtype: torch.dtype, configured: float | None = None) -> tuple[float, str]:
    """FLOP/s that MFU takes for the whole of a device, and where the number comes from.

    A GPU's published bfloat16 peak counts for FP8 steps too; float32 steps on a GPU, and everything on a CPU, are held against the
    rate of one large matrix product, measured here (some 0.1 s).

    Args:
        device: of this process.
        dtype: that it computes in.
        configured: the user's own number.
    """
    if configured is not None:
        return configured, "configured"
    if device.type == "cuda" and dtype != torch.float32:
        peak = published_peak(torch.cuda.get_device_name(device))
        if peak is not None:
            return peak, "published"
    return _matmul_rate(device, dtype), "measured"


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    side = MATMUL * (8 if device.type == "cuda" else 1)
    a = torch.ones(side, side, dtype=dtype, device=device)
    seconds = []
    with torch.no_grad():
        for _ in range(4):  # the first one warms up
            started = time.perf_counter()
            torch.mm(a, a)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
    return 2 * side**3 / min(seconds[1:])
