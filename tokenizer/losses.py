"""The terms of the tokenizer's objective (DESIGN section 2, Tokenizer objective)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.data_parallel import mean_over_ranks
from tokenizer.errors import check_each
from tokenizer.perceptual import Backbone


@dataclass(frozen=True)
class LossConfig:
    """Weights of the objective's terms.

    Args:
        l1, l2: of the absolute and the squared pixel error.
        motion: pixels count 1 + motion * |x - mean of x over time|, so that what moves is learnt beside a large still background.
        edge: of the absolute error of the differences between neighbouring pixels, which keeps outlines sharp.
        perceptual: of LPIPS.
        perceptual_backbone: "vgg" or "alex".
        perceptual_weights: a file with torchvision's weights of the backbone; null: where torch.hub keeps them.
        perceptual_untrained: the weight of the same distance through an *untrained* backbone, which takes the term's place on a machine
            without the backbone's weights; null: training stops there.
        gan: of the 3-D discriminator's judgement; 0: there is no discriminator.
        gan_adaptive: `gan` is relative to the gradients of reconstruction and judgement at the decoder's last layer (Esser et al. 2021).
        gan_start: the first step that a discriminator takes part in.
        lecam: of the LeCAM regulariser of the discriminator (Tseng et al. 2021).
        lecam_decay: of its running means.
        commitment: of the latent's distance to its code.
        entropy: of the per-sample entropy minus entropy_gamma times the batch's.
        entropy_beta: sharpness of the soft bits; null: d / 4.
        entropy_gamma: of the batch's entropy, which keeps all bits in use.
    """

    l1: float = 1.0
    l2: float = 0.0
    motion: float = 0.0
    edge: float = 0.0
    perceptual: float = 0.0
    perceptual_backbone: Backbone = "vgg"
    perceptual_weights: str | None = None
    perceptual_untrained: float | None = None
    gan: float = 0.0
    gan_adaptive: bool = True
    gan_start: int = 0
    lecam: float = 0.0
    lecam_decay: float = 0.99
    commitment: float = 0.02
    entropy: float = 0.05
    entropy_beta: float | None = None
    entropy_gamma: float = 1.0

    def __post_init__(self) -> None:
        weights = ("l1", "l2", "motion", "edge", "perceptual", "gan", "lecam", "commitment", "entropy", "gan_start")
        check_each(self, weights, lambda value: value >= 0, "be at least 0", "loss.")
        check_each(self, ("lecam_decay",), lambda value: 0 <= value < 1, "be from 0 to below 1", "loss.")


def reconstruction_loss(reconstruction: Tensor, video: Tensor, config: LossConfig) -> Tensor:
    """Weighted mean of l1 |e| + l2 e^2 + edge (|d e / dx| + |d e / dy|) over all pixels.

    Args:
        reconstruction, video: [B, 3, T, H, W] in [-1, 1].
        config: the weights.
    """
    error = reconstruction - video
    loss = config.l1 * error.abs() + config.l2 * error.square()
    if config.edge:
        # zeros behind the last column and row, so that all pixels keep their place
        along_x = F.pad(error.diff(dim=-1).abs(), (0, 1))
        along_y = F.pad(error.diff(dim=-2).abs(), (0, 0, 0, 1))
        loss = loss + config.edge * (along_x + along_y)
    if config.motion:
        moved = (video - video.mean(dim=2, keepdim=True)).abs().mean(dim=1, keepdim=True)  # [B, 1, T, H, W]
        loss = loss * (1 + config.motion * moved)
    return loss.mean()


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's hinge loss on its logits for clips and for their reconstructions (Lim and Ye 2017)."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


class LeCam(nn.Module):
    """The LeCAM regulariser: relu(D(x) - ema_fake)^2 + relu(ema_real - D(x'))^2, Eq. (4).

    The running means are over all ranks, and separate for images and clips, whose logits differ. Before the first update of a kind the
    regulariser is zero.

    Args:
        decay: of the running means.
    """

    means: Tensor

    def __init__(self, decay: float):
        super().__init__()
        self.decay = decay
        # rows: images, clips; columns: of real clips, of reconstructions, the number of updates
        self.register_buffer("means", torch.zeros(2, 3))

    def forward(self, real: Tensor, fake: Tensor, image: bool) -> Tensor:
        """Logits for clips and reconstructions -> a scalar, the mean over all patches."""
        mean_real, mean_fake, updates = self.means[0 if image else 1]
        loss = F.relu(real - mean_fake).square().mean() + F.relu(mean_real - fake).square().mean()
        return loss * (updates > 0)

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor, image: bool) -> None:
        """Moves the running means of this kind to the logits' means over all ranks; every rank must call it."""
        now = mean_over_ranks(torch.stack([real.float().mean(), fake.float().mean()]))
        row = self.means[0 if image else 1]
        row[:2] = torch.where(row[2] > 0, self.decay * row[:2] + (1 - self.decay) * now, now)
        row[2] += 1


def adaptive_weight(
    reconstruction: Tensor,
    features: Tensor,
    last_layer: nn.Module,
    pixel: Callable[[Tensor], Tensor],
    loss: Tensor,
    gan_loss: Tensor,
) -> Tensor:
    """|d loss / d W| / |d gan_loss / d W| for the weight W of the decoder's last layer (Esser et al. 2021, Eq. 7), at most 10^4.

    Taken from the gradients at the pixels, so that neither the rest of the decoder is walked nor a sharded parameter asked for its
    gradient.

    Args:
        reconstruction: float32 [B, 3, T, H, W], the decoder's output.
        features: what went into the last layer, [B, C, T, h, w].
        last_layer: the convolution.
        pixel: what brings its output [B, 3 p^2, T, h, w] to pixels.
        loss, gan_loss: scalars that depend on `reconstruction`.
    """
    weight = torch.zeros(last_layer.weight.shape, device=features.device, requires_grad=True)  # type: ignore[arg-type]
    parameters = {"weight": weight, "bias": torch.zeros(weight.shape[0], device=features.device)}
    # linear in the weight: its value does not matter for the gradient
    with torch.autocast(features.device.type, enabled=False):
        pixels = pixel(torch.func.functional_call(last_layer, parameters, (features.detach().float(),)))
    norms = []
    for one in (loss, gan_loss):
        (at_pixels,) = torch.autograd.grad(one, reconstruction, retain_graph=True)
        (at_weight,) = torch.autograd.grad(pixels, weight, at_pixels, retain_graph=True)
        norms.append(mean_over_ranks(at_weight).norm())
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()
