"""The pipeline: prompts, images or videos in, video frames out.

from inference import VideoARPipeline
pipe = VideoARPipeline.from_pretrained("runs/demo/model")
pipe("a red circle moving left slowly", seed=0).save("circle.mp4")
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.checkpoint import StoredWeights, fingerprint, load_model, read_config, save_model
from inference.fast import Weights, prepare
from inference.frames import to_frames
from inference.guidance import Guidance
from inference.model import VideoARTransformer
from inference.sampler import sample_frames
from inference.video_io import read_image, read_video
from tokenizer import Codes, UserError, VideoTokenizer
from tokenizer.clip_shape import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from tokenizer.pixels import from_pixels, to_pixels
from tokenizer.progress import Meter
from tokenizer.scales import ScaleSchedule
from tokenizer.streaming import decode_stream
from tokenizer.text import TextEncoder, text_encoder
from tokenizer.video_file import write_video

PIXELS_A_TOKEN, FRAMES_A_LATENT = SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION


@dataclass(frozen=True)
class VideoOutput:
    """What a pipeline returns.

    Args:
        frames: uint8 [T, H, W, 3]; a list of them if a list was asked for. Given frames come first, as the tokenizer sees them.
        codes: the bits, B clips; None for several shots.
        given_frames: how many of the frames were given.
        fps: frames a second.
    """

    frames: Any
    codes: Codes | None
    given_frames: int
    fps: float

    def save(self, file: str | Path) -> None:
        """Writes the clip to .mp4, .gif or .png; several clips to file-0.mp4, file-1.mp4, ..."""
        if not isinstance(self.frames, list):
            return write_video(self.frames, file, self.fps)
        for index, frames in enumerate(self.frames):
            write_video(frames, Path(file).with_stem(f"{Path(file).stem}-{index}"), self.fps)


@dataclass(frozen=True)
class _Request:
    """What is to be generated, checked.

    Args:
        text, lengths: conditions, a row a clip.
        seeds: one a clip.
        schedule: the grids.
        latent_frames: of the result.
        given: codes of the first frames, one clip for all; None: there are none.
    """

    text: Tensor
    lengths: Tensor
    seeds: list[int]
    schedule: ScaleSchedule
    latent_frames: int
    given: Codes | None

    @property
    def known(self) -> int:
        """Given frames."""
        return 0 if self.given is None else 1 + FRAMES_A_LATENT * (self.given.num_frames - 1)


class VideoARPipeline:
    """A transformer, its tokenizer and its text encoder.

    Args:
        model: the network.
        tokenizer: turns given frames into codes and codes into frames.
        encoder: turns prompts into features; None for a class-conditional model.
        class_names: names of the classes, which then serve as prompts.
    """

    def __init__(
        self,
        model: VideoARTransformer,
        tokenizer: VideoTokenizer,
        encoder: TextEncoder | None = None,
        class_names: Sequence[str] | None = None,
    ):
        self.model, self.tokenizer, self.encoder = model, tokenizer, encoder
        self.class_names = list(class_names) if class_names else None
        self.weights: Weights = "plain"
        self._stored: Path | None = None
        self.config = model.config
        if tokenizer.quantizer.dim != self.config.bits:
            raise UserError(
                f"the tokenizer makes {tokenizer.quantizer.dim} bits a token and the model {self.config.bits}: "
                "use the tokenizer that the model was trained with."
            )
        if not self.config.num_classes and (encoder is None or encoder.dim != self.config.text_dim):
            raise UserError(
                f"the model needs a text encoder of {self.config.text_dim} features: give the one of its training."
            )

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        text_encoder_spec: str | None = None,
        weights: Weights = "plain",
        compiled: bool = False,
    ) -> VideoARPipeline:
        """Reads what `save_pretrained` or `videoar export` wrote.

        Args:
            directory: config.json, model.safetensors and tokenizer/.
            device: where everything runs.
            dtype: of the transformer; None: as stored.
            text_encoder_spec: in the recorded one's place, for an encoder that lies elsewhere on this machine.
            weights: how the transformer holds them, see `fast.prepare`; a pipeline whose weights are not "plain" only generates.
            compiled: on a GPU, compiled kernels and CUDA graphs: the first clip of each shape takes longer, all later ones less.

        Raises:
            UserError: a part is missing, damaged, or of another model.
        """
        content = read_config(directory)
        tokenizer = VideoTokenizer.from_pretrained(Path(directory) / "tokenizer", device)
        expected = content.get("tokenizer_fingerprint")
        if expected != tokenizer.fingerprint:
            raise UserError(
                f"{directory} was trained on codes of the tokenizer {expected}, but its tokenizer folder holds "
                f"{tokenizer.fingerprint}: put the right tokenizer there."
            )
        model = load_model(directory, device, dtype)
        encoder = None
        if not model.config.num_classes:
            spec = text_encoder_spec or content.get("text_encoder", "bytes")
            encoder = text_encoder(spec, model.config.text_dim, str(device))
            recorded = content.get("text_encoder_fingerprint", encoder.fingerprint)
            if recorded != encoder.fingerprint:
                raise UserError(
                    f"the text encoder {spec} is not the one that {directory} was trained with: give that one."
                )
        pipe = cls(model, tokenizer, encoder, content.get("class_names"))
        prepare(model, weights, compiled)
        pipe.weights = weights
        if weights != "plain" or dtype is not None:
            pipe._stored = Path(directory)
        return pipe

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the tokenizer first and the model's config.json last, so that half a save is not taken for a whole.

        Raises:
            UserError: the weights were prepared for generating.
        """
        if self.weights != "plain":
            raise UserError(f"{self.weights} weights can't be saved: load the model with plain ones.")
        self.tokenizer.save_pretrained(Path(directory) / "tokenizer")
        save_model(self.model, directory, self.metadata())

    def metadata(self) -> dict[str, Any]:
        """What config.json records beside the network."""
        content: dict[str, Any] = {"tokenizer_fingerprint": self.tokenizer.fingerprint}
        if self.encoder is not None:
            content |= {"text_encoder": self.encoder.spec, "text_encoder_fingerprint": self.encoder.fingerprint}
        return content | ({"class_names": self.class_names} if self.class_names else {})

    @cached_property
    def fingerprint(self) -> str:
        """Of the model as it is stored, however its weights are held here."""
        return fingerprint(
            self.config, self.model.state_dict() if self._stored is None else StoredWeights(self._stored)
        )

    @property
    def numbers(self) -> dict[str, str]:
        """How the weights are held, where they are not plain float32: for a result's metadata."""
        dtype = str(self.model.head.weight.dtype).removeprefix("torch.")
        return ({} if dtype == "float32" else {"dtype": dtype}) | (
            {} if self.weights == "plain" else {"weights": self.weights}
        )

    @property
    def device(self) -> torch.device:
        """Where the transformer runs."""
        return self.model.head.weight.device

    @property
    def fps(self) -> float:
        """Frames a second of the results."""
        return self.config.fps

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the results in pixels."""
        height, width = self.config.schedule.grid
        return height * PIXELS_A_TOKEN, width * PIXELS_A_TOKEN

    @property
    def _trained_frames(self) -> int:
        return 1 + FRAMES_A_LATENT * (self.config.num_frames - 1)

    def frames_for(self, seconds: float) -> int:
        """The number of frames, 1+4n, that comes nearest to a duration."""
        return 1 + FRAMES_A_LATENT * max(0, round((seconds * self.config.fps - 1) / FRAMES_A_LATENT))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_frames: int | None = None,
        guidance: Guidance = "t2v",
        temperature: float = 1.0,
        seed: int | Sequence[int] = 0,
        image: Any = None,
        video: Any = None,
        class_label: int | Sequence[int] | None = None,
        given_frames: int | None = None,
        size: tuple[int, int] | None = None,
        window: int | None = None,
        batch_size: int = 16,
        progress: bool = False,
    ) -> VideoOutput:
        """Generates one clip a prompt.

        Args:
            prompt: a text or several; a class name where the model knows classes.
            num_frames: frames of the result, 1+4n, given ones included; None: as trained. More than trained: a sliding window.
            guidance: "t2v", "ucf", a number, or a function of (latent frame, scale).
            temperature: 0: the likelier bits; 1: as trained.
            seed: clip i draws from seed + i, whatever the batch size; or one seed a clip.
            image: the first frame: a file, a PIL image, or uint8 [H, W, 3].
            video: frames to go on from: a file, or uint8 [T, H, W, 3] at the model's rate.
            class_label: class ids in the prompt's place.
            given_frames: frames taken from the video's end, 1+4m; None: as many as fit into half of the result.
            size: (height, width) in pixels; None: as trained.
            window: latent frames that a frame sees; None: the model's own limit.
            batch_size: clips at a time.
            progress: shows progress.

        Raises:
            UserError: arguments that do not fit each other or the model.
        """
        single = not isinstance(class_label if prompt is None else prompt, list | tuple)
        wanted = self._request(prompt, class_label, seed, num_frames, image, video, given_frames, size)
        schedule, clips, codes = wanted.schedule, [], []
        rounds = range(0, len(wanted.seeds), max(1, batch_size))
        with (
            Meter("generating latent frames", len(rounds) * wanted.latent_frames)
            if progress
            else nullcontext() as meter
        ):
            for start in rounds:
                frames = []
                part = slice(start, start + max(1, batch_size))
                for bits in self._sample(wanted, part, guidance, temperature, window):
                    frames.append(bits)
                    if meter is not None:
                        meter.advance()
                codes.append(Codes(tuple(torch.stack(scale, dim=1) for scale in zip(*frames)), schedule))
                clips += list(to_frames(self.tokenizer, codes[-1], self.config.num_frames))
        merged = Codes(tuple(torch.cat(scale) for scale in zip(*(part.bits for part in codes))), schedule)
        return VideoOutput(clips[0] if single else clips, merged, wanted.known, self.config.fps)

    def stream(
        self,
        prompt: str | None = None,
        num_frames: int | None = None,
        guidance: Guidance = "t2v",
        temperature: float = 1.0,
        seed: int = 0,
        image: Any = None,
        video: Any = None,
        class_label: int | None = None,
        given_frames: int | None = None,
        size: tuple[int, int] | None = None,
        window: int | None = None,
    ) -> Iterator[np.ndarray]:
        """Generates one clip and hands out its frames while the rest is still being computed; arguments as for a call.

        All that can be wrong with the arguments is said by this call, before the first frame is asked for.

        Yields:
            uint8 [n, H, W, 3]: one frame, then four for each latent frame, given ones included; together the frames that a call returns.
            Memory does not grow with the length where a window bounds what a frame sees.
        """
        wanted = self._request(prompt, class_label, seed, num_frames, image, video, given_frames, size)
        if len(wanted.seeds) != 1:
            raise UserError(f"{len(wanted.seeds)} clips can't be streamed at once: give one prompt.")
        frames = self._sample(wanted, slice(0, 1), guidance, temperature, window)
        codes = (Codes(tuple(scale[:, None] for scale in bits), wanted.schedule) for bits in frames)
        return (to_pixels(pixels)[0] for pixels in decode_stream(self.tokenizer, codes))

    def _request(
        self,
        prompt: str | Sequence[str] | None,
        class_label: int | Sequence[int] | None,
        seed: int | Sequence[int],
        num_frames: int | None,
        image: Any,
        video: Any,
        given_frames: int | None,
        size: tuple[int, int] | None,
    ) -> _Request:
        text, lengths = self._condition(prompt, class_label)
        seeds = [seed + index for index in range(len(text))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(text):
            raise UserError(f"{len(seeds)} seeds were given for {len(text)} clips: give one number or one a clip.")
        schedule = self.config.schedule if size is None else self.tokenizer.schedule_for(*size)
        latent_frames = _latent_frames(self._trained_frames if num_frames is None else num_frames)
        with torch.no_grad():
            given = self._given(image, video, given_frames, 1 + FRAMES_A_LATENT * (latent_frames - 1), schedule)
        return _Request(text, lengths, seeds, schedule, latent_frames, given)

    def _sample(
        self, wanted: _Request, part: slice, guidance: Guidance, temperature: float, window: int | None
    ) -> Iterator[tuple[Tensor, ...]]:
        """The latent frames of some of the clips; what does not fit is refused here, before the first of them."""
        given, count = wanted.given, len(wanted.seeds[part])
        if given is not None:
            given = Codes(tuple(bits.expand(count, *bits.shape[1:]) for bits in given.bits), given.schedule)
        return sample_frames(
            self.model,
            wanted.text[part],
            wanted.lengths[part],
            seeds=wanted.seeds[part],
            num_frames=wanted.latent_frames,
            schedule=wanted.schedule,
            guidance=guidance,
            temperature=temperature,
            given=given,
            window=window,
        )

    def shots(
        self,
        prompts: Sequence[str],
        num_frames: int | None = None,
        given_frames: int = 5,
        seed: int = 0,
        **options: Any,
    ) -> VideoOutput:
        """A video of several shots, one a prompt: each goes on from the last frames of the one before.

        Args:
            prompts: one a shot.
            num_frames: frames generated a shot, its prefix included; None: as trained.
            given_frames: decoded frames, 1+4m, that the next shot starts from. They are dropped from its output.
            seed: shot i draws from seed + i.
            options: as for a call.

        Raises:
            UserError: no prompt, shots that are all prefix, or arguments that do not fit each other or the model.
        """
        _check_any(prompts)
        length = self._trained_frames if num_frames is None else num_frames
        new = length - given_frames  # a later shot's
        if len(prompts) > 1 and _latent_frames(given_frames) >= _latent_frames(length):
            raise UserError(f"{given_frames} given frames leave nothing of shots of {length}: use fewer given_frames.")
        whole: np.ndarray | None = None  # [T, H, W, 3], as long as all shots together
        done = 0
        for index, prompt in enumerate(prompts):
            if whole is not None:
                tail = whole[done - given_frames : done]
                options = {**options, "image": None, "video": tail, "given_frames": given_frames}
            shot = self(prompt, num_frames, seed=seed + index, **options).frames
            if whole is None:
                whole = np.empty((length + (len(prompts) - 1) * new, *shot.shape[1:]), np.uint8)
            else:
                shot = shot[given_frames:]
            whole[done : done + len(shot)] = shot
            done += len(shot)
        return VideoOutput(whole, None, 0, self.config.fps)

    def _condition(
        self, prompt: str | Sequence[str] | None, class_label: int | Sequence[int] | None
    ) -> tuple[Tensor, Tensor]:
        """Features [B, L, text_dim] or class ids [B], and text lengths [B]."""
        if self.config.num_classes:
            if class_label is None:
                class_label = self._class_ids(prompt)
            labels = [class_label] if isinstance(class_label, int) else list(class_label)
            for label in labels:
                if not 0 <= label < self.config.num_classes:
                    raise UserError(
                        f"the class {label} does not exist: the model knows 0 to {self.config.num_classes - 1}."
                    )
            _check_any(labels)
            return torch.tensor(labels, device=self.device), torch.ones(
                len(labels), dtype=torch.long, device=self.device
            )
        if prompt is None or class_label is not None:
            raise UserError("this model is steered by text: give a prompt, not a class.")
        return self.encode_prompts([prompt] if isinstance(prompt, str) else prompt)

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> features [B, L, text_dim], padded with zeros, and lengths [B]. Longer texts are cut, with a warning."""
        assert self.encoder is not None
        _check_any(prompts)
        limit = self.config.max_text_length
        text = torch.zeros(len(prompts), limit, self.config.text_dim, device=self.device)
        lengths = torch.zeros(len(prompts), dtype=torch.long, device=self.device)
        for index, prompt in enumerate(prompts):
            features = self.encoder.encode(prompt)
            if len(features) > limit:
                # without the prompt: Python keeps every text that it has warned with
                warnings.warn(f"a prompt is cut to the model's {limit} text tokens", stacklevel=3)
            kept = torch.tensor(features[:limit], device=self.device)
            text[index, : len(kept)], lengths[index] = kept, len(kept)
        return text, lengths

    def _class_ids(self, prompt: str | Sequence[str] | None) -> list[int]:
        if prompt is None or not self.class_names:
            raise UserError("this model is steered by classes: give class_label.")
        names = [prompt] if isinstance(prompt, str) else prompt
        for name in names:
            if name not in self.class_names:
                raise UserError(
                    f"the class '{name}' does not exist: the model knows {', '.join(self.class_names[:5])}, ..."
                )
        return [self.class_names.index(name) for name in names]

    def _given(self, image: Any, video: Any, given_frames: int | None, num_frames: int, schedule) -> Codes | None:
        """The codes of the given frames, one clip."""
        if image is None and video is None:
            return None
        if image is not None and video is not None:
            raise UserError("both an image and a video were given: give one of them.")
        size = (schedule.grid[0] * PIXELS_A_TOKEN, schedule.grid[1] * PIXELS_A_TOKEN)
        if image is not None:
            pixels = read_image(image, size)
        else:
            wanted = (num_frames + 1) // 2 if given_frames is None else given_frames
            pixels = read_video(video, size, self.config.fps, last=max(1, wanted))
            if given_frames is not None and len(pixels) < given_frames:
                raise UserError(
                    f"the given video has {len(pixels)} frames, not {given_frames}: ask for fewer given_frames."
                )
            if given_frames is None:
                pixels = pixels[-(1 + (len(pixels) - 1) // FRAMES_A_LATENT * FRAMES_A_LATENT) :]
        return self.tokenizer.encode(from_pixels(pixels[None], self.device), schedule)


def _latent_frames(num_frames: int) -> int:
    if num_frames < 1 or (num_frames - 1) % FRAMES_A_LATENT:
        below = max(1, num_frames - (num_frames - 1) % FRAMES_A_LATENT)
        raise UserError(f"{num_frames} frames are not 1+4n: ask for {below} or {below + FRAMES_A_LATENT}.")
    return 1 + (num_frames - 1) // FRAMES_A_LATENT


def _check_any(prompts: Sequence[Any]) -> None:
    if not len(prompts):
        raise UserError("no prompt was given: give at least one.")
