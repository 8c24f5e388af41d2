"""How much memory a video takes, worked out from shapes alone, and how much there is.

An allocator's error is caught where there is one. A CPU's memory is promised before it is there: who takes too much is ended by the system,
and with it the server.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inference.config import ModelConfig
from inference.pipeline import FRAMES_A_LATENT, PIXELS_A_TOKEN, VideoARPipeline
from inference.serving.jobs import Wanted
from tokenizer.errors import UserError
from tokenizer.sequence import SequenceLayout
from tokenizer.tokenizer import TokenizerConfig, VideoTokenizer

WORKSPACE = 1.6
"""What convolutions take with all that they need beside their tensors, as a multiple of these. With the paper's tokenizer on a CPU, whole
videos then take 0.85 to 1.05 of what is worked out."""
GROUPS = Path("/sys/fs/cgroup")


class TooMuchMemory(UserError):
    """A video needs more than there is."""


def needed(pipe: VideoARPipeline, wanted: Wanted, given: int = 0) -> int:
    """Bytes that a video takes on the model's device at its worst moment, beside the weights.

    Args:
        pipe: the model.
        wanted: what to make.
        given: frames that it begins with, which are encoded all at once.
    """
    latents = 1 + (wanted.num_frames - 1) // FRAMES_A_LATENT
    layout = pipe.config.layout(latents, pipe.tokenizer.schedule_for(*wanted.size))
    branches = 1 if wanted.guidance == 1 else 2
    weight, tokenizer = pipe.model.head.weight, pipe.tokenizer.config
    tiling = pipe.tokenizer.tiling
    size = wanted.size if tiling is None else (min(wanted.size[0], tiling.size), min(wanted.size[1], tiling.size))
    pixels = next(pipe.tokenizer.decoder.parameters()).element_size()
    encoding = pixels * _encoder_numbers(tokenizer, given, size) if given else 0
    packed = pipe.weights == "fast" and weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    generating = cache_bytes(pipe.config, layout, branches, weight.element_size())
    generating += weight.element_size() * _step_numbers(pipe.config, layout, branches, packed)
    return max(encoding, generating + pixels * _decoder_numbers(tokenizer, size))


def cache_bytes(config: ModelConfig, layout: SequenceLayout, branches: int, element_size: int) -> int:
    """Of the keys and values of all layers.

    Args:
        config: the network.
        layout: of the longest text.
        branches: of the guidance.
        element_size: bytes a number.
    """
    limits = [config.window, config.num_frames - 1 if layout.num_frames > config.num_frames else None]
    window = min((limit for limit in limits if limit is not None), default=layout.num_frames)
    tokens = layout.text_length + min(layout.num_frames, window + 1) * layout.frame_tokens
    return 2 * config.num_layers * branches * tokens * config.hidden_size * element_size


def _step_numbers(config: ModelConfig, layout: SequenceLayout, branches: int, packed: bool) -> int:
    """What a layer holds at once in the finest scale's step; with packed weights all attention scores, three times."""
    tokens = branches * layout.schedule.grid[0] * layout.schedule.grid[1]
    numbers = tokens * (6 * config.hidden_size + 3 * config.feed_forward_size)
    if packed:
        visible = cache_bytes(config, layout, 1, 1) // (2 * config.num_layers * config.hidden_size)
        numbers += 3 * tokens * config.num_attention_heads * visible
    return numbers


def available(device: torch.device | None = None) -> int:
    """Bytes that may still be taken.

    Args:
        device: whose; None: this machine's main memory, or what a container's limit leaves of it.
    """
    if device is not None and device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return int(min(psutil.virtual_memory().available, _left_in_group(GROUPS)))


def check(amount: int, there: int, what: str = "this video") -> None:
    """Raises TooMuchMemory if it is not there."""
    if amount > there:
        raise TooMuchMemory(
            f"{what} takes about {amount / 1e9:.1f} GB of memory, of which the server has {max(0, there) / 1e9:.1f}: "
            "ask for a smaller or a shorter one."
        )


def _left_in_group(root: Path) -> float:
    """What the limits of this process's control group (version 2) and of those above it leave; its file cache can be had back."""
    left = math.inf
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return left
    group = root / next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    for folder in (group, *group.parents):
        try:
            limit = (folder / "memory.max").read_text().strip()
            if limit != "max":
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
                left = min(left, int(limit) - used)
        except (OSError, ValueError):  # not every level has one
            pass
        if folder == root:
            break
    return left


@lru_cache(maxsize=256)
def _decoder_numbers(config: TokenizerConfig, size: tuple[int, int]) -> int:
    """The most numbers that live at once while a latent frame in the middle of a stream becomes pixels."""
    tokenizer = _shapes(config)
    latent = torch.empty(1, config.autoencoder.dim, 1, *(side // PIXELS_A_TOKEN for side in size), device="meta")
    carries: Any = {}
    with torch.no_grad(), _Living() as living:
        for _ in range(2):
            tokenizer.decode_chunk(latent, carries)
    return int(WORKSPACE * living.most)


@lru_cache(maxsize=256)
def _encoder_numbers(config: TokenizerConfig, frames: int, size: tuple[int, int]) -> int:
    """The same while a clip becomes a latent."""
    frames = 1 + (frames - 1) // FRAMES_A_LATENT * FRAMES_A_LATENT
    tokenizer, video = _shapes(config), torch.empty(1, 3, frames, *size, device="meta")
    with torch.no_grad(), _Living() as living:
        tokenizer.encode_latent(video)
    return int(WORKSPACE * living.most) + video.numel()


@lru_cache(maxsize=1)
def _shapes(config: TokenizerConfig) -> VideoTokenizer:
    """The tokenizer without its weights' values: its layers are run for the shapes of what they make."""
    with torch.device("meta"):
        return VideoTokenizer(config).eval().requires_grad_(False)


class _Living(TorchDispatchMode):
    """Counts the numbers in all tensors that are made, as long as somebody holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._held: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self._held[StorageWeakRef(storage)] = storage.nbytes() // value.element_size()
        self._held = {reference: size for reference, size in self._held.items() if not reference.expired()}
        self.most = max(self.most, sum(self._held.values()))
        return result
