"""The paper's recipes, built from shapes alone: sizes, tokens and steps against numbers computed by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from inference.model import VideoARTransformer
from parallel.memory import parameters
from pretrain.config import PretrainConfig
from pretrain.planning.shapes import Shapes, read_shapes
from pretrain.planning.storage import encoder_flops
from tokenizer import settings
from tokenizer.autoencoder import Encoder

CONFIGS = Path(__file__).parents[2] / "pretrain" / "configs"
BITS = 48


def squares(*sides: int) -> int:
    return sum(side * side for side in sides)


def weights(layers: int, width: int, condition: int) -> int:
    """4 h^2 of attention and 12 h^2 of the feed-forward network a layer with two norms; both projections of bits, 16 scale
    embeddings and the start token, the last norm, and the condition's own."""
    return layers * (16 * width**2 + 2 * width) + 2 * BITS * width + 17 * width + width + condition


# 102 classes; or a norm, a two-layer network with biases, and 256 null tokens of text features
CLASSES = {width: 102 * width for width in (1536, 2048)}
TEXT = 2048 + (2048 * 2560 + 2560) + (2560**2 + 2560) + 256 * 2048
# grids by `round` of side x ratio: 12x21 and 24x42 (height x width) on the sides 1, 2, 3, 4, 6, ...
WIDE_256 = 1 + 1 * 2 + 2 * 3 + 2 * 4 + 3 * 6 + 5 * 8 + 7 * 12 + 9 * 16 + 12 * 21
SQUARE_256 = squares(1, 2, 3, 4, 6, 8, 12, 16)
WIDE_512 = 1 + 1 * 2 + 2 * 3 + 2 * 4 + 3 * 6 + 5 * 8 + 7 * 12 + 9 * 16 + 14 * 24 + 18 * 32 + 24 * 42
SQUARE_512 = squares(1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
SQUARE_128 = squares(1, 2, 3, 4, 6, 8)

# parameters, their billions in the paper; then each stage's steps, learning rate, p_mask, and (tokens a clip, clips a step) by source
EXPECTED = {
    "ucf101-l": (weights(24, 1536, CLASSES[1536]), 906_375_168, 0.926, [(100_000, 1e-4, 0.0, [(5 * SQUARE_128, 256)])]),
    "ucf101-xl": (weights(32, 2048, CLASSES[2048]), 2_148_057_088, 2.0, [(100_000, 1e-4, 0.0, [(5 * SQUARE_128, 256)])]),
    "t2v-4b": (
        weights(36, 2560, TEXT),
        3_787_677_696,
        4.0,
        [
            (200_000, 1e-4, 0.1, [(SQUARE_256, 21 * 128), (5 * WIDE_256, 4 * 128)]),
            (50_000, 1e-4, 0.1, [(SQUARE_512, 5 * 256), (5 * WIDE_512, 256)]),
            (20_000, 5e-5, 0.1, [(frames * WIDE_512, 128) for frames in (9, 13, 17)]),
        ],
    ),
}  # fmt: skip


def load(name: str, *overrides: str) -> tuple[PretrainConfig, Shapes]:
    run = settings.load(PretrainConfig, CONFIGS / f"{name}.yaml", list(overrides)).rooted()
    return run, read_shapes(run)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_has_the_sizes_that_it_says(name: str) -> None:
    run, shapes = load(name)
    by_hand, count, billions, stages = EXPECTED[name]
    network = VideoARTransformer.empty(shapes.plan.model)
    built = sum(value.numel() for value in network.parameters())
    assert all(value.is_meta for value in network.parameters())
    assert built == by_hand == count == shapes.plan.model.parameter_count()
    assert count / 1e9 == pytest.approx(billions, rel=0.08)  # the paper's name for it
    # what the processes of the recipe's layout hold together; norms, embeddings and head are whole on each
    tensor = run.parallel.tensor_parallel_size
    held = parameters(shapes.plan.model, run.parallel, 0)
    matrices = sum(value.numel() for key, value in network.named_parameters() if "layers." in key and value.dim() == 2)
    assert tensor * held - (tensor - 1) * (count - matrices) == count

    print(f"\n{name}: {built:,} parameters")
    assert len(shapes.plan.stages) == len(stages)
    for stage, (steps, lr, p_mask, sources) in zip(shapes.plan.stages, stages):
        config, found = stage.config, []
        for source, manifest in zip(stage.sources, stage.manifests):
            schedule = manifest.buckets[source.bucket or 0].scale_schedule
            found.append((source.num_latent_frames * schedule.tokens_per_frame, source.batch_size))
        share = sum(source.proportion for source in stage.sources)
        a_step = sum(one.proportion / share * tokens * clips for one, (tokens, clips) in zip(stage.sources, found))
        print(f"  {config.name}: {config.steps:,} steps of {a_step:,.0f} tokens; a clip has", [one for one, _ in found])
        assert (config.steps, config.lr or run.optimizer.lr, config.p_mask) == (steps, lr, p_mask)
        assert found == sources
        assert (config.error_correction.p_min, config.error_correction.p_max, config.error_correction.delta) == (
            0,
            0.25,
            0.01,
        )
    optimizer = run.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (1e-4, (0.9, 0.95), 0.05)
    assert run.network.window is None and run.parallel.precision == "bfloat16" and run.parallel.recompute == "full"


def test_the_4b_goes_from_images_and_short_clips_to_long_clips_only() -> None:
    _, shapes = load("t2v-4b")
    seen = [(stage.model.num_frames, stage.model.schedule.grid) for stage in shapes.plan.stages]
    assert seen == [(5, (12, 21)), (5, (24, 42)), (17, (24, 42))]
    assert [{source.num_latent_frames for source in stage.sources} for stage in shapes.plan.stages] == [
        {1, 5},
        {1, 5},
        {9, 13, 17},
    ]
    assert {bucket.clip_frames for bucket in shapes.plan.stages[2].manifests[0].buckets} == {33, 49, 65}
    assert (shapes.plan.model.fps, shapes.plan.model.bits, shapes.plan.model.text_dim) == (8.0, 48, 2048)


def test_every_number_of_a_recipe_says_where_it_comes_from() -> None:
    for name in EXPECTED:
        text = (CONFIGS / f"{name}.yaml").read_text()
        body = text[text.index("expected:") : text.index("checkpoint_every")]
        numbers = [line for line in body.splitlines() if re.search(r"\w: [\[{]?(\w+: )?[\d.]", line.split("#")[0])]
        assert len(numbers) > 12
        for line in numbers:
            # the long clips' shapes are a block under one comment
            assert re.search(r"# .*(paper|ours)", line) or re.match(r" {10}- \{variant: 512x", line), f"{name}: {line}"


@pytest.mark.parametrize("name, gigaflops", [("ucf101-l", 3053), ("t2v-4b", 3053)])
def test_the_tokenizers_of_the_recipes_cost_what_was_counted(name: str, gigaflops: int) -> None:
    """Of 17x128x128 (`encoder_tflop` in benchmarks/results/tokenizer.json): the same sizes serve both recipes."""
    _, shapes = load(name)
    assert encoder_flops(shapes.tokenizer.autoencoder, 128, 128, 17) / 1e9 == pytest.approx(gigaflops, rel=1e-3)
    with torch.device("meta"):
        encoder = Encoder(shapes.tokenizer.autoencoder)
    for frames, height, width in ((1, 64, 96), (9, 192, 160), (25, 64, 64)):
        with FlopCounterMode(display=False) as counter:
            encoder(torch.empty(1, 3, frames, height, width, device="meta"))
        planned = encoder_flops(shapes.tokenizer.autoencoder, height, width, frames)
        assert planned == pytest.approx(counter.get_total_flops(), rel=0.02)
