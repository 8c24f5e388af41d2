"""Does 3-D inflation pay? An image tokenizer's weights against random ones as the beginning of a video tokenizer.

    python -m benchmarks.tokenizer_inflation --out runs/tokenizer-inflation --figure docs/inflation.png --keep

Some ten minutes on 2 cores. A small image tokenizer is trained on single frames of the moving shapes, written in the layout of the
published ones (`deflate`), read back and inflated; then the same training on clips runs from it and from random weights. `steps_share`:
the steps after which the inflated run's validation loss is first below the random run's last one, over all steps.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.report import hardware, report
from benchmarks.shapes_data import RECIPE, shapes
from data_pipelines.clips import ClipBatches, to_batch
from tokenizer import VideoTokenizer, settings
from tokenizer.inflation import autoencoder_config, deflate, inflate_, read_image_checkpoint
from tokenizer.train import train
from tokenizer.train_config import BatchSpec, Phase, TokenizerTrainConfig
from tokenizer.wandb_log import WandbConfig


def main() -> None:
    """Trains the three tokenizers (or finds them trained), prints and draws the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tokenizer-inflation"))
    parser.add_argument("--figure", type=Path, help="a PNG for the curves")
    parser.add_argument("--image-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results/")
    args = parser.parse_args()
    training, validation = shapes(args.out)
    recipe = settings.load(TokenizerTrainConfig, RECIPE)
    recipe = replace(
        recipe,
        loss=replace(recipe.loss, gan=0.0, perceptual=0.0, lecam=0.0),
        ema_decay=0.0,
        wandb=WandbConfig(mode="disabled"),
    )
    batches = ClipBatches(training, recipe.seed)

    images = replace(recipe, phases=(Phase((BatchSpec(1, 64, 16),), args.image_steps),))
    image_tokenizer = train(images, batches, args.out / "image")
    assert image_tokenizer is not None
    file = args.out / "image.pth"
    torch.save({"vae": deflate(image_tokenizer)}, file)
    state = read_image_checkpoint(file)
    config = replace(recipe.tokenizer, autoencoder=autoencoder_config(state))
    inflated = VideoTokenizer(config)
    inflate_(inflated, state)
    inflated.save_pretrained(args.out / "inflated_start")

    def held_out():
        for start in range(0, 64, 8):
            yield to_batch(validation.frames[start : start + 8, :9], 64)

    clips = replace(
        recipe,
        phases=(Phase((BatchSpec(9, 64, 4),), args.steps),),
        tokenizer=config,
        continuous_share=0.0,
        validate_every=max(1, args.steps // 30),
    )
    curves = {}
    for name, start in (("random", None), ("inflated", str(args.out / "inflated_start"))):
        train(replace(clips, start_from=start), batches, args.out / name, validation=held_out)
        lines = [json.loads(line) for line in (args.out / name / "metrics.jsonl").read_text().splitlines()]
        curves[name] = [
            (line["step"], line["validation/reconstruction"]) for line in lines if "validation/psnr" in line
        ]
    target = curves["random"][-1][1]
    reached = next((step for step, value in curves["inflated"] if value <= target), None)
    results = {
        "random_final_validation_loss": round(target, 4),
        "inflated_final_validation_loss": round(curves["inflated"][-1][1], 4),
        "inflated_steps_to_random_final": reached,
        "steps": args.steps,
        "image_steps": args.image_steps,
        "steps_share": None if reached is None else round(reached / args.steps, 3),
    }
    if args.figure:
        draw(curves, target, args.figure)
    report("tokenizer_inflation", hardware("cpu", torch.get_num_threads()), results, args.keep)


def draw(curves: dict[str, list[tuple[int, float]]], target: float, file: Path) -> None:
    """Validation loss against steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for name, colour in (("random", "#c44e52"), ("inflated", "#4c72b0")):
        axes.plot(*zip(*curves[name]), label=f"{name} start", color=colour)
    axes.axhline(target, color="#c44e52", linewidth=0.8, linestyle=":")
    axes.set(xlabel="steps on clips", ylabel="validation loss (reconstruction)", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
