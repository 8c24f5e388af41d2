"""A tokenizer that is as good as untrained."""

from pathlib import Path

import torch

from tokenizer import VideoTokenizer
from tokenizer.autoencoder import AutoencoderConfig
from tokenizer.tokenizer import TokenizerConfig

DIM, SCALES = 8, 2


def write_tokenizer(folder: Path, constant_channel: int | None = None) -> Path:
    """Saves one of 8 bits and at most 2 scales; a latent channel may be the same everywhere."""
    torch.manual_seed(0)
    autoencoder = AutoencoderConfig(dim=DIM, base_width=8, multipliers=(1, 2, 2), blocks=1, patch=4)
    tokenizer = VideoTokenizer(TokenizerConfig(autoencoder, num_scales=SCALES))
    if constant_channel is not None:
        with torch.no_grad():
            tokenizer.encoder.conv_out.weight[constant_channel] = 0
            tokenizer.encoder.conv_out.bias[constant_channel] = 5  # more than all scales together take away
    tokenizer.save_pretrained(folder)
    return folder


def through(tokenizer: VideoTokenizer, clip) -> torch.Tensor:
    """uint8 [T, H, W, 3] -> what comes back, the long way: float64 [T, H, W, 3] of whole numbers."""
    video = torch.tensor(clip).permute(3, 0, 1, 2)[None] / 127.5 - 1
    return torch.round((tokenizer.decode(tokenizer.encode(video))[0].permute(1, 2, 3, 0).double() + 1) * 127.5)
