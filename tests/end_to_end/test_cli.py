"""What a person sees: help for every verb, and one clear sentence with status 2 for every mistake, nothing left behind."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import videoar
from tokenizer.video_file import write_video

HOUSE = Path(__file__).resolve().parents[2]
VERBS = [
    ["corpus"], ["shards"], ["tokenizer", "train"], ["tokenizer", "inflate"], ["tokenizer", "reconstruct"], ["encode"],
    ["pretrain"], ["plan"],
    ["export"], ["generate"], ["info"], ["evaluate", "shapes"], ["evaluate", "reconstruction"], ["evaluate", "fvd"],
    ["evaluate", "vbench"], ["evaluate", "continuation"], ["ablate"], ["demo"], ["report"], ["status"], ["samples"],
]  # fmt: skip


def run(capsys, *words):
    status = videoar.main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err.strip()


@pytest.mark.parametrize("verb", VERBS, ids="-".join)
def test_every_verb_explains_itself(capsys, verb):
    with pytest.raises(SystemExit) as stop:
        videoar.main([*verb, "--help"])
    assert stop.value.code == 0 and "usage: videoar" in capsys.readouterr().out


@pytest.mark.parametrize(
    "verb", [["shards"], ["tokenizer", "train"], ["encode"], ["pretrain"], ["demo"], ["ablate"]], ids="-".join
)
def test_every_setting_is_explained(capsys, verb):
    with pytest.raises(SystemExit) as stop:
        videoar.main([*verb, "--help-settings"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "default:" in text


def test_help_is_light():
    """`videoar --help` must not load torch: it should answer at once."""
    code = "import sys, videoar\ntry: videoar.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules, 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=HOUSE, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False False"


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["shards", "--videos", "nowhere", "--out", "OUT"], "nowhere"),
        (["shards", "--videos", "EMPTY", "--out", "OUT"], "EMPTY"),
        (["tokenizer", "train", "--config", "none.yaml", "--shards", "x", "--out", "OUT"], "none.yaml does not exist"),
        (["tokenizer", "train", "--shards", "nowhere", "--out", "OUT"], "nowhere"),
        (["tokenizer", "train", "--shards", "x", "--out", "OUT", "--lrr", "1"], "nearest known key is 'lr'"),
        (
            ["tokenizer", "train", "--shards", "x", "--out", "OUT", "--device", "gpu"],
            "there is no device 'gpu': choose cpu or cuda",
        ),
        (["tokenizer", "inflate", "--image-checkpoint", "nowhere.pth", "--out", "OUT"], "nowhere.pth does not exist"),
        (["encode", "--shards", "nowhere", "--tokenizer", "x", "--out", "OUT"], "nowhere"),
        (
            ["encode", "--shards", "x", "--tokenizer", "x", "--out", "OUT", "--variants", "[64x64x16]"],
            "16 frames are not 1+4n",
        ),
        (["encode", "--shards", "x", "--tokenizer", "x", "--out", "OUT", "--variants", "[60x64x17]"], "multiple of 16"),
        (["pretrain", "--config", "none.yaml"], "none.yaml does not exist"),
        (["export", "--checkpoint", "nowhere", "--tokenizer", "x", "--out", "OUT"], "nowhere"),
        (["generate", "--model", "nowhere", "--prompt", "a", "--out", "OUT/a.mp4"], "nowhere"),
        (["tokenizer", "reconstruct", "--tokenizer", "x", "--videos", "nowhere.mp4", "--out", "OUT"], "nowhere.mp4"),
        (
            ["tokenizer", "reconstruct", "--tokenizer", "x", "--videos", "x", "--out", "OUT", "--size", "40"],
            "height 40 is not a multiple of 16",
        ),
        (["evaluate", "reconstruction", "--tokenizer", "x", "--videos", "nowhere", "--out", "OUT"], "nowhere"),
        (
            [
                "evaluate",
                "reconstruction",
                "--tokenizer",
                "x",
                "--videos",
                "x",
                "--out",
                "OUT",
                "--variants",
                "64x64x16",
            ],
            "16 frames are not 1+4n",
        ),
        (["evaluate", "shapes", "--videos", "nowhere.csv"], "nowhere.csv does not exist"),
        (["report", "--run", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_ends_with_one_sentence(capsys, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").mkdir()
    status, _, error = run(capsys, *words)
    last = error.splitlines()[-1]
    assert status == 2 and sentence in last and last.startswith(f"videoar {words[0]}: ")
    assert not Path("OUT").exists() or not any(Path("OUT").iterdir())


def test_unknown_words_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        videoar.main(["corpus", "--out", "x", "--clip", "3"])
    assert stop.value.code == 2 and "--clip" in capsys.readouterr().err


def test_bad_videos_are_listed_and_counted(capsys, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    clip = np.random.default_rng(0).integers(0, 255, (17, 64, 64, 3), dtype=np.uint8)
    write_video(clip, folder / "good.mp4")
    write_video(clip[:5], folder / "short.mp4")
    (folder / "empty.mp4").touch()
    (folder / "noise.mp4").write_bytes(bytes(range(256)) * 20)
    status, out, _ = run(capsys, "shards", "--videos", folder, "--out", tmp_path / "shards")
    assert status == 0 and '"clips": 1' in out and '"rejected": 3' in out
    rejected = (tmp_path / "shards" / "rejected.jsonl").read_text()
    assert all(name in rejected for name in ("short.mp4", "empty.mp4", "noise.mp4")) and "too short" in rejected
