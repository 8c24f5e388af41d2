"""The objective's terms against their formulas."""

import pytest
import torch
from torch import nn

from tests.tokenizer.test_tokenizer import SMALL, make
from tokenizer.data_parallel import Ranks
from tokenizer.discriminator import Discriminator, DiscriminatorConfig
from tokenizer.errors import UserError
from tokenizer.losses import LeCam, LossConfig, adaptive_weight, hinge_loss
from tokenizer.objective import Generator, Objective, Reconstruction

ALONE = Ranks(0, 1, torch.device("cpu"))


def test_hinge_loss():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge_loss(real, fake).item() == pytest.approx((0.25 + 0.5) / 2)


def test_lecam_follows_its_running_means_separately_for_images_and_clips():
    lecam = LeCam(decay=0.9)
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -2.0])
    assert lecam(real, fake, image=True).item() == 0  # nothing is known yet
    lecam.update(real, fake, image=True)  # means 2 and -1.5
    assert lecam(real, fake, image=False).item() == 0
    expected = (2.5**2 + 4.5**2) / 2 + (3.0**2 + 4.0**2) / 2
    assert lecam(real, fake, image=True).item() == pytest.approx(expected)
    lecam.update(torch.tensor([4.0]), torch.tensor([0.5]), image=True)
    assert lecam.means[0].tolist() == pytest.approx([0.9 * 2 + 0.1 * 4, 0.9 * -1.5 + 0.05, 2])
    assert lecam.means[1].tolist() == [0, 0, 0]


def test_the_discriminator_takes_clips_and_single_frames():
    torch.manual_seed(0)
    judge = Discriminator(DiscriminatorConfig(base_width=8, levels=3))
    clip = torch.rand(2, 3, 17, 64, 64)
    assert judge(clip).shape == (2, 1, 5, 6, 6)
    image = judge(clip[:, :, :1])
    assert image.shape == (2, 1, 1, 6, 6)
    # one frame through the whole kernels meets zeros before and behind it: the same
    padded = [layer for layer in judge.layers if isinstance(layer, nn.Conv3d)]
    features = clip[:, :, :1]
    for layer in judge.layers:
        features = nn.Conv3d.forward(layer, features) if layer in padded else layer(features)
    torch.testing.assert_close(image, features)
    other = clip.clone()
    other[1] = 0
    torch.testing.assert_close(judge(other)[0], judge(clip)[0])  # no statistics over the batch


def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer():
    tokenizer = make(SMALL).train()
    video = torch.rand(2, 3, 5, 32, 32) * 2 - 1
    pixels, features = tokenizer.decoder(tokenizer.encode_latent(video), with_features=True)
    loss, gan = (pixels - video).square().mean(), pixels.sin().mean()
    weight = tokenizer.decoder.conv_out.weight
    expected = torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() / (
        torch.autograd.grad(gan, weight, retain_graph=True)[0].norm() + 1e-4
    )
    decoder = tokenizer.decoder
    found = adaptive_weight(pixels, features, decoder.conv_out, decoder.to_pixels, loss, gan)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    loss.backward()  # the graph is still there


def result_for(generator, video):
    return Reconstruction(**generator(video, with_features=True))


def test_every_term_is_reported_by_itself_and_weighted_as_told():
    config = LossConfig(
        l1=1.0, perceptual=0.7, perceptual_backbone="alex", perceptual_untrained=0.3, gan=0.1, gan_adaptive=False,
        commitment=0.02, entropy=0.05, entropy_gamma=0.5, gan_start=3,
    )  # fmt: skip
    torch.manual_seed(0)
    generator = Generator(make(SMALL).train(), "float32")
    objective = Objective(config, DiscriminatorConfig(8, 2), ALONE)
    video = torch.rand(2, 3, 1, 32, 32) * 2 - 1
    result = result_for(generator, video)
    loss, terms = objective.generator_loss(result, video, 2, generator)
    assert "gan" not in terms  # it has not started
    loss, terms = objective.generator_loss(result, video, 3, generator)
    expected = (
        terms["reconstruction"] + 0.3 * terms["perceptual"] + 0.1 * terms["gan"] + 0.02 * terms["commitment"]
        + 0.05 * (terms["entropy_sample"] - 0.5 * terms["entropy_batch"])
    )  # fmt: skip
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(terms["reconstruction"], (result.video - video).abs().mean())
    loss.backward()
    assert all(p.grad is None and p.requires_grad for p in objective.discriminator.parameters())
    judge_loss, judge_terms = objective.discriminator_loss(result_for(generator, video), video, generator)
    assert judge_loss.item() == pytest.approx(judge_terms["discriminator"].item())
    judge_loss.backward()
    assert all(p.grad is not None for p in objective.discriminator.parameters())


def test_lpips_without_its_weights_is_never_silent(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    sizes = DiscriminatorConfig()
    with pytest.raises(UserError, match="vgg16.* is not there.* Or set loss.perceptual_untrained"):
        Objective(LossConfig(perceptual=1.0), sizes, ALONE)
    off = Objective(LossConfig(perceptual=1.0, perceptual_untrained=0.0), sizes, ALONE)
    assert off.perceptual is None and "the term is left out" in capsys.readouterr().err
    instead = Objective(LossConfig(perceptual=1.0, perceptual_untrained=0.25, perceptual_backbone="alex"), sizes, ALONE)
    assert instead.perceptual_weight == 0.25 and instead.perceptual.untrained
    assert "an untrained backbone with weight 0.25" in capsys.readouterr().err


def test_impossible_discriminators():
    with pytest.raises(UserError, match="0 levels"):
        DiscriminatorConfig(levels=0)
    with pytest.raises(UserError, match="48 channels, which do not divide"):
        DiscriminatorConfig(base_width=24)
    with pytest.raises(UserError, match="loss.gan is -1"):
        LossConfig(gan=-1)
