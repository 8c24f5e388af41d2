"""The pipeline on tiny random weights, with the real tokenizer."""

from __future__ import annotations

import json
import shutil
import sys
import tracemalloc
import warnings

import av
import numpy as np
import pytest
import torch
from PIL import Image

from inference import VideoARPipeline
from inference.model import VideoARTransformer
from tests.inference.tiny import tiny_config
from tokenizer import UserError, VideoTokenizer
from tokenizer.autoencoder import AutoencoderConfig
from tokenizer.pixels import to_pixels
from tokenizer.text import ByteTextEncoder
from tokenizer.tokenizer import TokenizerConfig

SCALES = ((1, 1), (2, 2))
SIZE = (32, 32)


def tiny_tokenizer(seed: int = 0) -> VideoTokenizer:
    torch.manual_seed(seed)
    sizes = AutoencoderConfig(dim=8, base_width=8, multipliers=(1, 1, 2), blocks=1, patch=4)
    return VideoTokenizer(TokenizerConfig(sizes, num_scales=2)).eval()


def tiny_pipeline(**changes) -> VideoARPipeline:
    torch.manual_seed(1)
    config = tiny_config(**{"scales": SCALES, "num_frames": 3, "max_text_length": 8, **changes})
    encoder = None if config.num_classes else ByteTextEncoder(config.text_dim)
    names = ["run", "jump", "swim"] if config.num_classes else None
    return VideoARPipeline(VideoARTransformer(config).eval(), tiny_tokenizer(), encoder, names)


@pytest.fixture(scope="module")
def pipe() -> VideoARPipeline:
    return tiny_pipeline()


def pixels(num_frames: int, seed: int = 0, size=SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_frames, *size, 3), dtype=np.uint8)


def test_text_to_video_and_batches(pipe):
    one = pipe("a red circle moving left slowly", seed=3)
    assert one.frames.shape == (9, 32, 32, 3) and one.frames.dtype == np.uint8
    prompts = ["a red circle moving left slowly", "a triangle", "a blue square"]
    many = pipe(prompts, seed=3, batch_size=2)
    assert len(many.frames) == 3 and many.codes.tokens().shape == (3, 3, 5, 8)
    assert torch.equal(many.codes.tokens()[:1], one.codes.tokens())  # batch mates and batch size change nothing
    assert torch.equal(pipe(prompts[2], seed=5).codes.tokens()[0], many.codes.tokens()[2])
    assert torch.equal(pipe(prompts, seed=[3, 4, 5]).codes.tokens(), many.codes.tokens())
    assert (pipe(prompts[0], seed=4).frames != one.frames).any()
    decoded = pipe.tokenizer.decode(one.codes)[0].movedim(0, -1)
    np.testing.assert_array_equal(one.frames, ((decoded + 1) * 127.5).round().to(torch.uint8).numpy())


@pytest.mark.parametrize("options", [{}, {"num_frames": 21, "window": 1}, {"video": pixels(5), "num_frames": 13}])
def test_a_stream_hands_out_the_same_frames_as_they_are_made(pipe, options, monkeypatch):
    whole = pipe("a red circle", seed=7, **options).frames
    steps = []
    monkeypatch.setattr(pipe.model, "logits", lambda hidden, real=pipe.model.logits: steps.append(1) or real(hidden))
    parts = pipe.stream("a red circle", seed=7, **options)
    first = next(parts)
    assert len(first) == 1 and len(steps) == len(SCALES)  # nothing of the second latent frame has been computed
    frames = [first, *parts]
    assert [len(part) for part in frames] == [1] + [4] * (len(whole) // 4)
    assert np.abs(np.concatenate(frames).astype(int) - whole).max() <= 1  # pixels are rounded


def test_clips_longer_than_trained_are_decoded_in_pieces_no_longer_than_trained(monkeypatch):
    pipe, prompts = tiny_pipeline(num_frames=5), 2
    pieces, plain = [], pipe.tokenizer.decode_chunk

    def counted(latent, carries=None):
        pieces.append((latent.shape[0], latent.shape[2]))
        return plain(latent, carries)

    monkeypatch.setattr(pipe.tokenizer, "decode_chunk", counted)
    options = {"size": (64, 64), "window": 1, "guidance": 1.0}
    trained, long = (pipe(["a circle"] * prompts, num_frames=count, **options) for count in (17, 161))
    assert pieces[0] == (prompts, 5)  # whole, and all clips at once
    assert pieces[1:] and {clips for clips, _ in pieces[1:]} == {1} and {count for _, count in pieces[1:]} == {4, 5}
    assert sum(count for _, count in pieces[1:]) == 41 * prompts
    monkeypatch.undo()
    for result, most, share in ((trained, 0, 0), (long, 1, 1e-3)):
        wrong = np.abs(to_pixels(pipe.tokenizer.decode(result.codes)).astype(int) - np.stack(result.frames))
        assert wrong.max() <= most and (wrong > 0).mean() <= share


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_frames": 12}, "12 frames are not 1"),
        ({"guidance": "nope"}, "guidance 'nope' is unknown"),
        ({"guidance": float("nan")}, "guidance of frame 0 and scale 0 is nan"),
        ({"guidance": lambda t, k: None}, "guidance of frame 0 and scale 0 is None"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"window": 0}, "window is 0"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"video": pixels(13), "num_frames": 5, "given_frames": 9}, "3 latent frames are given but only 2"),
        ({"prompt": ["a circle", "a square"]}, "2 clips can't be streamed"),
    ],
)
def test_a_stream_refuses_before_its_first_frame(pipe, options, words):
    with pytest.raises(UserError, match=words):
        pipe.stream(**{"prompt": "a circle", **options})


def test_lengths_and_sizes(pipe):
    assert pipe("a circle", num_frames=1).frames.shape == (1, 32, 32, 3)
    assert pipe("a circle", num_frames=21).frames.shape == (21, 32, 32, 3)  # longer than trained
    assert pipe("a circle", size=(32, 48)).frames.shape == (9, 32, 48, 3)
    assert [pipe.frames_for(seconds) for seconds in (0.1, 1, 2, 2.2)] == [1, 9, 17, 17]


def test_image_to_video_forces_the_first_frame(pipe, tmp_path):
    image = pixels(1)[0]
    clip = torch.from_numpy(image).float().movedim(-1, 0)[None, :, None] / 127.5 - 1
    expected = pipe.tokenizer.encode(clip, pipe.config.schedule)
    result = pipe(["a circle", "a square"], image=image)
    assert result.given_frames == 1
    for index in range(2):
        assert torch.equal(result.codes.tokens()[index, :1], expected.tokens()[0])
    Image.fromarray(image).save(tmp_path / "image.png")
    from_file = pipe(["a circle", "a square"], image=tmp_path / "image.png")
    assert torch.equal(from_file.codes.tokens(), result.codes.tokens())


def test_continuation_forces_the_end_of_the_video(pipe):
    video = pixels(12)
    result = pipe("a circle", video=video, num_frames=13)
    assert result.given_frames == 5 and result.frames.shape[0] == 13  # half of 13, as 1+4m
    clip = torch.from_numpy(video[-5:]).float().movedim(-1, 0)[None] / 127.5 - 1
    assert torch.equal(result.codes.tokens()[:, :2], pipe.tokenizer.encode(clip, pipe.config.schedule).tokens())
    assert pipe("a circle", video=video, num_frames=13, given_frames=9).given_frames == 9


def test_shots_join_without_their_prefixes(pipe):
    result = pipe.shots(["a circle", "a square", "a circle"], num_frames=9, given_frames=5, guidance=1.0)
    assert result.frames.shape[0] == 9 + 4 + 4
    second = pipe("a square", 9, seed=1, guidance=1.0, video=result.frames[:9][-5:], given_frames=5)
    np.testing.assert_array_equal(result.frames[9:13], second.frames[5:])
    third = pipe("a circle", 9, seed=2, guidance=1.0, video=result.frames[:13][-5:], given_frames=5)
    np.testing.assert_array_equal(result.frames[13:], third.frames[5:])


def test_shots_hold_their_frames_once(pipe):
    options = {"num_frames": 9, "given_frames": 1, "guidance": 1.0, "size": (64, 64)}
    pipe.shots(["a circle"] * 2, **options)  # what is made at a first call stays
    tracemalloc.start()
    result = pipe.shots(["a circle"] * 25, **options)
    peak = tracemalloc.get_traced_memory()[1]  # numpy's arrays are in it, torch's are not
    tracemalloc.stop()
    assert result.frames.shape == (9 + 24 * 8, 64, 64, 3)
    assert peak < 1.5 * result.frames.nbytes


@pytest.mark.parametrize(
    ("prompts", "given", "words"),
    [([], 5, "no prompt"), (["a", "b"], 9, "leave nothing"), (["a", "b"], 6, "not 1[+]4n")],
)
def test_shots_that_can_not_be(pipe, prompts, given, words, monkeypatch):
    monkeypatch.setattr(pipe.model, "logits", None)  # said before the work
    with pytest.raises(UserError, match=words):
        pipe.shots(prompts, num_frames=9, given_frames=given)


def test_classes_by_number_and_by_name():
    pipe = tiny_pipeline(num_classes=3)
    by_name = pipe(["jump", "swim"], guidance="ucf")
    assert torch.equal(pipe(class_label=[1, 2], guidance="ucf").codes.tokens(), by_name.codes.tokens())
    assert pipe(class_label=1, guidance="ucf").frames.shape == (9, 32, 32, 3)
    for arguments, words in (
        ({"prompt": "fly"}, "'fly' does not exist"),
        ({"class_label": 3}, "0 to 2"),
        ({}, "give class_label"),
    ):
        with pytest.raises(UserError, match=words):
            pipe(**arguments)


def test_saved_and_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    again = VideoARPipeline.from_pretrained(tmp_path / "model")
    assert torch.equal(again("a circle").codes.tokens(), pipe("a circle").codes.tokens())
    half = VideoARPipeline.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert half("a circle").frames.shape == (9, 32, 32, 3)
    names = VideoARPipeline(tiny_pipeline(num_classes=3).model, tiny_tokenizer(), None, ["run", "jump", "swim"])
    names.save_pretrained(tmp_path / "classes")
    assert VideoARPipeline.from_pretrained(tmp_path / "classes").class_names == ["run", "jump", "swim"]


def test_prepared_weights_generate_the_same_and_are_not_saved(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    fast = VideoARPipeline.from_pretrained(tmp_path / "model", weights="fast")
    np.testing.assert_array_equal(fast("a circle", seed=2).frames, pipe("a circle", seed=2).frames)
    with pytest.raises(UserError, match="fast weights can't be saved"):
        fast.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_another_tokenizer_or_text_encoder_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_encoder_fingerprint": "bytes-0-16"}))
    with pytest.raises(UserError, match="text encoder bytes is not the one"):
        VideoARPipeline.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.rmtree(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="holds no tokenizer"):
        VideoARPipeline.from_pretrained(tmp_path)
    tiny_tokenizer(seed=9).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="trained on codes of the tokenizer"):
        VideoARPipeline.from_pretrained(tmp_path)


def test_a_tokenizer_of_another_width_is_refused():
    with pytest.raises(UserError, match="8 bits a token and the model 16"):
        tiny_pipeline(bits=16)


def test_long_prompts_are_cut_with_a_warning(pipe):
    long = "one two three four five six seven eight nine ten"
    with pytest.warns(UserWarning, match="cut to the model's 8 text tokens"):
        cut = pipe(long)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = pipe("one two three four five six seven eight")
    assert torch.equal(cut.codes.tokens(), short.codes.tokens())


def test_warnings_keep_no_prompts(pipe):
    """Python remembers the text of every warning for as long as the process lives."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        for number in range(50):
            pipe.encode_prompts([f"secret{number} " * 20])
    assert len(warned) == 1 and "secret" not in str(warned[0].message)
    modules = [vars(module).get("__warningregistry__", {}) for module in list(sys.modules.values()) if module]
    assert not any("secret" in str(key) for registry in modules for key in registry)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_frames": 10}, "10 frames are not 1[+]4n: ask for 9 or 13"),
        ({"image": pixels(1)[0], "video": pixels(5)}, "give one of them"),
        ({"image": "missing.png"}, "missing.png does not exist"),
        ({"video": "missing.mp4"}, "missing.mp4 does not exist"),
        ({"image": pixels(5)}, r"uint8 \[H, W, 3\]"),
        ({"video": pixels(3), "given_frames": 5}, "3 frames, not 5"),
        ({"video": pixels(9), "given_frames": 6}, "6 frames are not 1[+]4n"),
        ({"video": pixels(20), "num_frames": 9, "given_frames": 9, "guidance": "x"}, "guidance 'x'"),
        ({"size": (40, 32)}, "height 40 is not a multiple of 16"),
        ({"class_label": 1}, "give a prompt"),
        ({"seed": [1, 2]}, "2 seeds were given for 1 clips"),
        ({"prompt": []}, "no prompt"),
    ],
)
def test_arguments_that_do_not_fit(pipe, arguments: dict, words: str):
    with pytest.raises(UserError, match=words):
        pipe(**{"prompt": "a circle", **arguments})


def test_a_result_is_saved_in_three_formats(pipe, tmp_path):
    result = pipe("a circle")
    for name in ("clip.mp4", "clip.gif", "clip.png"):
        result.save(tmp_path / name)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 8
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert decoded.shape == result.frames.shape
    gif = Image.open(tmp_path / "clip.gif")  # equal neighbours become one picture that is shown longer
    shown = 0
    for index in range(gif.n_frames):
        gif.seek(index)
        shown += gif.info["duration"]
    assert abs(shown - 9 * 125) < 9 * 10  # GIF counts in hundredths of a second
    assert Image.open(tmp_path / "clip.png").size == (9 * 32, 32)
    pipe(["a", "b"]).save(tmp_path / "pair.gif")
    assert (tmp_path / "pair-0.gif").is_file() and (tmp_path / "pair-1.gif").is_file()
