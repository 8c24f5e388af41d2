"""3-D inflation: a published 2-D image tokenizer becomes the start of a video tokenizer, and back (DESIGN section 2).

    videoar tokenizer inflate --image-checkpoint infinity_vae_d32reg.pth --out runs/inflated [--dim 48]

Every k_t x k x k kernel is zero but for its temporally last slice, which takes the 2-D kernel: a one-frame clip then gives the bits
and the pixels that the image network gives. The layout is that of the Infinity image tokenizers, `torch.save({"vae": state_dict})`:
our module names, except that each convolution and each norm sits in a wrapper, `encoder.conv_in.conv.weight`,
`encoder.norm_out.norm.weight`; the wrapper may be missing.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tokenizer.autoencoder import AutoencoderConfig
from tokenizer.clip_shape import SPATIAL_COMPRESSION
from tokenizer.errors import UserError
from tokenizer.receipts import finished, new_folder
from tokenizer.tokenizer import TokenizerConfig, VideoTokenizer

REPORT = "inflation.json"
FORMAT = 1  # an output of another format is another output

RESIZED = ("encoder.conv_out", "decoder.conv_in")
"""The only two convolutions whose shape depends on d."""

# their module registers the quantiser under two names, and its only buffer holds the powers of two
_WITHOUT_INFORMATION = ("quantizer.lfq.mask", "quantize.lfq.mask")
_NETWORK = ("encoder.", "decoder.", "quantizer.", "quantize.")


@dataclass(frozen=True)
class InflationReport:
    """What became of an image checkpoint's keys; each is in exactly one of the three.

    Attributes:
        source_dim, dim: d of the image tokenizer and of the video tokenizer.
        used: the number of keys that were taken over.
        ignored: keys that belong to something else, such as a discriminator, or hold no information.
        reinitialised: keys of the two convolutions that were started anew because d differs; empty for equal d.
    """

    source_dim: int
    dim: int
    used: int
    ignored: tuple[str, ...]
    reinitialised: tuple[str, ...]

    def summary(self) -> str:
        """A few lines for a person."""
        total = self.used + len(self.ignored) + len(self.reinitialised)
        lines = [f"d = {self.source_dim} -> {self.dim}: {self.used} of {total} keys taken over"]
        if self.reinitialised:
            lines.append(f"started anew, because d differs: {', '.join(self.reinitialised)}")
        if self.ignored:
            more = f" and {len(self.ignored) - 5} more (all in {REPORT})" if len(self.ignored) > 5 else ""
            lines.append(f"ignored: {', '.join(self.ignored[:5])}{more}")
        return "\n".join(lines)


def inflate(image_checkpoint: str | Path, out: str | Path, dim: int | None = None) -> InflationReport:
    """Writes a video tokenizer that starts from an image tokenizer; the folder appears whole or not at all.

    Args:
        image_checkpoint: a .pth or .safetensors file, see `read_image_checkpoint`.
        out: the folder for config.json, model.safetensors, inflation.json and the receipt; finished before with the same
            arguments, it stays as it is.
        dim: d of the video tokenizer; None: the image tokenizer's own. For another d two convolutions start anew.

    Raises:
        UserError: the file does not hold such a tokenizer, or `out` holds something else.
    """
    file, out = Path(image_checkpoint), Path(out)
    state = read_image_checkpoint(file)
    with _naming(file):
        config = autoencoder_config(state, dim)
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    arguments = {"kind": "inflated tokenizer", "format": FORMAT, "source": digest, "dim": config.dim}
    if finished(out, arguments) is not None:
        return _read_report(out)
    tokenizer = VideoTokenizer(TokenizerConfig(config))
    with _naming(file):
        report = inflate_(tokenizer, state)
    with new_folder(out, arguments) as (folder, _):
        tokenizer.eval().save_pretrained(folder)
        content = {"source": file.name, "sha256": digest, **asdict(report)}
        (folder / REPORT).write_text(json.dumps(content, indent=1))
    return report


def read_image_checkpoint(file: str | Path) -> dict[str, Tensor]:
    """The tensors of an image tokenizer's file, by their own names; no code of the file is ever run.

    Args:
        file: `torch.save({"vae": state_dict})`, or a .safetensors file of the state dict's keys. Tensors beside "vae" (a
            discriminator, an optimizer) come under the name of their entry, so that they can be reported.

    Raises:
        UserError: the file is missing or damaged, holds more than weights, or is no such checkpoint.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(f"the image checkpoint {file} does not exist: name a .pth or .safetensors file.")
    content = _load(file)
    if file.suffix == ".safetensors":
        return content
    vae = content.get("vae") if isinstance(content, dict) else None
    if not isinstance(vae, dict) or not vae or not all(isinstance(value, Tensor) for value in vae.values()):
        raise UserError(
            f"{file} is no image tokenizer in the Infinity layout, because it has no state dict under 'vae': save it as "
            '{"vae": state_dict} or as safetensors.'
        )
    return dict(_tensors({entry: value for entry, value in content.items() if entry != "vae"})) | vae


def autoencoder_config(state: dict[str, Tensor], dim: int | None = None) -> AutoencoderConfig:
    """Reads width, multipliers, blocks, patch and d off the shapes; meta tensors will do.

    Args:
        state: what `read_image_checkpoint` gave.
        dim: d of the video tokenizer; None: the source's own.

    Raises:
        UserError: a key is missing, the shapes contradict each other, or the network does not compress space 16-fold.
    """
    if dim is not None and dim < 1:
        raise UserError(f"a latent of {dim} bits is impossible: give --dim 1 or more, or leave it out.")
    keys = _our_names(state)

    def size(name: str, axis: int) -> int:
        return _find(state, keys, f"{name}.weight").shape[axis]

    levels, blocks = _count(keys, "encoder.down"), _count(keys, "encoder.down.0.block")
    upwards, up_blocks = _count(keys, "decoder.up"), _count(keys, "decoder.up.0.block")
    if upwards != levels or up_blocks != blocks + 1:
        raise UserError(
            f"the encoder has {levels} levels of {blocks} residual blocks, the decoder {upwards} of {up_blocks}: the decoder must have "
            "as many levels and one block a level more, so take a checkpoint of that kind."
        )
    patch = max(1, SPATIAL_COMPRESSION >> (levels - 1))
    channels = size("encoder.conv_in", 1), size("decoder.conv_out", 0)
    if patch << (levels - 1) != SPATIAL_COMPRESSION or channels != (3 * patch**2,) * 2:
        raise UserError(
            f"{levels} levels with {channels[0]} channels in and {channels[1]} out do not compress space 16-fold: take an image "
            "tokenizer of 5 levels with 3 channels, of 4 with 12, or of 3 with 48."
        )
    source_dim = _source_dim(state, keys)
    base = size("encoder.conv_in", 0)
    widths = [size(f"encoder.down.{level}.block.0.conv1", 0) for level in range(levels)]
    for level, width in enumerate(widths):
        if width % base or (level == 0 and width != base):
            raise UserError(
                f"encoder.down.{level} is {width} wide and encoder.conv_in {base}: the first level must be as wide and the others a "
                "multiple of it, so take a checkpoint of that kind."
            )
    return AutoencoderConfig(
        dim=dim or source_dim,
        base_width=base,
        multipliers=tuple(width // base for width in widths),
        blocks=blocks,
        patch=patch,
    )


@torch.no_grad()
def inflate_(tokenizer: VideoTokenizer, state: dict[str, Tensor], seed: int = 0) -> InflationReport:
    """Gives a tokenizer the weights of an image tokenizer, in place; on an error it stays as it was.

    Args:
        tokenizer: its sizes must be the source's (`autoencoder_config`), except for d.
        state: what `read_image_checkpoint` gave: kernels [C', C, k, k], the rest as in the tokenizer.
        seed: of the two convolutions that start anew where d differs.

    Raises:
        UserError: a key is missing, has another shape, or belongs to a layer that the tokenizer has not.
    """
    keys = _our_names(state)
    source_dim, dim = _source_dim(state, keys), tokenizer.config.autoencoder.dim
    anew = RESIZED if source_dim != dim else ()
    taken: list[tuple[Tensor, Tensor]] = []
    reinitialised = []
    for name, parameter in _parameters(tokenizer):
        source = _find(state, keys, name)
        key = keys.pop(name)
        if name.rsplit(".", 1)[0] in anew:
            reinitialised.append(key)
            continue
        expected = parameter[:, :, -1] if parameter.ndim == 5 else parameter
        if source.shape != expected.shape:
            raise UserError(
                f"{key} has the shape {tuple(source.shape)} where {tuple(expected.shape)} is needed: take a checkpoint whose layers fit "
                "each other and the tokenizer."
            )
        taken.append((parameter, source))
    ignored = sorted(keys.values())
    # a layer left out would give another network than the one that was trained
    if unknown := [key for key in ignored if key.startswith(_NETWORK) and key not in _WITHOUT_INFORMATION]:
        raise UserError(
            f"the video tokenizer has no layer for {', '.join(unknown[:3])} ({len(unknown)} such keys): take an image tokenizer "
            "without attention and without learnt layers around its quantiser."
        )
    for parameter, source in taken:
        if parameter.ndim == 5:
            parameter.zero_()
            parameter[:, :, -1] = source
        else:
            parameter.copy_(source)
    if anew:
        _start_anew(tokenizer, anew, seed)
    tokenizer.__dict__.pop("fingerprint", None)  # the one of the weights before
    return InflationReport(source_dim, dim, len(taken), tuple(ignored), tuple(reinitialised))


def deflate(tokenizer: VideoTokenizer, last_slice_only: bool = False) -> dict[str, Tensor]:
    """The image tokenizer inside a video tokenizer, in the Infinity layout: write it with `torch.save({"vae": deflate(tokenizer)}, file)`.

    Infinity's own code reads widths that are multiples of 32; a patch other than 1 is ours alone.

    Args:
        tokenizer: one that was trained on single frames, which leaves the slices before the last at zero.
        last_slice_only: drop those slices even where they are not zero. What single frames give does not change by it.

    Returns:
        Kernels [C', C, k, k] and the rest as they are, on the CPU.

    Raises:
        UserError: a slice before the last is not zero.
    """
    image = {}
    for name, parameter in _parameters(tokenizer):
        if parameter.ndim == 5:
            if not last_slice_only and parameter[:, :, :-1].any():
                raise UserError(
                    f"{name} looks at earlier frames, which an image tokenizer can't: deflate a tokenizer that was trained on single "
                    "frames, or pass last_slice_only=True to drop what it does over time."
                )
            parameter = parameter[:, :, -1]
        # a clone: a slice would be saved with all of its kernel
        image[_their_name(name)] = parameter.detach().cpu().clone(memory_format=torch.contiguous_format)
    return image


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Puts the file's name before a sentence that knows only its keys."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _load(file: Path) -> dict[str, Any]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on how to load foreign pickles nevertheless
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{file} holds Python code or objects ({found[1]}) beside weights and was not loaded, because that could run anything: "
                "ask for a file of weights alone."
            ) from error
        raise UserError(
            f"{file} is no checkpoint of weights: name a .pth file of torch.save or a .safetensors file."
        ) from error
    except (
        Exception
    ) as error:  # on damaged bytes torch.load raises almost anything, from AssertionError to struct.error
        raise UserError(
            f"{file} can't be read as weights ({' '.join(str(error).split())[:120] or 'it is empty'}): copy it again."
        ) from error


def _tensors(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors inside nested dictionaries, by dotted names."""
    if isinstance(content, Tensor):
        yield prefix, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key))


def _read_report(out: Path) -> InflationReport:
    content = json.loads((out / REPORT).read_text())
    return InflationReport(
        content["source_dim"],
        content["dim"],
        content["used"],
        tuple(content["ignored"]),
        tuple(content["reinitialised"]),
    )


def _parameters(tokenizer: VideoTokenizer) -> Iterator[tuple[str, Tensor]]:
    yield from tokenizer.encoder.state_dict(prefix="encoder.").items()
    yield from tokenizer.decoder.state_dict(prefix="decoder.").items()


def _our_names(state: dict[str, Tensor]) -> dict[str, str]:
    """Our name of each key -> the key: `encoder.conv_in.weight` -> `encoder.conv_in.conv.weight`, wrapper or not."""
    keys: dict[str, str] = {}
    for key in state:
        # the first `conv` of downsample.conv.conv.weight is the layer's own name, which we have as well
        name = re.sub(r"(?<!sample)\.(conv|norm)(?=\.(weight|bias)$)", "", key)
        if name in keys:
            raise UserError(f"{key} and {keys[name]} are the same layer: take a checkpoint that has it once.")
        keys[name] = key
    return keys


def _their_name(name: str) -> str:
    module, parameter = name.rsplit(".", 1)
    wrapper = "norm" if module.rsplit(".", 1)[-1].startswith("norm") else "conv"
    return f"{module}.{wrapper}.{parameter}"


def _find(state: dict[str, Tensor], keys: dict[str, str], name: str) -> Tensor:
    if name not in keys:
        raise UserError(f"{_their_name(name)} is missing: take a whole image tokenizer in the Infinity layout.")
    tensor = state[keys[name]]
    if name.endswith(".weight") and ".norm" not in name and tensor.ndim != 4:
        raise UserError(
            f"{keys[name]} has the shape {tuple(tensor.shape)}, which is no 2-D kernel: take an image tokenizer, not a video one."
        )
    return tensor


def _count(keys: dict[str, str], prefix: str) -> int:
    """How many children a list of modules has, which must be numbered from 0."""
    start = f"{prefix}."
    numbers = {
        int(word) for name in keys if name.startswith(start) and (word := name[len(start) :].split(".")[0]).isdigit()
    }
    for number in range(max(numbers, default=0) + 1):
        if number not in numbers:
            raise UserError(f"{prefix}.{number} is missing: take a whole image tokenizer in the Infinity layout.")
    return len(numbers)


def _source_dim(state: dict[str, Tensor], keys: dict[str, str]) -> int:
    given = _find(state, keys, "encoder.conv_out.weight").shape[0]
    taken = _find(state, keys, "decoder.conv_in.weight").shape[1]
    if given != taken:
        raise UserError(
            f"the encoder gives {given} channels ({keys['encoder.conv_out.weight']}) and the decoder takes {taken} "
            f"({keys['decoder.conv_in.weight']}): take a tokenizer of bits, where both are d."
        )
    return given


def _start_anew(tokenizer: VideoTokenizer, names: tuple[str, ...], seed: int) -> None:
    with torch.random.fork_rng([]):
        torch.random.default_generator.manual_seed(seed)
        for name in names:
            convolution = tokenizer.get_submodule(name)
            fresh = deepcopy(convolution).cpu()  # the same numbers on every device
            fresh.reset_parameters()  # type: ignore[operator]
            convolution.load_state_dict(fresh.state_dict())
