"""Does the objective with all terms pay? A small tokenizer on the moving shapes, with and without GAN and perceptual terms.

    python -m benchmarks.tokenizer_terms --out runs/tokenizer-terms --keep       2 cores, some ten minutes

Both arms have the same weights at the start, the same clips and the same steps. Where LPIPS's backbone has no weights on this machine an
untrained one takes its place, as `loss.perceptual_untrained` of the recipe says.

sharpness   spectral power above 0.125 cycles a pixel over the original's; 1 is as sharp as the original
dead_bits   share of the bits, over all scales, that are the same in over 99% of the tokens
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import hardware, report
from benchmarks.shapes_data import RECIPE, shapes
from data_pipelines.clips import ClipBatches, Clips
from evaluation.bit_usage import BitUsage
from evaluation.fidelity import high_frequency_energy, squared_error, ssim
from evaluation.round_trip import round_trip
from tokenizer import VideoTokenizer, settings
from tokenizer.train import train
from tokenizer.train_config import TokenizerTrainConfig

BATCH = 8


def main() -> None:
    """Trains both arms (or finds them trained) and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tokenizer-terms"))
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results/")
    args = parser.parse_args()
    training, validation = shapes(args.out)
    full = settings.load(TokenizerTrainConfig, RECIPE)
    plain = replace(full, loss=replace(full.loss, gan=0.0, perceptual=0.0, lecam=0.0))
    results: dict[str, Any] = {}
    for name, config in (("all_terms", full), ("without_gan_and_perceptual", plain)):
        tokenizer = train(config.resolved(len(training.sources)), ClipBatches(training, config.seed), args.out / name)
        assert tokenizer is not None
        results |= {f"{name}_{key}": value for key, value in measure(tokenizer, validation).items()}
    keys = ("psnr", "ssim", "sharpness", "dead_bits")
    print("| | " + " | ".join(keys) + " |")
    for name in ("all_terms", "without_gan_and_perceptual"):
        print(f"| {name} | " + " | ".join(f"{results[f'{name}_{key}']:.4g}" for key in keys) + " |")
    report("tokenizer_terms", hardware("cpu", torch.get_num_threads()), results, args.keep)


def measure(tokenizer: VideoTokenizer, clips: Clips) -> dict[str, float]:
    """Means over clips; dead bits over all of their tokens."""
    psnr, similarity, power, original_power, usage = [], [], 0.0, 0.0, []
    for start in range(0, len(clips.frames), BATCH):
        originals = clips.frames[start : start + BATCH]
        codes, others = round_trip(tokenizer, originals)
        usage.append(BitUsage.of(codes))
        for one, other in zip(originals, others):
            psnr.append(squared_error(one, other).psnr)
            similarity.append(ssim(one, other))
            power, original_power = power + high_frequency_energy(other), original_power + high_frequency_energy(one)
    return {
        "psnr": float(np.mean(psnr)),
        "ssim": float(np.mean(similarity)),
        "sharpness": power / original_power,
        "dead_bits": float(sum(usage[1:], usage[0]).dead.mean()),
    }


if __name__ == "__main__":
    main()
