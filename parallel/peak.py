"""The peak of a device, which the model FLOPs of a step are held against (MFU)."""

from __future__ import annotations

import time

import torch

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
