"""Validation of a tokenizer while it trains: how close reconstructions come, which bits are used, and a picture of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tokenizer.data_parallel import Ranks, mean_over_ranks
from tokenizer.losses import LossConfig, reconstruction_loss
from tokenizer.objective import Reconstruction
from tokenizer.perceptual import Perceptual
from tokenizer.pixels import to_pixels
from tokenizer.quantizer import are_dead

ValidationSource = Callable[[], Iterator[Tensor]]
"""Gives the same batches each time, float32 [B, 3, T, H, W] in [-1, 1]; every process sees all of them and takes its share."""

SHOWN_CLIPS, SHOWN_FRAMES = 4, 5


@torch.no_grad()
def validate(
    generator: nn.Module,
    batches: ValidationSource,
    loss: LossConfig,
    perceptual: Perceptual | None,
    ranks: Ranks,
) -> tuple[dict[str, float], np.ndarray]:
    """Means over all clips, and a picture.

    Args:
        generator: the wrapped `Generator`.
        batches: the clips.
        loss: weights of the reconstruction loss.
        perceptual: None: no perceptual distance.
        ranks: this process.

    Returns:
        {"validation/psnr" (dB), "validation/reconstruction", "validation/perceptual", "validation/dead_bits" (share),
        "validation/bit_entropy/scale_k" (bits, of 1)}, and uint8 [height, width, 3] with originals above reconstructions.
    """
    sums: dict[str, Tensor] = {}
    usage: Tensor | None = None
    picture: np.ndarray | None = None
    for whole in batches():
        rows = whole[ranks.rank :: ranks.size]
        weight = float(len(rows))
        if not weight:
            rows = whole[:1]  # sharded weights need every process in every call
        video = rows.to(ranks.device)
        result = Reconstruction(**generator(video))
        error = (result.video.clamp(-1, 1) - video).square().flatten(1).mean(dim=1)  # [B]
        values = {
            "psnr": (-10 * torch.log10((error / 4).clamp(min=1e-10))).mean(),
            "reconstruction": reconstruction_loss(result.video, video, loss),
        }
        if perceptual is not None:
            values["perceptual"] = perceptual(result.video, video).mean()
        for name, value in (values | {"clips": torch.ones((), device=video.device)}).items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + weight * value
        part = weight * result.usage
        usage = part if usage is None or usage.shape != part.shape else usage + part
        if picture is None:
            picture = _picture(video, result.video)
    names = sorted(sums)
    totals = dict(zip(names, mean_over_ranks(torch.stack([sums[name] for name in names])).tolist()))
    assert usage is not None and picture is not None
    share = mean_over_ranks(usage) / totals["clips"]  # [K, d]
    entropy = -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share)) / np.log(2)
    report = {f"validation/{name}": value / totals["clips"] for name, value in totals.items() if name != "clips"}
    report["validation/dead_bits"] = are_dead(share).float().mean().item()
    for scale, value in enumerate(entropy.mean(dim=1).tolist()):
        report[f"validation/bit_entropy/scale_{scale}"] = value
    return report, picture


def _picture(video: Tensor, reconstruction: Tensor) -> np.ndarray:
    """[B, 3, T, H, W], twice -> each clip's frames in a row, its reconstruction in the row below: uint8 [height, width, 3]."""
    frames = torch.linspace(0, video.shape[2] - 1, min(SHOWN_FRAMES, video.shape[2])).round().long().tolist()
    pairs = torch.stack([video, reconstruction], dim=1)[:SHOWN_CLIPS, :, :, frames]  # [b, 2, 3, t, H, W]
    pixels = to_pixels(pairs).swapaxes(2, 3)  # [b, 2, t, H, W, 3] -> [b, 2, H, t, W, 3]
    return pixels.reshape(-1, pixels.shape[3] * pixels.shape[4], 3)


def write_picture(picture: np.ndarray, file: Path) -> None:
    """Writes a picture as PNG, enlarged to at least some 600 pixels across."""
    file.parent.mkdir(parents=True, exist_ok=True)
    factor = max(1, round(600 / picture.shape[1]))
    image = Image.fromarray(picture)
    image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST).save(file)
