"""LPIPS (Zhang et al. 2018, the `lpips` package): a term of the tokenizer's objective and a measure of its reconstructions.

The package brings the calibration of the layers; the backbone's ImageNet weights (VGG-16 or AlexNet of torchvision) must be on the
machine, since nothing is downloaded while training.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from tokenizer.errors import UserError

Backbone = Literal["vgg", "alex"]

FILES: dict[Backbone, str] = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}
"""torchvision's names of the weight files, as `torch.hub` keeps them."""


class Perceptual(nn.Module):
    """Perceptual distance of clips, frame by frame.

    Args:
        backbone: "vgg" (for training) or "alex" (for scores).
        weights: a file with torchvision's weights of the backbone; None: where torch.hub keeps them (`weights_file`).
        untrained: use an untrained backbone, all layers and channels counting alike; its distances are not LPIPS.

    Raises:
        UserError: the file is missing or holds other weights.
    """

    def __init__(self, backbone: Backbone = "vgg", weights: str | Path | None = None, untrained: bool = False):
        super().__init__()
        from lpips import LPIPS  # importing it takes a second, which who does not use it should not wait

        self.untrained = untrained
        with warnings.catch_warnings(), torch.random.fork_rng([]):
            warnings.simplefilter("ignore")  # the package calls torchvision by its old argument names
            torch.manual_seed(0)  # an untrained backbone is the same in every process and after a resume
            self.metric = LPIPS(net=backbone, pnet_rand=True, lpips=not untrained, verbose=False)
        if not untrained:
            self._load_backbone(weights_file(backbone, weights))
        self.requires_grad_(False)

    def forward(self, reconstruction: Tensor, video: Tensor) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1], twice -> the distance of each clip, the mean over its frames, [B].

        Frames below 32 pixels a side are enlarged, which the backbone's poolings need.
        """
        batch = video.shape[0]
        # [B, 3, T, H, W] -> [B * T, 3, H, W]
        one, other = (clip.transpose(1, 2).flatten(0, 1).float() for clip in (reconstruction, video))
        small = min(one.shape[-2:])
        if small < 32:
            one, other = (nn.functional.interpolate(frames, scale_factor=-(-32 // small)) for frames in (one, other))
        return self.metric(one, other).view(batch, -1).mean(dim=1)

    def train(self, mode: bool = True) -> Perceptual:
        """Stays in evaluation mode: the package's layers have dropout."""
        return super().train(False)

    def _load_backbone(self, file: Path) -> None:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            layers = {
                name: state[f"features.{name.split('.', 1)[1]}"] for name in self.metric.net.state_dict()
            }  # sliceK.N.weight <- features.N.weight
            self.metric.net.load_state_dict(layers)
        except (KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            what = " ".join(str(error).split())[:120]
            raise UserError(
                f"{file} does not hold torchvision's weights of the backbone ({what}): give the file that torchvision publishes."
            ) from error


def weights_file(backbone: Backbone, weights: str | Path | None = None) -> Path:
    """Where the backbone's weights must lie.

    Raises:
        UserError: they do not.
    """
    file = Path(torch.hub.get_dir(), "checkpoints", FILES[backbone]) if weights is None else Path(weights)
    if not file.is_file():
        raise UserError(
            f"LPIPS needs the weights of its backbone, and {file} is not there: copy torchvision's {FILES[backbone]} there, or name "
            "another file."
        )
    return file
