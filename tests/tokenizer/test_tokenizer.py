"""The autoencoder: causality, images, shapes, and the saved form."""

import json

import pytest
import torch

from tokenizer import UserError, VideoTokenizer
from tokenizer.autoencoder import AutoencoderConfig
from tokenizer.tokenizer import TokenizerConfig

SMALL = TokenizerConfig(AutoencoderConfig(dim=8, base_width=8, multipliers=(1, 2, 2), blocks=1, patch=4), num_scales=2)
PAPER_LIKE = TokenizerConfig(
    AutoencoderConfig(dim=8, base_width=8, multipliers=(1, 2, 4, 4, 4), blocks=2, patch=1), num_scales=2
)


def make(config=SMALL):
    torch.manual_seed(0)
    return VideoTokenizer(config).eval()


@pytest.mark.parametrize("config", [SMALL, PAPER_LIKE])
def test_later_frames_change_no_earlier_latent_and_no_earlier_pixel(config):
    tokenizer = make(config)
    video = torch.rand(1, 3, 17, 32, 32) * 2 - 1
    with torch.no_grad():
        latent = tokenizer.encode_latent(video)
        assert latent.shape == (1, 8, 5, 2, 2)
        for frame in (1, 4, 5, 9, 16):
            changed = video.clone()
            changed[:, :, frame:] = torch.rand_like(changed[:, :, frame:])
            other = tokenizer.encode_latent(changed)
            first = (frame + 3) // 4  # frame s is seen first by latent frame ceil(s / 4)
            assert torch.equal(other[:, :, :first], latent[:, :, :first])
            assert not torch.allclose(other[:, :, first], latent[:, :, first])
        pixels = tokenizer.decode_latent(latent)
        assert pixels.shape == video.shape
        moved = latent.clone()
        moved[:, :, 3:] += 1
        assert torch.equal(tokenizer.decode_latent(moved)[:, :, :9], pixels[:, :, :9])


def test_an_image_is_a_one_frame_clip_and_a_prefix_is_a_shorter_clip():
    tokenizer = make()
    video = torch.rand(2, 3, 9, 32, 32) * 2 - 1
    image, clip = tokenizer.encode(video[:, :, :1]), tokenizer.encode(video)
    assert image.num_frames == 1
    assert all(torch.equal(a, b) for a, b in zip(image.bits, clip.frames(0, 1).bits))
    assert tokenizer.decode(image).shape == (2, 3, 1, 32, 32)


def test_clips_of_a_batch_do_not_touch_each_other():
    tokenizer = make()
    video = torch.rand(2, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(
            tokenizer.encode_latent(video)[1:], tokenizer.encode_latent(video[1:]), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize(
    "shape, words",
    [
        ((1, 3, 16, 32, 32), "16 frames are not 1.4n: take 13 or 17"),
        ((1, 3, 5, 30, 32), "height 30"),
        ((1, 3, 5, 32, 40), "width 40"),
    ],
)
def test_a_size_that_does_not_divide_is_refused(shape, words):
    with pytest.raises(UserError, match=words):
        make().encode(torch.zeros(shape))


def test_saved_and_loaded_it_is_the_same(tmp_path):
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path)
    again = VideoTokenizer.from_pretrained(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint and again.config == tokenizer.config
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    assert torch.equal(again.decode(again.encode(video)), tokenizer.decode(tokenizer.encode(video)))


def test_damaged_or_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="config.json is missing"):
        VideoTokenizer.from_pretrained(tmp_path)
    make().save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(UserError, match="can't be read"):
        VideoTokenizer.from_pretrained(tmp_path)
    flipped = bytearray(weights)
    flipped[-10] ^= 1
    (tmp_path / "model.safetensors").write_bytes(bytes(flipped))
    with pytest.raises(UserError, match="not those"):
        VideoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    config = json.loads((tmp_path / "config.json").read_text())
    config["autoencoder"]["base_width"] = 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="can't be read"):
        VideoTokenizer.from_pretrained(tmp_path)


def test_impossible_sizes_are_refused():
    with pytest.raises(UserError, match="compress space 8-fold"):
        AutoencoderConfig(multipliers=(1, 2, 4, 4))


def test_paper_sizes():
    """17x128x128 -> 5x8x8 tokens; counted without memory on the meta device."""
    with torch.device("meta"):
        tokenizer = VideoTokenizer(TokenizerConfig())
        assert tokenizer.encoder(torch.empty(1, 3, 17, 128, 128)).shape == (1, 48, 5, 8, 8)
        assert tokenizer.decoder(torch.empty(1, 48, 5, 8, 8)).shape == (1, 3, 17, 128, 128)
    assert tokenizer.schedule_for(128, 128).scales == ((1, 1), (2, 2), (3, 3), (4, 4), (6, 6), (8, 8))
