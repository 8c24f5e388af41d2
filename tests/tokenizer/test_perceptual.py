"""LPIPS with the real package; the backbone's weights are made here in torchvision's layout, untrained."""

import lpips
import pytest
import torch
import torchvision

from tokenizer import UserError
from tokenizer.perceptual import FILES, Perceptual, weights_file


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    torch.manual_seed(3)
    file = tmp_path_factory.mktemp("weights") / FILES["alex"]
    torch.save(torchvision.models.alexnet().state_dict(), file)
    return file


def clips():
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(2, 3, 3, 64, 64, generator=generator) * 2 - 1
    return video, (video + 0.2 * torch.randn(video.shape, generator=generator)).clamp(-1, 1)


def test_the_weights_of_a_file_are_those_that_the_package_would_use(alexnet):
    video, other = clips()
    mine = Perceptual("alex", alexnet)
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for name, value in theirs.net.state_dict().items():
        value.copy_(torch.load(alexnet, weights_only=True)[f"features.{name.split('.', 1)[1]}"])
    expected = torch.stack([theirs(other[:, :, t], video[:, :, t]).flatten() for t in range(3)]).mean(0)
    torch.testing.assert_close(mine(other, video), expected)
    assert (mine(video, video) == 0).all()


def test_an_untrained_backbone_is_always_the_same_and_leaves_the_random_numbers_alone():
    video, other = clips()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = Perceptual("alex", untrained=True)
    assert torch.equal(torch.rand(3), expected)
    two = Perceptual("alex", untrained=True)
    assert torch.equal(one(other, video), two(other, video)) and (one(other, video) > 0).all()
    other = other.requires_grad_()
    one.train()(other, video).sum().backward()
    assert other.grad.abs().sum() > 0 and not any(p.requires_grad for p in one.parameters())


def test_missing_or_foreign_weights_are_named(tmp_path, alexnet):
    with pytest.raises(UserError, match="nowhere.pth is not there: copy torchvision's vgg16"):
        weights_file("vgg", tmp_path / "nowhere.pth")
    with pytest.raises(UserError, match="does not hold torchvision's weights"):
        Perceptual("vgg", alexnet)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match="does not hold torchvision's weights"):
        Perceptual("alex", tmp_path / "text.pth")
