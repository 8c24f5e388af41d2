"""Prompts to files through the command: one file, a grid, a folder that is made once, what the files say, and what is refused."""

import csv
import hashlib
import json
import re

import av
import numpy as np
import pytest
import torch
from PIL import Image

import videoar
from inference.generate import generate_folder
from inference.prompt_file import LONGEST, Prompt, read_prompts
from tests.inference.test_pipeline import tiny_pipeline
from tokenizer import UserError
from tokenizer.version import program_version
from tokenizer.video_file import write_video


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def models(pipe, tmp_path_factory):
    """A model steered by text, and one by classes."""
    base = tmp_path_factory.mktemp("models")
    pipe.save_pretrained(base / "text")
    tiny_pipeline(num_classes=3).save_pretrained(base / "classes")
    return base


def generate(models, *words, model="text"):
    length = [] if "--frames" in words or "--seconds" in words else ["--frames", "5"]
    return videoar.main(["generate", "--model", str(models / model), *length, *map(str, words)])


def frames_of(file):
    if file.is_dir():
        return np.stack([np.asarray(Image.open(frame)) for frame in sorted(file.iterdir())])
    with av.open(str(file)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def info(capsys, file):
    capsys.readouterr()
    assert videoar.main(["info", str(file)]) == 0
    return json.loads(capsys.readouterr().out)


def test_other_numbers_are_said_and_the_model_stays_the_same(pipe, models, tmp_path, capsys):
    words = ["--prompt", "a red circle", "--dtype", "bfloat16", "--weights", "fast"]
    assert generate(models, *words, "--out", tmp_path / "clip.mp4") == 0
    said = info(capsys, tmp_path / "clip.mp4")
    assert (said["model"], said["dtype"], said["weights"]) == (pipe.fingerprint, "bfloat16", "fast")
    assert generate(models, *words, "--compile", "--out", tmp_path / "other.mp4") == 2
    assert "compiling is for a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.png", "frames"])
def test_a_file_says_how_to_make_it_again(pipe, models, tmp_path, capsys, name):
    out = tmp_path / "new" / name
    image = Image.new("RGB", (20, 50), "red")
    image.save(tmp_path / "start.png")
    words = ["--prompt", "a réd circle", "--seed", 4, "--guidance", "2.5", "--temperature", 0.5]
    assert generate(models, *words, "--image", tmp_path / "start.png", "--out", out) == 0
    assert "generating latent frames: 2/2" in capsys.readouterr().err  # progress
    digest = hashlib.sha256((tmp_path / "start.png").read_bytes()).hexdigest()
    said = info(capsys, out)
    assert said == {
        "program": program_version(), "model": pipe.fingerprint, "tokenizer": pipe.tokenizer.fingerprint,
        "prompt": "a réd circle", "seed": 4, "guidance": 2.5, "temperature": 0.5, "frames": 5, "size": [32, 32], "fps": 8.0,
        "given": {"kind": "image", "sha256": digest},
    }  # fmt: skip
    assert re.fullmatch(r"videoar \d+\.\d+\.\d+", said["program"])
    again = pipe(
        said["prompt"],
        said["frames"],
        said["guidance"],
        said["temperature"],
        said["seed"],
        image=tmp_path / "start.png",
    ).frames
    if name == "frames":
        np.testing.assert_array_equal(frames_of(out), again)
        assert sorted(frame.name for frame in out.iterdir()) == [f"{i:05d}.png" for i in range(5)]
    elif name == "clip.png":
        np.testing.assert_array_equal(np.asarray(Image.open(out)), np.concatenate(list(again), axis=1))
    elif name == "clip.mp4":
        write_video(again, tmp_path / "again.mp4", 8)
        np.testing.assert_array_equal(frames_of(out), frames_of(tmp_path / "again.mp4"))
    assert sorted(path.name for path in out.parent.iterdir()) == [name]


def test_files_of_others_hold_no_metadata(tmp_path, capsys):
    clip = np.zeros((3, 16, 16, 3), np.uint8)
    write_video(clip, tmp_path / "plain.mp4")
    write_video(clip, tmp_path / "plain.gif")
    Image.fromarray(clip[0]).save(tmp_path / "photo.png")
    Image.fromarray(clip[0]).save(tmp_path / "other.gif", comment=b"made by \xff another")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("plain.mp4", "no metadata"), ("plain.gif", "no metadata"), ("photo.png", "no metadata"), ("other.gif", "no metadata"),
        ("broken.mp4", "can't be read"), ("broken.png", "can't be read"), ("none.mp4", "does not exist"), ("empty", "no .png frames"),
    ):  # fmt: skip
        assert videoar.main(["info", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("videoar info: ") and words in error and "\n" not in error, name


def test_a_folder_of_prompts_is_made_once_and_knows_its_model(pipe, models, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\na blue square\n")
    out = tmp_path / "videos"
    prompts = read_prompts(file)
    assert prompts == [Prompt("a red circle"), Prompt("a blue square")]
    words = ["--prompt-file", file, "--out", out, "--samples", 2, "--seed", 7, "--batch-size", 3]
    assert generate(models, *words) == 0
    with open(out / "prompts.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["caption"] for row in rows] == ["a red circle"] * 2 + ["a blue square"] * 2
    assert [row["seed"] for row in rows] == ["7", "8", "9", "10"]
    said = info(capsys, out / rows[2]["path"])
    assert (said["prompt"], said["seed"], said["given"]) == ("a blue square", 9, None)
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    assert generate(models, *words) == 0
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before
    assert generate(models, *words[:-3], 8, *words[-2:]) == 2
    assert "other arguments (seed)" in capsys.readouterr().err
    other = tiny_pipeline()
    with torch.no_grad():
        other.model.head.weight[0, 0] += 1  # one weight of another training
    with pytest.raises(UserError, match=r"other arguments \(model\)"):
        generate_folder(other, prompts, out, 5, 2, 7, 3, guidance="t2v", temperature=1.0)
    assert list(tmp_path.glob("*.tmp.*")) == []


def test_names_formats_and_given_frames_of_a_folder(pipe, models, tmp_path, capsys):
    (tmp_path / "p.csv").write_text("caption,name\na circle,one\na square,Zwei ☆\n", encoding="utf-8")
    write_video(np.full((9, 32, 32, 3), 90, np.uint8), tmp_path / "grey.mp4")
    words = ["--prompt-file", tmp_path / "p.csv", "--video", tmp_path / "grey.mp4", "--video-frames", 1]
    assert generate(models, *words, "--format", "frames", "--out", tmp_path / "frames") == 0
    for name in ("one", "Zwei ☆"):
        clip = frames_of(tmp_path / "frames" / name)
        assert clip.shape == (5, 32, 32, 3)
        start = pipe("a", 1, video=np.full((1, 32, 32, 3), 90, np.uint8)).frames
        assert np.abs(clip[0].astype(int) - start[0]).max() <= 8  # the file is compressed
    said = info(capsys, tmp_path / "frames" / "one")
    assert said["given"]["kind"] == "video" and said["given"]["frames"] == 1
    assert generate(models, "--prompt", "a", "--samples", 2, "--format", "gif", "--out", tmp_path / "two") == 0
    assert {path.name for path in (tmp_path / "two").glob("*.gif")} == {"00000.gif", "00001.gif"}


def test_frames_are_frames_whatever_their_name(models, tmp_path):
    (tmp_path / "p.csv").write_text("caption,name\na circle,shot.mp4\na square,other\n")
    words = ["--prompt-file", tmp_path / "p.csv", "--out", tmp_path / "out"]
    assert generate(models, *words, "--format", "frames") == 0
    for name in ("shot.mp4", "other"):
        folder = tmp_path / "out" / name
        assert folder.is_dir() and frames_of(folder).shape == (5, 32, 32, 3)


@pytest.mark.parametrize("more", [[], ["--samples", 2, "--grid"]])
def test_a_format_that_would_have_no_effect_is_refused(models, tmp_path, capsys, more):
    words = ["--prompt", "a", "--format", "gif", "--out", tmp_path / "clip.mp4", *more]
    assert generate(models, *words) == 2
    assert "--format gif is for the videos of a folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["--image", "--video"])
@pytest.mark.parametrize("more", [[], ["--samples", 2], ["--grid"]])
def test_a_missing_file_to_begin_with_is_said_in_one_sentence(models, tmp_path, capsys, what, more):
    for name in ("none.png", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        out = tmp_path / ("out" if "--samples" in more else "out.mp4")
        assert generate(models, "--prompt", "a", what, tmp_path / name, "--out", out, *more) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert error[-1].startswith("videoar generate: ") and str(tmp_path / name) in error[-1], error
        assert not out.exists()


def test_a_grid_has_a_row_a_prompt_and_a_column_a_sample(pipe, models, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a circle\na blue square that is quite wide\n")
    words = ["--prompt-file", tmp_path / "p.txt", "--samples", 3, "--seed", 5, "--batch-size", 4, "--grid"]
    assert generate(models, *words, "--out", tmp_path / "grid.png") == 0
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    clips = pipe([t for t in ("a circle", "a blue square that is quite wide") for _ in range(3)], 5, seed=5).frames
    assert sheet.shape[:2] == (4 + 2 * 36, 160 + 8 + 3 * 36)
    for row in range(2):
        assert sheet[4 + 36 * row : 36 + 36 * row, 4:164].min() < 100  # the prompt is written there
        for column in range(3):
            cell = sheet[4 + 36 * row : 36 + 36 * row, 168 + 36 * column : 200 + 36 * column]
            np.testing.assert_array_equal(cell, clips[3 * row + column][2])
    said = info(capsys, tmp_path / "grid.png")
    assert (said["grid"], said["seed"]) == ([2, 3], [5, 10]) and said["prompt"][0] == "a circle"
    assert generate(models, *words, "--out", tmp_path / "grid.mp4") == 0
    assert frames_of(tmp_path / "grid.mp4").shape == (5, *sheet.shape)
    assert generate(models, "--prompt", "a", "--samples", 2, "--grid", "--out", tmp_path / "one.gif") == 0
    assert info(capsys, tmp_path / "one.gif")["grid"] == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.mp4", "grid.png", "one.gif", "p.txt"]


def pictures(folder):
    """Every mode and odd sizes, as files."""
    noise = np.random.default_rng(0)
    rgb = noise.integers(0, 256, (40, 30, 3), dtype=np.uint8)
    colour = Image.fromarray(rgb)
    made = {
        "rgb.png": colour, "grey.png": colour.convert("L"), "bit.png": colour.convert("1"), "palette.gif": colour.convert("P"),
        "cmyk.jpg": colour.convert("CMYK"), "alpha.png": Image.fromarray(noise.integers(0, 256, (9, 9, 4), dtype=np.uint8)),
        "grey_alpha.png": colour.convert("LA"), "sixteen.png": Image.fromarray(noise.integers(0, 65536, (20, 20), dtype=np.uint16)),
        "float.tiff": Image.fromarray(noise.random((20, 20), dtype=np.float32)), "ycbcr.jpg": colour.convert("YCbCr"),
        "dot.png": colour.crop((0, 0, 1, 1)), "strip.png": colour.resize((30000, 1)), "tower.png": colour.resize((1, 30000)),
        "large.jpg": colour.resize((3000, 2000)), "anim.webp": colour,
    }  # fmt: skip
    for name, image in made.items():
        image.save(folder / name)
    return sorted(made)


def test_pictures_of_any_size_and_mode_begin_a_video(models, tmp_path, capsys):
    names = pictures(tmp_path)
    for name in names:
        assert generate(models, "--prompt", "a", "--image", tmp_path / name, "--out", tmp_path / "out.gif") == 0, name
    out = capsys.readouterr()
    assert out.out.count("out.gif") == len(names) == 15


BROKEN = ("cut.png", "cut.jpg", "text.png", "empty.png", "bad_chunk.png", "bomb.png", "folder.png")


def broken(folder):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    Image.open(folder / "whole.png").save(folder / "whole.jpg")
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:200])
    (folder / "text.png").write_text("a picture of words")
    (folder / "empty.png").write_bytes(b"")
    (folder / "bad_chunk.png").write_bytes(whole[:40] + b"\xff" * 20 + whole[60:])
    Image.new("1", (10000, 10000)).save(folder / "bomb.png")  # 100 million pixels in 12 kB
    (folder / "folder.png").mkdir()


def test_broken_pictures_and_videos_end_with_one_sentence(models, tmp_path, capsys):
    broken(tmp_path)
    write_video(np.zeros((3, 32, 32, 3), np.uint8), tmp_path / "short.mp4")
    write_video(np.zeros((9, 32, 32, 3), np.uint8), tmp_path / "whole.mp4")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:300])
    cases = [(["--image", tmp_path / name], name) for name in BROKEN]
    cases += [
        (["--image", tmp_path / "none.png"], "none.png does not exist"),
        (["--video", tmp_path / "none.mp4"], "none.mp4 does not exist"),
        (["--video", tmp_path / "cut.mp4"], "can't be decoded"),
        (["--video", tmp_path / "text.png"], "can't be decoded"),
        (["--video", tmp_path / "short.mp4", "--video-frames", 5], "has 3 frames at 8 a second, not 5"),
        (["--video", tmp_path / "whole.mp4", "--video-frames", 0], "at least 1 frame"),
        (["--video-frames", 5], "give --video"),
    ]
    for words, sentence in cases:
        assert generate(models, "--prompt", "a", *words, "--out", tmp_path / "out.mp4") == 2, words
        error = capsys.readouterr().err.strip().splitlines()
        assert error[-1].startswith("videoar generate: ") and sentence in error[-1], (words, error)
        assert not any("Traceback" in line for line in error)
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", " \t"], "the prompt is empty"),
        (["--prompt", "one two three four five six seven eight nine"], "has 9 text tokens: the model takes 1 to 8"),
        (["--prompt", "x" * (LONGEST + 1)], f"has {LONGEST + 1} characters"),
        (["--prompt", "a", "--guidance", "nan"], "guidance 'nan'"),
        (["--prompt", "a", "--guidance", "hot"], "guidance 'hot'"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "a", "--temperature", "nan"], "temperature is nan"),
        (["--prompt", "a", "--seconds", "nan"], "nan seconds"),
        (["--prompt", "a", "--seed", "-1"], "seed is -1"),
        (["--prompt", "a", "--samples", "0"], "at least 1"),
        (["--prompt", "a", "--frames", "6"], "6 frames are not 1+4n"),
        (["--prompt", "a", "--out", "clip.avi"], "clip.avi is no kind of file"),
        (["--prompt", "a", "--out", "full"], "full is a folder that is there already"),
        (["--prompt", "a", "--out", "grid", "--grid"], "a grid is one file"),
        (["--prompt", "a", "--out", "g.png", "--grid", "--samples", "100000"], "use fewer prompts or samples"),
        (["--prompt-file", "none.csv"], "none.csv does not exist"),
        (["--prompt-file", "nothing.txt"], "holds no prompt"),
        (["--prompt-file", "column.csv"], "no column caption"),
        (["--prompt-file", "latin.csv"], "can't be read as text in UTF-8"),
        (["--prompt-file", "comma.csv"], "line 2 of comma.csv has more values than columns"),
        (["--prompt-file", "huge.txt"], "line 2 of huge.txt has"),
        (["--prompt-file", "twice.csv"], "line 3 of twice.csv has the name 'A' of line 2"),
        (["--prompt-file", "taken.csv"], "two files would be called"),
    ],
)  # fmt: skip
def test_bad_words_end_with_one_sentence(models, tmp_path, capsys, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    (tmp_path / "nothing.txt").write_text("\n \n")
    (tmp_path / "column.csv").write_text("text\na\n")
    (tmp_path / "latin.csv").write_bytes("caption\ncaf\xe9\n".encode("latin-1"))
    (tmp_path / "comma.csv").write_text("caption\na circle, red\n")
    (tmp_path / "huge.txt").write_text("a\n" + "b" * (LONGEST + 1))
    (tmp_path / "twice.csv").write_text("caption,name\na,a\nb,A\n")
    (tmp_path / "taken.csv").write_text("caption,name\na,x\na,00000\nb,\n".replace("a,x", "a,"))
    before = sorted(path.name for path in tmp_path.iterdir())
    out = [] if "--out" in words else ["--out", "folder" if "--prompt-file" in words else "clip.mp4"]
    assert generate(models, *words, *out) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("videoar generate: ") and sentence in error[-1], error
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "name",
    ["../up", "/etc/x", "a/b", "a\\b", "..", ".hidden", "~x", "C:x", " a", "a\x00b", "a\nb", "x" * 300, "☆" * 100],
)
def test_names_that_lead_elsewhere_are_refused(models, tmp_path, capsys, name):
    with open(tmp_path / "p.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["caption", "name"], ["a circle", name]])
    assert generate(models, "--prompt-file", tmp_path / "p.csv", "--out", tmp_path / "in" / "out") == 2
    error = capsys.readouterr().err.strip()
    assert "is no plain file name" in error and "\n" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]


def test_classes_are_prompts(models, tmp_path, capsys):
    assert generate(models, "--prompt", "jump", "--guidance", "ucf", "--out", tmp_path / "c.gif", model="classes") == 0
    assert info(capsys, tmp_path / "c.gif")["prompt"] == "jump"
    (tmp_path / "p.txt").write_text("run\nfly\n")
    for words in (
        ["--prompt", "fly", "--out", tmp_path / "f.mp4"],
        ["--prompt-file", tmp_path / "p.txt", "--out", tmp_path / "f"],
    ):
        assert generate(models, *words, model="classes") == 2
        assert "the class 'fly' does not exist: the model knows run, jump, swim" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.gif", "p.txt"]
