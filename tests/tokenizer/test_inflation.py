"""3-D inflation against an image tokenizer in plain 2-D modules (`image_network.py`), and every file that is refused."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import videoar
from tests.tokenizer.image_network import ImageTokenizer, image_tokenizer
from tokenizer import ScaleSchedule, UserError, VideoTokenizer
from tokenizer.autoencoder import AutoencoderConfig
from tokenizer.inflation import autoencoder_config, deflate, inflate, inflate_, read_image_checkpoint
from tokenizer.tokenizer import TokenizerConfig

HOUSE = Path(__file__).resolve().parents[2]
PAPER_LIKE = {"base": 32, "multipliers": (1, 2, 4, 4, 4), "blocks": 2, "d": 16, "patch": 1}
SMALL = {"base": 32, "multipliers": (1, 2, 3), "blocks": 1, "d": 16, "patch": 4}
MASKS = ["quantize.lfq.mask", "quantizer.lfq.mask"]


def save(network, file):
    torch.save({"vae": network.state_dict()}, file)
    return file


def images(height, width, batch=3):
    """Smooth shapes under noise, so that tokens of one image differ."""
    generator = torch.Generator().manual_seed(height)
    coarse = torch.rand(batch, 3, height // 16, width // 16, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (smooth * 2 - 1 + 0.3 * torch.randn(batch, 3, height, width, generator=generator)).clamp(-1, 1)


@pytest.fixture(scope="module")
def paper_like(tmp_path_factory):
    """An image tokenizer of the published shape and the video tokenizer that its file became."""
    folder = tmp_path_factory.mktemp("inflated")
    network = image_tokenizer(**PAPER_LIKE)
    report = inflate(save(network, folder / "image.pth"), folder / "video")
    return network, VideoTokenizer.from_pretrained(folder / "video"), report, folder


def assert_same(mine, theirs):
    """Equal but for rounding: some 40 layers of float32 round by 1e-5 on their own, as the 2-D network does between its own two
    memory layouts; so 1e-5 is asked of the root mean square, and of the worst pixel not much more."""
    assert (mine - theirs).square().mean().sqrt() < 1e-5
    torch.testing.assert_close(mine, theirs, atol=5e-5, rtol=0)


SCALES = [
    (64, 64, None),
    (64, 64, ((1, 1), (4, 4))),
    (48, 80, None),
    (48, 80, ((1, 1), (1, 2), (2, 2), (2, 4), (3, 5))),
    (128, 128, None),
]


@pytest.mark.parametrize("height, width, scales", SCALES)
@torch.no_grad()
def test_a_frame_gives_the_image_networks_bits_and_pixels(paper_like, height, width, scales):
    network, tokenizer, *_ = paper_like
    schedule = ScaleSchedule(scales) if scales else tokenizer.schedule_for(height, width)
    batch = images(height, width)
    expected, margin = network.encode(batch, schedule.scales)
    latent = tokenizer.encode_latent(batch[:, :, None])
    assert_same(latent[:, :, 0], network.latent(batch))
    codes = tokenizer.encode(batch[:, :, None], schedule)
    for mine, theirs in zip(codes.bits, expected, strict=True):
        assert torch.equal(mine[:, 0], theirs)
    pixels = network.decode(expected)
    assert_same(tokenizer.decode(codes)[:, :, 0], pixels)
    # the comparison says something: bits that hang on the image and are not decided by rounding, pixels on both sides of the clamp
    assert margin > 2e-5 and all(0.2 < one.float().mean() < 0.8 for one in expected)
    assert not torch.equal(expected[-1][0], expected[-1][1])
    assert pixels.std() > 0.3 and 0 < (pixels.abs() == 1).float().mean() < 0.5


@pytest.mark.parametrize("height, width, scales", [SCALES[0], SCALES[3]])
@torch.no_grad()
def test_in_double_precision_nothing_is_left_of_the_difference(paper_like, height, width, scales):
    network, tokenizer = (deepcopy(module).double() for module in paper_like[:2])
    schedule = ScaleSchedule(scales) if scales else tokenizer.schedule_for(height, width)
    batch = images(height, width, batch=1).double()
    expected, _ = network.encode(batch, schedule.scales)
    codes = tokenizer.encode(batch[:, :, None], schedule)
    assert all(torch.equal(mine[:, 0], theirs) for mine, theirs in zip(codes.bits, expected, strict=True))
    latent = tokenizer.encode_latent(batch[:, :, None])[:, :, 0]
    torch.testing.assert_close(latent, network.latent(batch), atol=1e-12, rtol=0)
    features, pixels = network.features(expected), network.decode(expected)
    torch.testing.assert_close(tokenizer.decode_latent(features[:, :, None])[:, :, 0], pixels, atol=1e-12, rtol=0)
    # our codes are summed up in float32 at any precision
    torch.testing.assert_close(tokenizer.decode(codes)[:, :, 0], pixels, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_clip_begins_as_its_first_frame(paper_like):
    network, tokenizer, *_ = paper_like
    clip = images(64, 64, batch=5).transpose(0, 1)[None]  # [1, 3, 5, 64, 64]
    latent = tokenizer.encode_latent(clip)
    assert latent.shape == (1, 16, 2, 4, 4)
    assert_same(latent[:, :, 0], network.latent(clip[:, :, 0]))
    # with zeros before the last slice, a latent frame is that of the last frame it sees
    assert_same(latent[:, :, 1], network.latent(clip[:, :, 4]))
    codes = tokenizer.encode(clip)
    expected, margin = network.encode(clip[:, :, 0], codes.schedule.scales)
    assert margin > 2e-5 and all(torch.equal(mine[:, 0], theirs) for mine, theirs in zip(codes.bits, expected))
    assert_same(tokenizer.decode(codes)[:, :, 0], network.decode(expected))


def test_the_layout_is_the_published_one():
    """Key names as published, spelled out: the network of these tests and the reader could both be wrong."""
    keys = ImageTokenizer(**PAPER_LIKE).state_dict().keys()
    published = {
        "encoder.conv_in.conv.weight",
        "encoder.down.0.block.0.norm1.norm.weight",
        "encoder.down.0.block.1.conv2.conv.bias",
        "encoder.down.0.downsample.conv.conv.weight",
        "encoder.down.1.block.0.nin_shortcut.conv.weight",
        "encoder.down.3.downsample.conv.conv.bias",
        "encoder.mid.block_1.conv1.conv.weight",
        "encoder.norm_out.norm.weight",
        "encoder.conv_out.conv.weight",
        "decoder.conv_in.conv.weight",
        "decoder.mid.block_2.norm2.norm.bias",
        "decoder.up.0.block.2.conv1.conv.weight",
        "decoder.up.1.block.0.nin_shortcut.conv.weight",
        "decoder.up.1.upsample.conv.conv.weight",
        "decoder.up.3.upsample.conv.conv.weight",
        "decoder.up.4.upsample.conv.conv.weight",
        "decoder.norm_out.norm.bias",
        "decoder.conv_out.conv.weight",
        "quantizer.lfq.mask",
    }
    assert published <= set(keys)
    assert not any("down.4.downsample" in key or "up.0.upsample" in key or "attn" in key for key in keys)


@pytest.mark.parametrize("d", [16, 24, 32, 64])
def test_the_published_sizes_are_read_off_the_shapes(d):
    with torch.device("meta"):
        state = ImageTokenizer(base=128, d=d).state_dict()
    assert autoencoder_config(state) == AutoencoderConfig(dim=d)
    assert autoencoder_config(state, dim=48) == AutoencoderConfig()


@pytest.mark.parametrize(
    "sizes",
    [
        PAPER_LIKE,
        {"base": 64, "multipliers": (1, 1, 3, 2, 5), "blocks": 1, "d": 8, "patch": 1},
        {"base": 32, "multipliers": (1, 2, 2, 4), "blocks": 3, "d": 24, "patch": 2},
        SMALL,
    ],
)
def test_other_sizes_are_read_off_the_shapes(sizes):
    with torch.device("meta"):
        state = ImageTokenizer(**sizes).state_dict()
    expected = AutoencoderConfig(sizes["d"], sizes["base"], sizes["multipliers"], sizes["blocks"], sizes["patch"])
    assert autoencoder_config(state) == expected


def test_every_kernel_is_zero_before_its_last_slice_and_every_key_is_counted(paper_like):
    network, tokenizer, report, folder = paper_like
    kernels = [p for p in tokenizer.parameters() if p.ndim == 5]
    assert len(kernels) == 74 and not any(kernel[:, :, :-1].any() for kernel in kernels)
    state = network.state_dict()
    # 74 convolutions and 60 norms, each with weight and bias
    assert len(state) == 270 and report.used == 268 and list(report.ignored) == MASKS and not report.reinitialised
    content = json.loads((folder / "video" / "inflation.json").read_text())
    digest = hashlib.sha256((folder / "image.pth").read_bytes()).hexdigest()
    assert content == {
        "source": "image.pth", "sha256": digest, "source_dim": 16, "dim": 16, "used": 268, "ignored": MASKS, "reinitialised": [],
    }  # fmt: skip


def test_wrappers_and_the_kind_of_file_make_no_difference(paper_like, tmp_path):
    """`downsample.conv.weight` for `downsample.conv.conv.weight` and so on; safetensors for torch."""
    network, tokenizer, *_ = paper_like
    state = network.state_dict()
    plain = {
        key.replace(".conv.weight", ".weight").replace(".conv.bias", ".bias").replace(".norm.", "."): value
        for key, value in state.items()
    }
    plain = {key: value.clone() for key, value in plain.items()}
    assert "encoder.down.0.downsample.conv.weight" in plain and "encoder.conv_in.weight" in plain
    save_file(plain, tmp_path / "image.safetensors")
    inflate(tmp_path / "image.safetensors", tmp_path / "video")
    again = VideoTokenizer.from_pretrained(tmp_path / "video")
    assert again.fingerprint == VideoTokenizer.from_pretrained(paper_like[3] / "video").fingerprint


def test_another_dim_starts_two_convolutions_anew(paper_like, tmp_path):
    _, _, _, folder = paper_like
    report = inflate(folder / "image.pth", tmp_path / "video", dim=48)
    resized = ["encoder.conv_out", "decoder.conv_in"]
    assert report.dim == 48 and report.source_dim == 16 and report.used == 264
    assert list(report.reinitialised) == [f"{name}.conv.{kind}" for name in resized for kind in ("weight", "bias")]
    same = VideoTokenizer.from_pretrained(folder / "video").state_dict()
    tokenizer = VideoTokenizer.from_pretrained(tmp_path / "video")
    for name, value in tokenizer.state_dict().items():
        if name.rsplit(".", 1)[0] in resized:
            assert value.shape != same[name].shape or not torch.equal(value, same[name])
        else:
            assert torch.equal(value, same[name])
    # a fresh inflated start: zeros, then an image convolution's uniform numbers up to 1 / sqrt(fan in)
    kernel = tokenizer.get_submodule("encoder.conv_out").weight.detach()
    bound = (128 * 9) ** -0.5
    assert not kernel[:, :, :-1].any() and 0.99 * bound < kernel.abs().max() <= bound
    # seeded: the same whatever was drawn before, and nothing is drawn from the caller's generator
    torch.manual_seed(5)
    expected = torch.rand(3)
    one, other = (VideoTokenizer(tokenizer.config) for _ in range(2))
    torch.manual_seed(5)
    inflate_(one, read_image_checkpoint(folder / "image.pth"))
    assert torch.equal(torch.rand(3), expected)
    inflate_(other, read_image_checkpoint(folder / "image.pth"), seed=1)
    assert one.fingerprint == tokenizer.fingerprint != other.fingerprint


def small_state(**sizes):
    return image_tokenizer(**{**SMALL, **sizes}).state_dict()


def small_tokenizer(state):
    return VideoTokenizer(TokenizerConfig(autoencoder_config(state)))


def test_a_tokenizer_trained_on_frames_goes_there_and_back(tmp_path):
    torch.manual_seed(0)
    tokenizer = VideoTokenizer(TokenizerConfig(AutoencoderConfig(16, 32, (1, 2, 3), blocks=1, patch=4)))
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=1e-2, weight_decay=0.1)
    batch = images(64, 64)
    before = tokenizer.fingerprint
    for _ in range(3):
        latent = tokenizer.encode_latent(batch[:, :, None])
        quantized = tokenizer.quantizer(latent, tokenizer.schedule_for(64, 64)).quantized
        optimizer.zero_grad()
        (tokenizer.decoder(quantized)[:, :, 0] - batch).square().mean().backward()
        optimizer.step()
    state = deflate(tokenizer.eval())
    torch.save({"vae": state}, tmp_path / "image.pth")
    # a slice that kept its kernel's memory would be saved with all of it
    assert (tmp_path / "image.pth").stat().st_size < 1.2 * sum(4 * value.numel() for value in state.values())
    report = inflate(tmp_path / "image.pth", tmp_path / "video")
    again = VideoTokenizer.from_pretrained(tmp_path / "video")
    assert again.fingerprint == VideoTokenizer.from_pretrained(tmp_path / "video").fingerprint != before
    assert again.config == tokenizer.config and not report.ignored
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), tokenizer.state_dict().values()))
    # and the plain 2-D network takes the file as it is
    network = ImageTokenizer(**SMALL)
    assert network.load_state_dict(state, strict=False).missing_keys == ["quantizer.lfq.mask", "quantize.lfq.mask"]
    with torch.no_grad():
        codes = tokenizer.encode(batch[:, :, None])
        expected, _ = network.encode(batch, codes.schedule.scales)
        assert all(torch.equal(mine[:, 0], theirs) for mine, theirs in zip(codes.bits, expected))
        assert_same(tokenizer.decode(codes)[:, :, 0], network.decode(expected))


def test_what_a_tokenizer_does_over_time_is_not_dropped_unasked():
    state = small_state()
    tokenizer = small_tokenizer(state)
    inflate_(tokenizer, state)
    with torch.no_grad():
        tokenizer.get_submodule("decoder.mid.block_1.conv2").weight[0, 0, 0, 1, 1] = 1e-6
    with pytest.raises(
        UserError, match=r"decoder.mid.block_1.conv2.weight looks at earlier frames.*last_slice_only=True"
    ):
        deflate(tokenizer)
    image = deflate(tokenizer, last_slice_only=True)
    assert image.keys() == state.keys() - set(MASKS) and all(torch.equal(image[key], state[key]) for key in image)


def test_a_discriminators_keys_are_reported(tmp_path):
    state = small_state()
    state |= {"image_disc.main.0.weight": torch.zeros(3)}
    torch.save({"vae": state, "video_disc": {"net": {"bias": torch.zeros(2)}}, "step": 7}, tmp_path / "image.pth")
    report = inflate(tmp_path / "image.pth", tmp_path / "video")
    assert set(report.ignored) == {*MASKS, "image_disc.main.0.weight", "video_disc.net.bias"}
    assert report.used == len(state) - 3


def without(key):
    return lambda state: state.pop(key)


def with_shape(key, *shape):
    return lambda state: state.update({key: torch.zeros(shape)})


@pytest.mark.parametrize(
    "change, words",
    [
        (without("encoder.mid.block_2.norm1.norm.bias"), "encoder.mid.block_2.norm1.norm.bias is missing"),
        (without("decoder.up.2.upsample.conv.conv.weight"), "decoder.up.2.upsample.conv.conv.weight is missing"),
        (without("encoder.conv_in.conv.weight"), "encoder.conv_in.conv.weight is missing"),
        (with_shape("decoder.mid.block_1.conv2.conv.weight", 96, 96, 1, 1),
         r"decoder.mid.block_1.conv2.conv.weight has the shape \(96, 96, 1, 1\) where \(96, 96, 3, 3\) is needed"),
        (with_shape("encoder.norm_out.norm.weight", 64), r"encoder.norm_out.norm.weight has the shape \(64,\) where \(96,\)"),
        (with_shape("encoder.conv_out.conv.weight", 16, 96, 3, 3, 3), "encoder.conv_out.conv.weight .* is no 2-D kernel"),
        (with_shape("encoder.conv_out.conv.weight", 32, 96, 3, 3), "encoder gives 32 channels .* decoder takes 16"),
        (with_shape("encoder.down.1.block.0.conv1.conv.weight", 80, 32, 3, 3), "encoder.down.1 is 80 wide"),
        (with_shape("encoder.mid.attn_1.q.conv.weight", 96, 96, 1, 1), r"no layer for encoder.mid.attn_1.q.conv.weight \(1 such"),
        (with_shape("quantizer.project_in.weight", 16, 16), "no layer for quantizer.project_in.weight"),
        (with_shape("decoder.up.3.block.0.norm1.norm.weight", 96), "the encoder has 3 levels of 1 residual blocks, the decoder 4 of 2"),
        (with_shape("decoder.up.0.block.2.norm1.norm.weight", 32), "the encoder has 3 levels of 1 residual blocks, the decoder 3 of 3"),
        (with_shape("encoder.down.4.block.0.norm1.norm.weight", 96), "encoder.down.3 is missing"),
        (with_shape("encoder.conv_in.weight", 32, 48, 3, 3), "encoder.conv_in.weight and encoder.conv_in.conv.weight are the same layer"),
        (with_shape("encoder.conv_in.conv.weight", 32, 3, 3, 3), "3 levels with 3 channels in and 48 out do not compress space 16-fold"),
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_names_the_key_and_changes_nothing(tmp_path, change, words):
    state = small_state()
    tokenizer = small_tokenizer(state)
    change(state)
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    with pytest.raises(UserError, match=words):
        autoencoder_config(state)
        inflate_(tokenizer, state)
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())
    torch.save({"vae": state}, tmp_path / "image.pth")
    with pytest.raises(UserError, match=f"image.pth: .*{words}"):
        inflate(tmp_path / "image.pth", tmp_path / "video")
    assert [path.name for path in tmp_path.iterdir()] == ["image.pth"]


def test_an_8_fold_image_tokenizer_is_refused():
    """The one of 4 levels that is published as well."""
    with torch.device("meta"):
        state = ImageTokenizer(base=32, multipliers=(1, 2, 4, 4), d=14).state_dict()
    with pytest.raises(UserError, match="4 levels with 3 channels in and 3 out do not compress space 16-fold"):
        autoencoder_config(state)


def test_a_tokenizer_of_other_sizes_is_refused():
    state = small_state()
    other = VideoTokenizer(TokenizerConfig(replace(autoencoder_config(state), multipliers=(1, 2, 4))))
    with pytest.raises(
        UserError, match=r"encoder.down.2.block.0.conv1.conv.weight has the shape \(96, 64, 3, 3\) where \(128, 64"
    ):
        inflate_(other, state)


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_code_in_a_file_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"vae": small_state(), "args": Code()}, "image.pth")
    torch.save({"vae": Code()}, "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"vae": Code()}))
    for name, words in [
        ("image.pth", r"holds Python code or objects \(\w+.mkdir\)"),
        ("old.pth", "holds Python code"),
        ("plain.pkl", "is no"),
    ]:
        with pytest.raises(UserError, match=words) as refusal:
            read_image_checkpoint(name)
        assert "weights_only" not in str(refusal.value) and "\n" not in str(refusal.value)
    assert not os.path.exists("ran")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("text.pth", b"no weights", "is no checkpoint of weights"),
        ("empty.pth", b"", "it is empty"),
        ("text.safetensors", b"no weights at all", "can't be read as weights"),
        ("folder", None, "folder does not exist"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as refusal:
        read_image_checkpoint(tmp_path / name)
    assert name in str(refusal.value)


@pytest.mark.parametrize(
    "content", [small_state, lambda: {"vae": {}}, lambda: {"vae": {"step": 3}}, lambda: [torch.zeros(1)]]
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, content):
    torch.save(content(), tmp_path / "image.pth")
    with pytest.raises(UserError, match="no state dict under 'vae'"):
        read_image_checkpoint(tmp_path / "image.pth")


def test_a_cut_file_is_refused(tmp_path):
    file = save(image_tokenizer(**SMALL), tmp_path / "image.pth")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="can't be read as weights"):
        read_image_checkpoint(file)


def command(capsys, *words):
    status = videoar.main(["tokenizer", "inflate", *(str(word) for word in words)])
    captured = capsys.readouterr()
    return status, captured.out.strip(), captured.err.strip()


def test_the_command_line(capsys, tmp_path):
    file, out = save(image_tokenizer(**SMALL), tmp_path / "image.pth"), tmp_path / "video"
    status, text, error = command(capsys, "--image-checkpoint", file, "--out", out, "--dim", 48)
    assert (status, error) == (0, "")
    assert text.splitlines() == [
        f"{out}: d = 16 -> 48: 128 of 134 keys taken over",
        "started anew, because d differs: encoder.conv_out.conv.weight, encoder.conv_out.conv.bias, decoder.conv_in.conv.weight, "
        "decoder.conv_in.conv.bias",
        "ignored: quantize.lfq.mask, quantizer.lfq.mask",
    ]
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "inflation.json", "model.safetensors", "receipt.json",
    ]  # fmt: skip
    assert VideoTokenizer.from_pretrained(out).config.autoencoder.dim == 48
    # the same again is finished work; anything else is refused and changes nothing
    content = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    assert command(capsys, "--image-checkpoint", file, "--out", out, "--dim", 48) == (0, text, "")
    status, _, error = command(capsys, "--image-checkpoint", file, "--out", out)
    assert status == 2 and "was written with other arguments (dim)" in error
    other = save(image_tokenizer(seed=1, **SMALL), tmp_path / "other.pth")
    status, _, error = command(capsys, "--image-checkpoint", other, "--out", out, "--dim", 48)
    assert status == 2 and "was written with other arguments (source)" in error
    assert content == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    status, _, error = command(capsys, "--image-checkpoint", file, "--out", tmp_path / "none", "--dim", 0)
    assert status == 2 and "a latent of 0 bits is impossible" in error and not (tmp_path / "none").exists()


def test_a_write_that_fails_leaves_nothing(tmp_path):
    file = save(image_tokenizer(**SMALL), tmp_path / "image.pth")
    words = [
        sys.executable,
        "-m",
        "videoar",
        "tokenizer",
        "inflate",
        "--image-checkpoint",
        file,
        "--out",
        tmp_path / "video",
    ]
    # a file may not grow beyond 1 MiB, as on a full disk
    limited = ["bash", "-c", 'ulimit -f 1024; exec "$@"', "bash", *map(str, words)]
    done = subprocess.run(limited, cwd=HOUSE, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "large" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["image.pth"]
