"""The tokenizer's objective: reconstruction + perceptual + GAN + commitment + entropy, each with its weight (DESIGN section 2).

`Generator` is the part that data parallelism wraps; `Objective` judges what it returns.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.data_parallel import Ranks, gather, unwrap, wrap
from tokenizer.discriminator import Discriminator, DiscriminatorConfig
from tokenizer.errors import UserError
from tokenizer.losses import LeCam, LossConfig, adaptive_weight, hinge_loss, reconstruction_loss
from tokenizer.perceptual import Perceptual
from tokenizer.precision import Precision, uses_bfloat16
from tokenizer.tokenizer import VideoTokenizer


@dataclass(frozen=True)
class Reconstruction:
    """What `Generator` returns.

    Args:
        video: float32 [B, 3, T, H, W], not clamped.
        features: what went into the decoder's last layer, where it was asked for.
        losses: the quantiser's, unweighted.
        usage: [K, d], the share of ones of each bit on each scale.
    """

    video: Tensor
    features: Tensor | None
    losses: dict[str, Tensor]
    usage: Tensor


class Generator(nn.Module):
    """Video -> its reconstruction through the quantiser.

    Args:
        tokenizer: what is trained.
        precision: of the convolutions.
    """

    def __init__(self, tokenizer: VideoTokenizer, precision: Precision):
        super().__init__()
        self.tokenizer = tokenizer
        self.precision: Precision = precision

    def forward(self, video: Tensor, bypass: Tensor | None = None, with_features: bool = False) -> dict[str, Any]:
        """The fields of a `Reconstruction`.

        Args:
            video: [B, 3, T, H, W] in [-1, 1].
            bypass: bool [B], the clips that are decoded from their continuous latents.
            with_features: also what the adaptive GAN weight needs.
        """
        tokenizer = self.tokenizer
        schedule = tokenizer.schedule_for(*video.shape[-2:])
        with self.autocast(video):
            latent = tokenizer.encoder(video)
        latent = latent.float()
        quantizer = tokenizer.quantizer(latent, schedule)
        code = quantizer.quantized
        if bypass is not None:
            code = torch.where(bypass.view(-1, 1, 1, 1, 1), latent, code)
        with self.autocast(video):
            decoded = tokenizer.decoder(code, with_features=with_features)
        reconstruction, features = decoded if with_features else (decoded, None)
        return {
            "video": reconstruction.float(),
            "features": features,
            "losses": quantizer.losses,
            "usage": quantizer.usage,
        }

    def autocast(self, video: Tensor) -> torch.autocast:
        """bfloat16 where the settings and the device want it."""
        kind = video.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=uses_bfloat16(self.precision, kind))


class Objective:
    """All terms, with the networks that only training needs.

    Args:
        config: the weights.
        sizes: of the discriminator.
        ranks: this process.

    Raises:
        UserError: LPIPS is wanted and its backbone's weights are not there.
    """

    def __init__(self, config: LossConfig, sizes: DiscriminatorConfig, ranks: Ranks):
        self.config = config
        self.perceptual, self.perceptual_weight = _perceptual(config, ranks)
        kind = None if self.perceptual is None else "untrained" if self.perceptual.untrained else "LPIPS"
        self.perceptual_term = f"{kind} with weight {self.perceptual_weight}"
        if len(everywhere := set(gather([self.perceptual_term]))) > 1:
            raise UserError(
                f"processes differ in their perceptual term ({', '.join(sorted(everywhere))}): put the backbone's weights on all machines."
            )
        self.discriminator: nn.Module | None = None
        if config.gan:
            # small, and judging without training it would confuse sharded parameters: DDP with every strategy
            self.discriminator = wrap(Discriminator(sizes).to(ranks.device), ranks, "ddp")
        self.lecam = LeCam(config.lecam_decay).to(ranks.device)

    def uses_gan(self, step: int) -> bool:
        """Does the discriminator take part in this step?"""
        return self.discriminator is not None and step >= self.config.gan_start

    def generator_loss(
        self, result: Reconstruction, video: Tensor, step: int, generator: Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The tokenizer's loss and its terms, each by itself and unweighted.

        Args:
            result: of `generator` for `video`.
            video: [B, 3, T, H, W] in [-1, 1].
            step: decides whether the discriminator takes part.
            generator: for the adaptive weight, and its precision.
        """
        config = self.config
        terms = {"reconstruction": reconstruction_loss(result.video, video, config)}
        loss = terms["reconstruction"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(result.video, video).mean()
            loss = loss + self.perceptual_weight * terms["perceptual"]
        if self.uses_gan(step):
            assert self.discriminator is not None
            judge = unwrap(self.discriminator).requires_grad_(False)
            with generator.autocast(video):
                logits = judge(result.video)
            judge.requires_grad_(True)
            terms["gan"] = -logits.float().mean()
            weight = loss.new_tensor(config.gan)
            if config.gan_adaptive and result.features is not None:
                decoder = generator.tokenizer.decoder
                weight = weight * adaptive_weight(
                    result.video, result.features, decoder.conv_out, decoder.to_pixels, loss, terms["gan"]
                )
            terms["gan_weight"] = weight
            loss = loss + weight * terms["gan"]
        terms |= result.losses
        loss = loss + config.commitment * terms["commitment"]
        loss = loss + config.entropy * (terms["entropy_sample"] - config.entropy_gamma * terms["entropy_batch"])
        return loss, terms

    def discriminator_loss(
        self, result: Reconstruction, video: Tensor, generator: Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss and its terms; also moves LeCAM's running means."""
        assert self.discriminator is not None
        image = video.shape[2] == 1
        with generator.autocast(video):
            # one call for both: data parallelism counts calls
            logits = self.discriminator(torch.cat([video, result.video.detach()]))
        real, fake = logits.float().chunk(2)
        terms = {"discriminator": hinge_loss(real, fake), "logits_real": real.mean(), "logits_fake": fake.mean()}
        loss = terms["discriminator"]
        if self.config.lecam:
            terms["lecam"] = self.lecam(real, fake, image)
            loss = loss + self.config.lecam * terms["lecam"]
            self.lecam.update(real.detach(), fake.detach(), image)
        return loss, terms


def _perceptual(config: LossConfig, ranks: Ranks) -> tuple[Perceptual | None, float]:
    if not config.perceptual:
        return None, 0.0
    try:
        return Perceptual(config.perceptual_backbone, config.perceptual_weights).to(ranks.device), config.perceptual
    except UserError as error:
        if config.perceptual_untrained is None:
            raise UserError(f"{error} Or set loss.perceptual_untrained to go on without them.") from error
        weight = config.perceptual_untrained
        if ranks.rank == 0:
            instead = (
                f"an untrained backbone with weight {weight} takes its place" if weight else "the term is left out"
            )
            print(f"LPIPS: {error} As loss.perceptual_untrained says, {instead}.", file=sys.stderr)
        if not weight:
            return None, 0.0
        return Perceptual(config.perceptual_backbone, untrained=True).to(ranks.device), weight
