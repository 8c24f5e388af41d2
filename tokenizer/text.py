"""Text encoders: a caption becomes one row of features a word or token. Data preparation and generation share them."""

from __future__ import annotations

import hashlib
import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from tokenizer.errors import UserError


class TextEncoder(Protocol):
    """What every text encoder offers."""

    spec: str
    dim: int

    @property
    def fingerprint(self) -> str:
        """A short string that changes when the features change."""
        ...

    def encode(self, caption: str) -> np.ndarray:
        """One caption -> float32 [n, dim], n = 0 for an empty one."""
        ...


class ByteTextEncoder:
    """Deterministic word features without vocabulary and weights (hashed byte n-grams), for closed vocabularies.

    A word is the sum of a random sign vector of its own and of those of its byte trigrams, so that different words are
    nearly orthogonal and words of one stem ("slow", "slowly") are near each other. Each row has mean square 1.

    Args:
        dim: width of the features.
    """

    spec = "bytes"

    def __init__(self, dim: int = 64):
        if dim < 1:
            raise UserError(f"the text features' width is {dim}: it must be at least 1.")
        self.dim = dim

    @property
    def fingerprint(self) -> str:
        """Names the algorithm's version and the width."""
        return f"bytes-1-{self.dim}"

    def encode(self, caption: str) -> np.ndarray:
        """Words and punctuation marks, without regard to case: caption -> float32 [n, dim]."""
        rows = [_word_features(word, self.dim) for word in re.findall(r"\w+|[^\w\s]", caption.lower())]
        return np.stack(rows) if rows else np.zeros((0, self.dim), dtype=np.float32)


class T5TextEncoder:
    """The encoder half of a T5 model from a local directory in the layout of `transformers`.

    Args:
        path: the directory (config.json, weights, tokenizer files).
        dim: the width that is expected; it must be the model's own.
        device: where the encoder runs.

    Raises:
        UserError: the directory does not exist or does not load, or its width is another one.
    """

    def __init__(self, path: str | Path, dim: int, device: str = "cpu"):
        try:
            from transformers import AutoTokenizer, T5EncoderModel
        except ImportError as error:
            raise UserError(
                "a T5 text encoder needs transformers: install it with `pip install transformers`."
            ) from error
        self.path, self.dim, self.device = Path(path), dim, device
        self.spec = f"t5:{path}"
        if not (self.path / "config.json").is_file():
            raise UserError(f"the text encoder {self.path} holds no config.json: give the directory of a T5 model.")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True)
            self._model = T5EncoderModel.from_pretrained(self.path, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"the T5 text encoder in {self.path} can't be loaded: {reason}") from error
        if self._model.config.d_model != dim:
            width = self._model.config.d_model
            raise UserError(
                f"the T5 encoder in {self.path} gives {width} features a token: set text_dim to {width}, not {dim}."
            )
        self._model.eval().to(device)  # type: ignore[arg-type]

    @property
    def fingerprint(self) -> str:
        """A digest of the configuration, the tokenizer and the weights' bytes."""
        return f"t5-{_directory_digest(self.path)}"

    def encode(self, caption: str) -> np.ndarray:
        """Caption -> float32 [tokens, dim]."""
        import torch

        words = self._tokenizer(caption, return_tensors="pt").to(self.device)
        with torch.no_grad():
            hidden = self._model(input_ids=words.input_ids, attention_mask=words.attention_mask)
        return hidden.last_hidden_state[0].float().cpu().numpy()


def text_encoder(spec: str, dim: int, device: str = "cpu") -> TextEncoder:
    """The encoder that a specification names: "bytes", or "t5:" and a directory.

    Args:
        spec: the specification.
        dim: width of the features.
        device: where a neural encoder runs.

    Raises:
        UserError: an unknown specification.
    """
    if spec == "bytes":
        return ByteTextEncoder(dim)
    if spec.startswith("t5:") and len(spec) > 3:
        return T5TextEncoder(spec[3:], dim, device)
    raise UserError(f"the text encoder '{spec}' is unknown: use 'bytes' or 't5:' and the directory of a T5 model.")


@cache
def _directory_digest(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix in {".json", ".model", ".safetensors", ".bin"}:
            with file.open("rb") as handle:
                digest.update(file.name.encode() + hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=65536)
def _word_features(word: str, dim: int) -> np.ndarray:
    data = b"<" + word.encode() + b">"
    grams = np.sum([_signs(data[i : i + 3], dim) for i in range(len(data) - 2)], axis=0) / (len(data) - 2) ** 0.5
    row = grams + _signs(b"word:" + data, dim)
    row = (row / np.sqrt(np.mean(row**2) + 1e-12)).astype(np.float32)
    row.setflags(write=False)  # the cache hands the same array to everybody
    return row


def _signs(data: bytes, dim: int) -> np.ndarray:
    """A vector of pseudo-random signs that depends on the bytes only, [dim]."""
    raw = np.frombuffer(hashlib.shake_128(data).digest(-(-dim // 8)), dtype=np.uint8)
    return np.unpackbits(raw)[:dim].astype(np.float64) * 2 - 1
