"""In which precision a device computes best."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]


def uses_bfloat16(precision: Precision, device_type: str) -> bool:
    """Whether to compute in bfloat16: "auto" does where the device has instructions for it.

    Args:
        precision: "auto", "float32" or "bfloat16".
        device_type: "cpu" or "cuda".
    """
    if precision != "auto":
        return precision == "bfloat16"
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # a processor without them emulates bfloat16, slower than float32
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
