"""Text encoders."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from tokenizer.errors import UserError
from tokenizer.text import ByteTextEncoder, T5TextEncoder, text_encoder

CAPTION = "A red circle, moving left slowly"


def test_one_row_a_word_and_the_same_everywhere():
    encoder = text_encoder("bytes", 64)
    features = encoder.encode(CAPTION)
    assert features.shape == (7, 64) and features.dtype == np.float32
    np.testing.assert_allclose(np.mean(features**2, axis=1), 1, rtol=1e-5)
    assert np.array_equal(features, encoder.encode(CAPTION.upper()))
    code = f"from tokenizer.text import *; print(repr(float(ByteTextEncoder(64).encode({CAPTION!r}).sum())))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(other) == float(features.sum())  # no per-process hash seed
    assert float(features[1, 0]) == pytest.approx(0.33296597, abs=1e-6)  # frozen: stored features must stay valid


def test_different_words_are_nearly_orthogonal_and_stems_are_near():
    caption = "red green blue yellow magenta cyan circle square triangle left right up down slowly quickly a"
    words = caption.split()
    features = ByteTextEncoder(256).encode(caption)
    cosine = features @ features.T / 256
    assert np.abs(cosine - np.eye(len(words))).max() < 0.3
    stem = ByteTextEncoder(256).encode("slow slowly")
    assert float(stem[0] @ stem[1]) / 256 > 0.25


@pytest.mark.parametrize("dim", [1, 7, 48, 600])
def test_any_width_and_empty_captions(dim: int):
    encoder = ByteTextEncoder(dim)
    assert encoder.encode("").shape == (0, dim) and encoder.encode("one two").shape == (2, dim)
    assert encoder.fingerprint != ByteTextEncoder(dim + 1).fingerprint


def test_non_ascii_captions():
    assert ByteTextEncoder(32).encode("ein grüner Würfel – 圆").shape == (5, 32)


@pytest.mark.parametrize("spec", ["byte", "t5:", "t5", "clip:x"])
def test_unknown_encoders(spec: str):
    with pytest.raises(UserError, match="unknown: use 'bytes' or 't5:'"):
        text_encoder(spec, 64)


@pytest.fixture(scope="module")
def t5_directory(tmp_path_factory):
    """A small random T5 with a word vocabulary."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    import torch

    path = tmp_path_factory.mktemp("t5")
    vocabulary = {
        word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "circle", "moving", "left", "slowly"])
    }
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=16, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(path)
    return path


def test_t5_from_a_directory(t5_directory):
    encoder = text_encoder(f"t5:{t5_directory}", 24)
    features = encoder.encode("a red circle moving left")
    assert features.shape == (5, 24) and features.dtype == np.float32
    assert np.abs(encoder.encode("a red circle moving slowly") - features).max() > 1e-3
    assert np.array_equal(T5TextEncoder(t5_directory, 24).encode("a red circle moving left"), features)
    assert encoder.fingerprint.startswith("t5-") and encoder.spec == f"t5:{t5_directory}"


def test_t5_mistakes(t5_directory, tmp_path):
    with pytest.raises(UserError, match="set text_dim to 24, not 64"):
        text_encoder(f"t5:{t5_directory}", 64)
    with pytest.raises(UserError, match="holds no config.json"):
        text_encoder(f"t5:{tmp_path / 'none'}", 64)
