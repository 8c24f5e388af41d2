"""The video tokenizer: autoencoder and quantiser together, as one saved thing that other rooms load."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenizer.autoencoder import AutoencoderConfig, Decoder, Encoder
from tokenizer.clip_shape import SPATIAL_COMPRESSION, check_num_frames, check_size, check_video
from tokenizer.codes import Codes
from tokenizer.errors import UserError
from tokenizer.quantizer import MultiScaleQuantizer
from tokenizer.resample import DownMode
from tokenizer.scales import ScaleSchedule, natural_scales
from tokenizer.streaming import decode_stream, encode_stream
from tokenizer.tiling import Carries, Tiling, run_tiled


@dataclass(frozen=True)
class TokenizerConfig:
    """What a tokenizer is.

    Args:
        autoencoder: its sizes.
        num_scales: the most scales that a grid gets; below that it gets its natural number (6 for 8x8, 8 for 16x16), so that a
            larger grid's first scales keep the meaning of a smaller one's.
        residual_down: how residuals come to a scale's grid, "area" or "bilinear".
    """

    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    num_scales: int = 16
    residual_down: DownMode = "area"


class VideoTokenizer(nn.Module):
    """Video <-> codes.

    Args:
        config: the sizes.
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.autoencoder)
        self.decoder = Decoder(config.autoencoder)
        self.quantizer = MultiScaleQuantizer(config.autoencoder.dim, config.residual_down)
        self.tiling: Tiling | None = None  # set it for frames that do not fit into memory
        # convolutions over [B, T, H, W, C] memory are up to twice as fast on CPUs, and what tensor cores want
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def schedule_for(self, height: int, width: int) -> ScaleSchedule:
        """The scale schedule of frames of height x width pixels.

        Raises:
            UserError: a side is not a multiple of 16.
        """
        check_size(height, width)
        grid = (height // SPATIAL_COMPRESSION, width // SPATIAL_COMPRESSION)
        return ScaleSchedule.for_grid(*grid, num_scales=min(self.config.num_scales, natural_scales(max(grid))))

    def encode_latent(self, video: Tensor) -> Tensor:
        """Video [B, 3, 1+4n, H, W] in [-1, 1] -> latent [B, d, 1+n, H/16, W/16].

        Raises:
            UserError: the number of frames is not 1+4n, a side is not a multiple of 16, or the video is not float RGB in [-1, 1].
        """
        check_video(video)
        check_num_frames(video.shape[2])
        return self._encode(video)

    def encode_chunk(self, video: Tensor, carries: Carries | None = None) -> Tensor:
        """`encode_latent` of a part of a stream: 1+4n frames at its beginning, 4n later; `carries` is what `{}` has become so far."""
        check_video(video)
        return self._encode(video, carries)

    def _encode(self, video: Tensor, carries: Carries | None = None) -> Tensor:
        if self.tiling is None or max(video.shape[-2:]) <= self.tiling.size:
            return self.encoder(video, None if carries is None else carries.setdefault((0, 0), {}))
        return run_tiled(self.encoder, video, self.tiling.size, self.tiling.overlap, carries)

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Latent [B, d, 1+n, H, W] -> video [B, 3, 1+4n, 16H, 16W], clamped to [-1, 1]."""
        return self.decode_chunk(latent)

    def decode_chunk(self, latent: Tensor, carries: Carries | None = None) -> Tensor:
        """`decode_latent` of a part of a stream; see `encode_chunk`."""
        tile = (
            None
            if self.tiling is None
            else (self.tiling.size // SPATIAL_COMPRESSION, self.tiling.overlap // SPATIAL_COMPRESSION)
        )
        if tile is None or max(latent.shape[-2:]) <= tile[0]:
            video = self.decoder(latent, None if carries is None else carries.setdefault((0, 0), {}))
        else:
            video = run_tiled(self.decoder, latent, *tile, carries)
        return video.clamp(-1, 1)

    def quantize(self, latent: Tensor, schedule: ScaleSchedule | None = None) -> Codes:
        """Latent [B, d, T, H, W] -> Codes; schedule None: the natural one of the grid."""
        height, width = (side * SPATIAL_COMPRESSION for side in latent.shape[-2:])
        return self.quantizer.quantize(latent, schedule or self.schedule_for(height, width))

    def dequantize(self, codes: Codes) -> Tensor:
        """Codes -> latent [B, d, T, H, W] in the decoder's type and on its device."""
        return self.quantizer.dequantize(codes).to(next(self.decoder.parameters()))

    @torch.no_grad()
    def encode(self, video: Tensor, schedule: ScaleSchedule | None = None, latents_at_once: int | None = None) -> Codes:
        """Video [B, 3, 1+4n, H, W] in [-1, 1] -> Codes.

        Args:
            video: the clips; one frame is an image.
            schedule: None: `schedule_for` the frames' size.
            latents_at_once: encode chunk by chunk, so many latent frames each, at memory that does not grow with the length; None:
                the whole clip at once.

        Raises:
            UserError: as `encode_latent`.
        """
        if latents_at_once is None:
            return self.quantize(self.encode_latent(video), schedule)
        check_video(video)
        check_num_frames(video.shape[2])
        return Codes.concatenate(encode_stream(self, [video], schedule, latents_at_once))

    @torch.no_grad()
    def decode(self, codes: Codes, latents_at_once: int | None = None) -> Tensor:
        """Codes -> video [B, 3, 1+4n, 16H, 16W] in [-1, 1]; `latents_at_once` as in `encode`."""
        if latents_at_once is None:
            return self.decode_latent(self.dequantize(codes))
        if latents_at_once < 1:
            raise UserError(f"{latents_at_once} latent frames at once decode nothing: give at least 1.")
        parts = (
            codes.frames(start, min(start + latents_at_once, codes.num_frames))
            for start in range(0, codes.num_frames, latents_at_once)
        )
        return torch.cat(list(decode_stream(self, parts)), dim=2)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of configuration and weights: codes of one tokenizer mean nothing to another. Freeze the weights before asking."""
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors; the configuration comes last, so that half a save is not taken for whole."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = directory / f".{uuid.uuid4().hex}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, weights)
        os.replace(weights, directory / "model.safetensors")
        config = directory / f".{uuid.uuid4().hex}.json"
        config.write_text(json.dumps(asdict(self.config) | {"fingerprint": self.fingerprint}, indent=2))
        os.replace(config, directory / "config.json")

    @classmethod
    def from_pretrained(cls, directory: str | Path, device: str | torch.device = "cpu") -> VideoTokenizer:
        """Reads what `save_pretrained` wrote.

        Raises:
            UserError: a file is missing or damaged, or the weights do not fit the configuration.
        """
        directory = Path(directory)
        for name in ("config.json", "model.safetensors"):
            if not (directory / name).is_file():
                raise UserError(
                    f"{directory} holds no tokenizer: {name} is missing; train one with `videoar tokenizer train` or name another folder."
                )
        try:
            content = json.loads((directory / "config.json").read_text())
            fingerprint = content.pop("fingerprint", None)
            autoencoder = content.pop("autoencoder")
            autoencoder["multipliers"] = tuple(autoencoder["multipliers"])
            tokenizer = cls(TokenizerConfig(autoencoder=AutoencoderConfig(**autoencoder), **content))
            tokenizer.load_state_dict(load_file(directory / "model.safetensors"))
        except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"the tokenizer in {directory} can't be read ({' '.join(str(error).split())[:200]}): train or copy it again."
            ) from error
        if fingerprint and fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"the weights in {directory} are not those that its config.json was written with: copy the tokenizer again."
            )
        return tokenizer.to(device).eval()
