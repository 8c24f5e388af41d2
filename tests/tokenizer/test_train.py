"""The tokenizer's trainer: exact resume, refusal of another recipe, the effect of its settings."""

import json
from dataclasses import replace

import pytest
import torch

from tokenizer import UserError, VideoTokenizer
from tokenizer.autoencoder import AutoencoderConfig
from tokenizer.losses import LossConfig, reconstruction_loss
from tokenizer.tokenizer import TokenizerConfig
from tokenizer.train import BatchSpec, Phase, TokenizerTrainConfig, train

CONFIG = TokenizerTrainConfig(
    tokenizer=TokenizerConfig(
        AutoencoderConfig(dim=8, base_width=8, multipliers=(1, 1, 1), blocks=1, patch=4), num_scales=2
    ),
    phases=(Phase(3, (BatchSpec(1, 32, 4),)), Phase(3, (BatchSpec(5, 32, 2), BatchSpec(5, 48, 2)))),
    lr=1e-2,
    warmup_steps=2,
    continuous_share=0.4,
    checkpoint_every=2,
    log_every=1,
)


def clips(step, spec):
    generator = torch.Generator().manual_seed(step)
    return torch.rand(spec.batch_size, 3, spec.num_frames, spec.size, spec.size, generator=generator) * 2 - 1


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines}


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_exactly(tmp_path):
    whole = train(CONFIG, clips, tmp_path / "whole")

    def until_five(step, spec):
        if step == 5:
            raise Killed
        return clips(step, spec)

    with pytest.raises(Killed):
        train(CONFIG, until_five, tmp_path / "cut")
    assert not (tmp_path / "cut" / "config.json").exists()
    seen = []

    def remember(step, spec):
        seen.append(step)
        return clips(step, spec)

    resumed = train(CONFIG, remember, tmp_path / "cut")
    assert seen == [4, 5]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    seen.clear()
    assert (
        train(CONFIG, remember, tmp_path / "cut").fingerprint == whole.fingerprint and not seen
    )  # finished: nothing is done again
    assert resumed.fingerprint == whole.fingerprint == VideoTokenizer.from_pretrained(tmp_path / "cut").fingerprint


def test_another_recipe_in_the_same_folder_is_refused(tmp_path):
    short = replace(CONFIG, phases=(Phase(1, (BatchSpec(1, 32, 1),)),))
    train(short, clips, tmp_path)
    with pytest.raises(UserError, match="another recipe"):
        train(replace(short, lr=1e-3), clips, tmp_path)


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    def poisoned(step, spec):
        return clips(step, spec) * (float("nan") if step == 2 else 1)

    with pytest.raises(UserError, match="nan at step 2"):
        train(CONFIG, poisoned, tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2 and all(torch.isfinite(value).all() for value in state["model"].values())


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(UserError, match="6 frames"):
        train(replace(CONFIG, phases=(Phase(1, (BatchSpec(6, 16, 1),)),)), clips, tmp_path)
    with pytest.raises(UserError, match="height 20"):
        train(replace(CONFIG, phases=(Phase(1, (BatchSpec(1, 20, 1),)),)), clips, tmp_path)


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
    two = replace(CONFIG, phases=(Phase(3, (BatchSpec(1, 32, 2),)),))
    assert (
        train(two, clips, tmp_path / "a").fingerprint
        != train(replace(two, **change), clips, tmp_path / "b").fingerprint
    )
