"""The tokenizer's trainer: exact resume, refusal of another recipe, the effect of its settings."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokenizer import UserError, VideoTokenizer
from tokenizer.autoencoder import AutoencoderConfig
from tokenizer.data_parallel import Ranks
from tokenizer.discriminator import DiscriminatorConfig
from tokenizer.losses import LossConfig, reconstruction_loss
from tokenizer.tokenizer import TokenizerConfig
from tokenizer.train import Trainer, train
from tokenizer.train_config import BatchSpec, Phase, TokenizerTrainConfig
from tokenizer.wandb_log import WandbConfig

HOUSE = Path(__file__).resolve().parents[2]

CONFIG = TokenizerTrainConfig(
    wandb=WandbConfig(mode="disabled"),
    tokenizer=TokenizerConfig(
        AutoencoderConfig(dim=8, base_width=8, multipliers=(1, 1, 1), blocks=1, patch=4), num_scales=2
    ),
    phases=(Phase((BatchSpec(1, 32, 4),), 3), Phase((BatchSpec(5, 32, 2), BatchSpec(5, 48, 2)), 3)),
    lr=1e-2,
    warmup_steps=2,
    continuous_share=0.4,
    checkpoint_every=2,
    log_every=1,
)


def clips(step, spec):
    generator = torch.Generator().manual_seed(step)
    return torch.rand(spec.batch_size, 3, spec.num_frames, spec.size, spec.size, generator=generator) * 2 - 1


class Source:
    """A `ClipSource` out of a function."""

    replaced = 0

    def __init__(self, function=clips):
        self.function = function

    def __call__(self, step, spec):
        return self.function(step, spec)

    def names(self, step, spec):
        return [f"clip {step}.{place}" for place in range(spec.batch_size)]


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line}


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_exactly(tmp_path):
    whole = train(CONFIG, Source(clips), tmp_path / "whole")

    def until_five(step, spec):
        if step == 5:
            raise Killed
        return clips(step, spec)

    with pytest.raises(Killed):
        train(CONFIG, Source(until_five), tmp_path / "cut")
    assert not (tmp_path / "cut" / "config.json").exists()
    seen = []

    def remember(step, spec):
        seen.append(step)
        return clips(step, spec)

    resumed = train(CONFIG, Source(remember), tmp_path / "cut")
    assert seen == [4, 5]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    seen.clear()
    assert (
        train(CONFIG, Source(remember), tmp_path / "cut").fingerprint == whole.fingerprint and not seen
    )  # finished: nothing is done again
    assert resumed.fingerprint == whole.fingerprint == VideoTokenizer.from_pretrained(tmp_path / "cut").fingerprint


def test_another_recipe_in_the_same_folder_is_refused(tmp_path):
    short = replace(CONFIG, phases=(Phase((BatchSpec(1, 32, 1),), 1),))
    train(short, Source(clips), tmp_path)
    with pytest.raises(UserError, match="another recipe"):
        train(replace(short, seed=1), Source(clips), tmp_path)
    train(replace(short, lr=1e-3), Source(clips), tmp_path)  # rates may change


def test_a_tokenizer_that_was_not_trained_here_is_not_taken_for_the_result(tmp_path):
    VideoTokenizer(CONFIG.tokenizer).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="this command did not train"):
        train(replace(CONFIG, start_from=str(tmp_path)), Source(clips), tmp_path)


def test_a_run_goes_on_with_another_rate_and_without_its_start(tmp_path):
    start = tmp_path / "start"
    VideoTokenizer(CONFIG.tokenizer).save_pretrained(start)
    config = replace(CONFIG, start_from=str(start))

    def until_five(step, spec):
        if step == 5:
            raise Killed
        return clips(step, spec)

    with pytest.raises(Killed):
        train(config, Source(until_five), tmp_path / "run")
    (tmp_path / "run" / ".checkpoint.1.pt").write_bytes(b"left by a kill")
    shutil.rmtree(start)
    train(replace(config, lr=5e-3), Source(clips), tmp_path / "run")
    assert not list((tmp_path / "run").glob(".checkpoint*"))
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["lr"] == pytest.approx(5e-3 * 0.5 * (1 + math.cos(math.pi * 5 / 6)))


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    def poisoned(step, spec):
        return clips(step, spec) * (float("nan") if step == 2 else 1)

    with pytest.raises(UserError, match="not finite at step 2"):
        train(CONFIG, Source(poisoned), tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2 and all(torch.isfinite(value).all() for value in state["model"].values())


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(UserError, match="6 frames"):
        train(replace(CONFIG, phases=(Phase((BatchSpec(6, 16, 1),), 1),)), Source(clips), tmp_path)
    with pytest.raises(UserError, match="height 20"):
        train(replace(CONFIG, phases=(Phase((BatchSpec(1, 20, 1),), 1),)), Source(clips), tmp_path)


def test_each_weight_of_the_loss_counts():
    video, reconstruction = torch.zeros(1, 3, 2, 1, 1), torch.full((1, 3, 2, 1, 1), 0.5)
    video[:, :, 1] = 1.0  # moved by 0.5 from its mean in both frames
    assert reconstruction_loss(reconstruction, video, LossConfig(l1=1, l2=0)).item() == pytest.approx(0.5)
    assert reconstruction_loss(reconstruction, video, LossConfig(l1=0, l2=2)).item() == pytest.approx(0.5)
    assert reconstruction_loss(reconstruction, video, LossConfig(l1=1, l2=0, motion=2)).item() == pytest.approx(1.0)
    ramp = (
        torch.arange(4.0).view(1, 1, 1, 1, 4).expand(1, 3, 2, 2, 4)
    )  # differences of 1 along x in three of four places
    assert reconstruction_loss(ramp, torch.zeros_like(ramp), LossConfig(l1=0, l2=0, edge=2)).item() == pytest.approx(
        1.5
    )


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 2e-2}, {"warmup_steps": 5}, {"weight_decay": 0.5}, {"grad_clip": 1e-3}, {"continuous_share": 0.0}, {"seed": 1},
        {"loss": LossConfig(commitment=1.0)}, {"loss": LossConfig(entropy=1.0)},
    ],
)  # fmt: skip
def test_each_setting_changes_the_run(tmp_path, change):
    two = replace(CONFIG, phases=(Phase((BatchSpec(1, 32, 2),), 3),))
    assert (
        train(two, Source(clips), tmp_path / "a").fingerprint
        != train(replace(two, **change), Source(clips), tmp_path / "b").fingerprint
    )


FULL = replace(
    CONFIG,
    loss=LossConfig(
        l1=1.0, perceptual=1.0, perceptual_backbone="alex", perceptual_untrained=0.1, gan=0.5, gan_start=1, lecam=0.1, lecam_decay=0.5
    ),
    discriminator=DiscriminatorConfig(base_width=4, levels=2),
    discriminator_lr=3e-3,
    ema_decay=0.8,
    precision="float32",
)  # fmt: skip


def test_everything_on_it_still_resumes_exactly(tmp_path):
    """Tokenizer, discriminator, both optimizers, LeCAM's means and the running mean of weights go on where they were."""
    whole = train(FULL, Source(clips), tmp_path / "whole")

    def until_three(step, spec):
        if step == 3:
            raise Killed
        return clips(step, spec)

    with pytest.raises(Killed):
        train(FULL, Source(until_three), tmp_path / "cut")
    resumed = train(FULL, Source(clips), tmp_path / "cut")
    assert resumed.fingerprint == whole.fingerprint
    lines = [
        [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("whole", "cut")
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 6
    expected = {
        "reconstruction", "perceptual", "gan", "gan_weight", "commitment", "entropy_sample", "entropy_batch", "discriminator",
        "lecam", "logits_real", "logits_fake", "grad_norm", "grad_norm_discriminator", "loss", "psnr", "bit_usage", "dead_bits",
        "lr", "step", "replaced",
    }  # fmt: skip
    assert set(lines[0][-1]) == expected and lines[0][-1]["lecam"] > 0
    assert "gan" not in lines[0][0]  # it starts at step 1


def test_the_running_mean_is_what_is_saved(tmp_path):
    config = replace(CONFIG, phases=(Phase((BatchSpec(1, 32, 4),), 4),), ema_decay=0.25)
    tmp_path.mkdir(exist_ok=True)
    trainer = Trainer(config, tmp_path, Ranks(0, 1, torch.device("cpu")))
    name, weights = "encoder.conv_in.weight", []

    def remember(step, spec):
        weights.append(trainer.inner.tokenizer.state_dict()[name].clone())
        return clips(step, spec)

    assert trainer.run(Source(remember), None)
    weights.append(trainer.inner.tokenizer.state_dict()[name].clone())  # before and after each of the four steps
    mean = weights[0]
    for update, value in enumerate(weights[1:]):
        decay = min(0.25, (1 + update) / (10 + update))
        mean = decay * mean + (1 - decay) * value
    saved = trainer.finish().state_dict()[name]
    torch.testing.assert_close(saved, mean)
    assert not torch.allclose(saved, weights[-1], atol=1e-5)


def test_recomputation_changes_nothing(tmp_path):
    one = train(FULL, Source(clips), tmp_path / "one")
    two = train(replace(FULL, recompute=True), Source(clips), tmp_path / "two")
    assert one.fingerprint == two.fingerprint


def test_validation_is_written_with_a_picture(tmp_path):
    def batches():
        for seed in (100, 101):
            yield clips(seed, BatchSpec(5, 32, 3))

    config = replace(FULL, validate_every=3)
    tokenizer = train(config, Source(clips), tmp_path, validation=batches)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "validation/psnr" in line]
    assert [line["step"] for line in found] == [3, 6]
    video = torch.cat(list(batches()))
    with torch.no_grad():  # training and validation decode the same codes as anybody
        error = (tokenizer.decode(tokenizer.encode(video)) - video).square().flatten(1).mean(1)
    assert found[-1]["validation/psnr"] == pytest.approx((-10 * torch.log10(error / 4)).mean().item(), abs=1e-3)
    usage = torch.stack([b.float().mean((0, 1, 2, 3)) for b in tokenizer.encode(video).bits])
    entropy = -(torch.xlogy(usage, usage) + torch.xlogy(1 - usage, 1 - usage)).mean(1) / torch.tensor(2.0).log()
    assert found[-1]["validation/bit_entropy/scale_1"] == pytest.approx(entropy[1].item(), abs=1e-4)
    picture = np.asarray(Image.open(tmp_path / "validation" / "step_0000006.png"))
    factor = picture.shape[1] // (5 * 32)
    assert picture.shape == (3 * 2 * 32 * factor, 5 * 32 * factor, 3)
    original = ((video[0, :, 0].permute(1, 2, 0) + 1) * 127.5).round().numpy()
    np.testing.assert_array_equal(picture[: 32 * factor : factor, : 32 * factor : factor], original)


def test_the_bad_sample_is_named_before_the_update(tmp_path):
    def poisoned(step, spec):
        batch = clips(step, spec)
        if step == 3:
            batch[1, 0, 2, 5, 5] = float("inf")
        return batch

    with pytest.raises(UserError, match=r"values from .* to inf|not finite at step 3 .*clips clip 3.1"):
        train(FULL, Source(poisoned), tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2


def test_a_start_from_other_weights(tmp_path):
    first = train(CONFIG, Source(clips), tmp_path / "first")
    config = replace(CONFIG, start_from=str(tmp_path / "first"), lr=1e-12)
    again = train(config, Source(clips), tmp_path / "again")
    for name, value in first.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=1e-8, rtol=0)
    wide = replace(
        config,
        tokenizer=TokenizerConfig(AutoencoderConfig(dim=16, base_width=8, multipliers=(1, 1, 1), blocks=1, patch=4)),
    )
    with pytest.raises(UserError, match="has dim 8 instead of 16"):
        train(wide, Source(clips), tmp_path / "wide")


def test_epochs_become_steps():
    phase = Phase((BatchSpec(1, 32, 10), BatchSpec(5, 32, 30)), epochs=3)
    assert phase.resolved(100).steps == 15  # 300 clips in batches of 20 on average
    with pytest.raises(UserError, match="give steps or epochs"):
        Phase((BatchSpec(1, 32, 1),), 3, 4.0)
    assert replace(CONFIG, phases=(phase,)).resolved(100).batch_spec(1).num_frames == 5


def test_compiled_it_computes_the_same(tmp_path):
    config = replace(CONFIG, phases=(Phase((BatchSpec(1, 32, 4),), 2),), precision="float32")
    train(config, Source(clips), tmp_path / "plain")
    train(replace(config, compile=True), Source(clips), tmp_path / "compiled")
    plain, compiled = losses(tmp_path / "plain"), losses(tmp_path / "compiled")
    assert compiled[1] == pytest.approx(plain[1], rel=5e-4) and compiled[2] == pytest.approx(plain[2], rel=1e-3)


# AdamW's first updates make lr out of any rounding error in a gradient that is zero, so the rate is small where rounding may differ
SLOW = replace(FULL, lr=1e-6, discriminator_lr=1e-6, validate_every=3)


def held_out():
    yield clips(100, BatchSpec(5, 32, 3))  # an odd number, for two processes


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_equal_one(tmp_path, strategy):
    """The same global batches give the same losses, gradients and checkpoints, and another number of processes goes on from them."""
    train(SLOW, Source(clips), tmp_path / "one", validation=held_out)
    launch(tmp_path / "two", strategy)
    one, two = (losses(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for step, values in one.items():
        assert two[step] == pytest.approx(values, rel=1e-3), step
    psnr = [
        [line["validation/psnr"] for line in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
         if "validation/psnr" in line]
        for name in ("one", "two")
    ]  # fmt: skip
    assert len(psnr[0]) == 2 and psnr[1] == pytest.approx(psnr[0], rel=1e-4)

    def until_five(step, spec):
        if step == 5:
            raise Killed
        return clips(step, spec)

    with pytest.raises(Killed):
        train(SLOW, Source(until_five), tmp_path / "cut one")
    launch(tmp_path / "cut", strategy, stop_at=5)
    assert not (tmp_path / "cut" / "config.json").exists()
    mine, theirs = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("cut", "cut one"))
    for part in ("model", "ema", "discriminator"):
        assert mine[part].keys() == theirs[part].keys()
    for part in ("optimizer", "discriminator_optimizer"):
        for number, moments in theirs[part]["state"].items():
            assert mine[part]["state"][number]["step"] == moments["step"] == 4 - (part != "optimizer")
            for name in ("exp_avg", "exp_avg_sq"):
                found, wanted = mine[part]["state"][number][name], moments[name]
                assert (found - wanted).norm() <= 1e-3 * wanted.norm() + 1e-7, (part, number, name)
    torch.testing.assert_close(mine["lecam"]["means"], theirs["lecam"]["means"], rtol=1e-4, atol=1e-6)
    train(SLOW, Source(clips), tmp_path / "cut")
    resumed = losses(tmp_path / "cut")
    for step in (5, 6):
        assert resumed[step] == pytest.approx(one[step], rel=1e-3), step


def launch(out, strategy, stop_at=None):
    words = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "tests.tokenizer.train_ranks",
    ]
    command = [sys.executable, *words, str(out), strategy, str(stop_at or "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(command, cwd=HOUSE, env=environment, capture_output=True, text=True, timeout=300)
    if stop_at is None:
        assert done.returncode == 0, done.stderr[-3000:]
