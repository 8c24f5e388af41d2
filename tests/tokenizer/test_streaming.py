"""Chunk by chunk equals the whole clip, at memory that does not grow; tiles blend without seams."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tokenizer.test_tokenizer import PAPER_LIKE, SMALL, make
from tokenizer import Codes, UserError
from tokenizer.streaming import decode_stream, encode_stream
from tokenizer.tiling import Tiling, run_tiled


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=[SMALL, PAPER_LIKE], ids=["patch 4", "as the paper"])
def tokenizer(request):
    """Random kernels in all temporal slices: a fresh one's are zero, which would hide what is carried."""
    tokenizer = make(request.param)
    for parameter in tokenizer.parameters():
        if parameter.ndim == 5:
            torch.nn.init.normal_(parameter, std=(1.5 / parameter[0].numel()) ** 0.5)
    return tokenizer


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("latents_at_once", [1, 2, 7])
def test_chunks_equal_the_whole_clip(tokenizer, latents_at_once):
    video = noise(2, 3, 21, 32, 16)
    whole = tokenizer.encode(video)
    assert whole.num_frames == 6
    parts = tokenizer.encode(video, latents_at_once=latents_at_once)
    assert all(torch.equal(a, b) for a, b in zip(parts.bits, whole.bits))
    pixels = tokenizer.decode(whole)
    assert (tokenizer.decode(whole, latents_at_once=latents_at_once) - pixels).abs().max() < 1e-5
    # the carried state matters: a later chunk by itself gives something else
    alone = tokenizer.decode(whole.frames(2, 6))
    assert (alone[:, :, 1:] - pixels[:, :, -12:]).abs().max() > 1e-3


def test_a_stream_takes_pieces_of_any_length_and_gives_what_is_complete(tokenizer):
    video = noise(1, 3, 13, 32, 32)
    whole, given = tokenizer.encode(video), []

    def pieces():
        for start, stop in ((0, 3), (3, 4), (4, 10), (10, 13)):
            given.append(stop)
            yield video[:, :, start:stop]

    frames = []
    for codes in encode_stream(tokenizer, pieces()):
        frames.append((given[-1], codes.num_frames))
        assert all(torch.equal(a[:, len(frames) - 1 :][:, :1], b) for a, b in zip(whole.bits, codes.bits))
    assert frames == [(3, 1), (10, 1), (10, 1), (13, 1)]  # each as soon as its last frame has come
    lengths = [part.shape[2] for part in decode_stream(tokenizer, (whole.frames(t, t + 1) for t in range(4)))]
    assert lengths == [1, 4, 4, 4]


def test_decoded_frames_come_before_the_rest_is_there(tokenizer):
    codes = tokenizer.encode(noise(1, 3, 9, 32, 32))
    asked = []

    def slowly():
        for frame in range(3):
            asked.append(frame)
            yield codes.frames(frame, frame + 1)

    stream = decode_stream(tokenizer, slowly())
    assert next(stream).shape[2] == 1 and asked == [0]
    assert next(stream).shape[2] == 4 and asked == [0, 1]


def test_streams_that_end_wrongly():
    tokenizer = make()
    got = []
    with pytest.raises(UserError, match="7 frames are not 1.4n"):
        for codes in encode_stream(tokenizer, [noise(1, 3, 7, 32, 32)]):
            got.append(codes.num_frames)
    assert got == [1, 1]
    with pytest.raises(UserError, match="no frames"):
        list(encode_stream(tokenizer, []))
    with pytest.raises(UserError, match="0 latent frames at once"):
        tokenizer.encode(noise(1, 3, 5, 32, 32), latents_at_once=0)
    with pytest.raises(UserError, match="0 latent frames at once"):
        tokenizer.decode(tokenizer.encode(noise(1, 3, 5, 32, 32)), latents_at_once=0)
    with pytest.raises(UserError, match=r"change from \(32, 32\) to \(32, 48\)"):
        list(encode_stream(tokenizer, [noise(1, 3, 2, 32, 32), noise(1, 3, 3, 32, 48)]))


def test_memory_does_not_grow_with_the_length():
    script = """
import torch
from benchmarks.report import peak_memory
from tests.tokenizer.test_tokenizer import make
from tokenizer.streaming import decode_stream, encode_stream
torch.set_num_threads(1)
tokenizer = make()
def run(frames):
    count = 0
    chunks = (torch.zeros(1, 3, 1 if i == 0 else 4, 192, 192) for i in range(1 + (frames - 1) // 4))
    for pixels in decode_stream(tokenizer, encode_stream(tokenizer, chunks)):
        count += pixels.shape[2]
    assert count == frames
    return peak_memory()
short = run(17)
print(run(257) / short)
"""
    out = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        # each tensor by itself: holes in the heap are no part of what a stream keeps
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(out.stdout) < 1.05


def test_concatenated_codes():
    codes = make().encode(noise(1, 3, 9, 32, 32))
    again = Codes.concatenate([codes.frames(0, 1), codes.frames(1, 3)])
    assert all(torch.equal(a, b) for a, b in zip(codes.bits, again.bits))


def test_tiles_of_a_local_map_are_the_whole():
    """A map without a neighbourhood has no seams: blending itself must be exact, also at edges that do not divide."""
    for height, width in ((64, 64), (80, 208), (64, 96)):
        input = noise(1, 2, 3, height, width)

        def shrink(tile, carry):
            return torch.nn.functional.avg_pool3d(tile, (1, 16, 16))

        def grow(tile, carry):
            return torch.nn.functional.interpolate(tile, scale_factor=(1, 16, 16)) + 1

        torch.testing.assert_close(run_tiled(shrink, input, 64, 32, None), shrink(input, None))
        latent = shrink(input, None)
        torch.testing.assert_close(run_tiled(grow, latent, 4, 2, None), grow(latent, None))


def test_tiles_of_the_networks_and_of_streams(tokenizer):
    tokenizer.double()  # a tile may take other kernels than the whole, which must not count
    video = noise(1, 3, 5, 80, 64).double()
    corner = tokenizer.encode_latent(video[..., :48, :48])
    tokenizer.tiling = Tiling(48, 16)
    try:
        latent = tokenizer.encode_latent(video)
        assert latent.shape[-3:] == (2, 5, 4)
        torch.testing.assert_close(latent[..., :2, :1], corner[..., :2, :1])  # where no other tile reaches
        carries: dict = {}
        chunks = [tokenizer.encode_chunk(video[:, :, a:b], carries) for a, b in ((0, 1), (1, 5))]
        assert len(carries) == 2 * 2 and (torch.cat(chunks, 2) - latent).abs().max() < 1e-10
        pixels = tokenizer.decode_latent(latent)
        assert pixels.shape == video.shape
        carries = {}
        chunks = [tokenizer.decode_chunk(latent[:, :, t : t + 1], carries) for t in range(2)]
        assert (torch.cat(chunks, 2) - pixels).abs().max() < 1e-10
        small = tokenizer.encode_latent(video[..., :48, :48])
        assert torch.equal(small, corner)  # frames within one tile are left alone
    finally:
        tokenizer.tiling = None
        tokenizer.float()


def test_tilings_that_cannot_be():
    with pytest.raises(UserError, match="size 100 is not a multiple of 16"):
        Tiling(100, 16)
    with pytest.raises(UserError, match="overlap by 64"):
        Tiling(64, 64)


@pytest.mark.parametrize(
    "video, words",
    [
        (torch.zeros(1, 4, 5, 32, 32), r"shape \(1, 4, 5, 32, 32\)"),
        (torch.zeros(3, 5, 32, 32), r"shape \(3, 5, 32, 32\)"),
        (torch.zeros(1, 3, 5, 32, 32, dtype=torch.uint8), "torch.uint8 was given"),
        (torch.full((1, 3, 5, 32, 32), 2.0), "values from 2 to 2"),
        (torch.full((1, 3, 5, 32, 32), float("nan")), "values from nan"),
    ],
)
def test_what_is_no_video_is_refused(video, words):
    with pytest.raises(UserError, match=words):
        make().encode(video)
