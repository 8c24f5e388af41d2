"""An image tokenizer in the published Infinity layout, in plain 2-D modules: what inflation is measured against.

Written from the layout's description alone; it shares no code with `tokenizer/`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Conv(nn.Module):
    def __init__(self, *sizes, **options):
        super().__init__()
        self.conv = nn.Conv2d(*sizes, **options)

    def forward(self, x):
        return self.conv(x)


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)

    def forward(self, x):
        return self.norm(x)


def swish(x):
    return x * torch.sigmoid(x)


class Residual(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.norm1, self.conv1 = Norm(a), Conv(a, b, 3, padding=1)
        self.norm2, self.conv2 = Norm(b), Conv(b, b, 3, padding=1)
        if a != b:
            self.nin_shortcut = Conv(a, b, 1)

    def forward(self, x):
        h = self.conv1(swish(self.norm1(x)))
        h = self.conv2(swish(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Down(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = Conv(width, width, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = Conv(width, width, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def middle(width):
    mid = nn.Module()
    mid.block_1, mid.block_2 = Residual(width, width), Residual(width, width)
    return mid


class Encoder(nn.Module):
    def __init__(self, base, multipliers, blocks, d, patch):
        super().__init__()
        self.conv_in = Conv(3 * patch**2, base, 3, padding=1)
        self.down = nn.ModuleList()
        width = base
        for level, multiplier in enumerate(multipliers):
            down = nn.Module()
            down.block = nn.ModuleList()
            for _ in range(blocks):
                down.block.append(Residual(width, base * multiplier))
                width = base * multiplier
            if level < len(multipliers) - 1:
                down.downsample = Down(width)
            self.down.append(down)
        self.mid = middle(width)
        self.norm_out, self.conv_out = Norm(width), Conv(width, d, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for down in self.down:
            for block in down.block:
                x = block(x)
            if hasattr(down, "downsample"):
                x = down.downsample(x)
        x = self.mid.block_2(self.mid.block_1(x))
        return self.conv_out(swish(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, base, multipliers, blocks, d, patch):
        super().__init__()
        width = base * multipliers[-1]
        self.conv_in = Conv(d, width, 3, padding=1)
        self.mid = middle(width)
        ups = []
        for level in reversed(range(len(multipliers))):
            up = nn.Module()
            up.block = nn.ModuleList()
            for _ in range(blocks + 1):
                up.block.append(Residual(width, base * multipliers[level]))
                width = base * multipliers[level]
            if level > 0:
                up.upsample = Up(width)
            ups.insert(0, up)
        self.up = nn.ModuleList(ups)
        self.norm_out, self.conv_out = Norm(width), Conv(width, 3 * patch**2, 3, padding=1)

    def forward(self, x):
        x = self.mid.block_2(self.mid.block_1(self.conv_in(x)))
        for up in reversed(self.up):
            for block in up.block:
                x = block(x)
            if hasattr(up, "upsample"):
                x = up.upsample(x)
        return self.conv_out(swish(self.norm_out(x)))


class ImageTokenizer(nn.Module):
    """Images [B, 3, H, W] <-> bits, one bool tensor [B, h, w, d] a scale. `patch` above 1 is this project's own."""

    def __init__(self, base=32, multipliers=(1, 2, 4, 4, 4), blocks=2, d=16, patch=1):
        super().__init__()
        self.d, self.patch = d, patch
        self.encoder = Encoder(base, multipliers, blocks, d, patch)
        self.decoder = Decoder(base, multipliers, blocks, d, patch)
        self.quantizer = nn.Module()
        self.quantizer.lfq = nn.Module()
        self.quantizer.lfq.register_buffer("mask", 2 ** torch.arange(d - 1, -1, -1))
        self.quantize = self.quantizer  # the published module has it under both names, and so has its state dict

    def latent(self, images):
        """[B, 3, H, W] -> [B, d, H / 16, W / 16]."""
        batch, _, height, width = images.shape
        p = self.patch
        patches = images.view(batch, 3, height // p, p, width // p, p).permute(
            0, 1, 3, 5, 2, 4
        )  # [B, 3, p, p, H/p, W/p]
        return self.encoder(patches.reshape(batch, 3 * p * p, height // p, width // p))

    def encode(self, images, scales):
        """The bits, and how close to zero the closest residual came."""
        residual = self.latent(images)
        bits, margin = [], math.inf
        for grid in scales:
            coarse = F.interpolate(residual, size=grid, mode="area")
            unit = F.normalize(coarse, dim=1)  # [B, d, h, w]
            one = unit > 0
            value = torch.where(one, 1.0, -1.0).to(residual) / math.sqrt(self.d)
            residual = residual - F.interpolate(value, size=scales[-1], mode="bilinear", align_corners=False)
            bits.append(one.permute(0, 2, 3, 1))
            margin = min(margin, coarse.abs().min().item())
        return bits, margin

    def features(self, bits):
        """The sum of all scales, [B, d, h, w]."""
        total = 0
        for one in bits:
            value = (one.permute(0, 3, 1, 2).to(next(self.parameters())) * 2 - 1) / math.sqrt(self.d)
            total = total + F.interpolate(value, size=bits[-1].shape[1:3], mode="bilinear", align_corners=False)
        return total

    def pixels(self, features):
        """[B, d, h, w] -> [B, 3, H, W] in [-1, 1]."""
        patches = self.decoder(features)
        batch, _, height, width = patches.shape
        p = self.patch
        pixels = patches.view(batch, 3, p, p, height, width).permute(0, 1, 4, 2, 5, 3)  # [B, 3, H/p, p, W/p, p]
        return pixels.reshape(batch, 3, height * p, width * p).clamp(-1, 1)

    def decode(self, bits):
        return self.pixels(self.features(bits))


def image_tokenizer(seed=0, **sizes):
    """One whose weights keep signals at about unit size, leave no key without an effect, and send some pixels into the clamp."""
    torch.manual_seed(seed)
    network = ImageTokenizer(**sizes)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".norm." in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter.ndim == 4:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(std=0.05)
    return network.eval()
