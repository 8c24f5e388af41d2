"""gFVD and rFVD through the command: against the direct computation, several processes, splits, memory, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

import videoar
from data_pipelines.sources import Source, find_sources
from evaluation.fvd import I3D, FeatureStatistics
from evaluation.fvd_protocol import Clips, statistics
from evaluation.media import read_video
from tests.data_pipelines.media import write_video as encode
from tests.evaluation.test_fvd import script
from tests.evaluation.tiny import through, write_tokenizer
from tokenizer import VideoTokenizer
from tokenizer.clip_shape import ClipShape
from tokenizer.data_parallel import Ranks
from tokenizer.video_file import write_video

HOUSE = Path(__file__).resolve().parents[2]
ALONE = Ranks(0, 1, torch.device("cpu"))
CLASSES, EACH = ("Bowling", "Diving"), 6


class Detector(nn.Module):
    """Twelve features of a clip, called as I3D is: a small net with fixed random weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv3d(3, 6, (3, 16, 16), (2, 16, 16))

    def forward(self, x: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False):
        hidden = self.conv(x)
        return 30 * torch.cat([hidden.relu().mean((2, 3, 4)), hidden.square().mean((2, 3, 4))], 1)


def noise(seed: int, frames: int = 21, side: int = 32) -> np.ndarray:
    """Coarse noise that moves, uint8 [frames, side, side, 3]."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(side // 4, 0).repeat(side // 4, 1)
    return np.stack([np.roll(coarse, int(generator.integers(4)) * frame, axis=1) for frame in range(frames)])


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """UCF-101's layout with its lists, generated videos, a tokenizer and a detector."""
    base = tmp_path_factory.mktemp("fvd")
    lists: dict[str, list[str]] = {"trainlist01.txt": [], "testlist01.txt": []}
    for number, name in enumerate(CLASSES):
        for clip in range(EACH):
            file = base / "UCF-101" / name / f"v_{name}_g{clip:02d}_c01.avi"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_video(noise(100 * number + clip), file.with_suffix(".mp4"), 25)
            file.with_suffix(".mp4").rename(file)
            line = f"{name}/{file.name}"
            lists["testlist01.txt" if clip < 2 else "trainlist01.txt"].append(
                line if clip < 2 else f"{line} {number + 1}"
            )
    (base / "lists").mkdir()
    for name, lines in lists.items():
        (base / "lists" / name).write_text("\r\n".join(lines) + "\r\n")  # the official ones come from Windows
    (base / "made").mkdir()
    with open(base / "made" / "prompts.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "caption", "seed"])
        for clip in range(10):
            metadata = {"prompt": "Bowling", "seed": clip, "model": "abc"}
            write_video(noise(1000 + clip, 17), base / "made" / f"{clip:05d}.mp4", metadata=metadata)
            writer.writerow([f"{clip:05d}.mp4", "Bowling", clip])
    write_tokenizer(base / "tokenizer")
    script(Detector(), base / "i3d.pt")
    return base


def middles(ground: Path) -> list[tuple[str, np.ndarray]]:
    """Names and the middle 17 of each real video's 21 frames."""
    return [(source.name, read_video(source.path)[0][2:19]) for source in find_sources(ground / "UCF-101")[0]]


def words(ground: Path, out: Path, *more: object) -> list[str]:
    fixed = [
        "evaluate",
        "fvd",
        "--real",
        ground / "UCF-101",
        "--i3d",
        ground / "i3d.pt",
        "--shape",
        "32x32x17",
        "--batch-size",
        3,
    ]
    return [str(word) for word in (*fixed, "--out", out, *more)]


def direct(real: list[np.ndarray], made: list[np.ndarray], file: Path) -> float:
    """The textbook's formula on all features at once."""
    detector = I3D(file)
    one, other = (np.concatenate([detector(clip[None]) for clip in clips]) for clips in (real, made))
    (m, s), (n, t) = ((f.mean(0), np.cov(f, rowvar=False)) for f in (one, other))
    return np.square(m - n).sum() + np.trace(s) + np.trace(t) - 2 * np.trace(sqrtm(s @ t)).real


def test_gfvd_of_a_split_equals_the_direct_computation(ground, tmp_path, capsys):
    out, split = tmp_path / "new" / "gfvd.json", ground / "lists" / "trainlist01.txt"
    call = words(ground, out, "--generated", ground / "made", "--split", split, "--start", "centre", "--clips", 8)
    assert videoar.main(call) == 0
    result = json.loads(out.read_text())
    line = capsys.readouterr().out
    assert re.fullmatch(
        r"gFVD [0-9.]+: 8 real and 8 generated clips of 32x32x17, trainlist01.txt, seed 0\n", line
    )  # all 8 of the training list: 4 of each class
    real = [clip for name, clip in middles(ground) if not re.search("g0[01]", name)]
    order = sorted(np.random.default_rng(0).permutation(10)[:8])
    made = [read_video(ground / "made" / f"{index:05d}.mp4")[0] for index in order]
    assert result["fvd"] > 1 and result["fvd"] == pytest.approx(direct(real, made, ground / "i3d.pt"), rel=1e-3)
    arguments = result["arguments"]
    assert (arguments["protocol"], arguments["seed"], arguments["shape"]) == ("gFVD", 0, "32x32x17")
    assert arguments["split"][0]["list"] == "trainlist01.txt" and len(arguments["split"][0]["sha256"]) == 64
    generated = result["generated"]
    assert generated["first"]["model"] == "abc" and generated["models"] == ["abc"]
    assert generated["files"] == [f"{index:05d}.mp4" for index in order]
    assert generated["seeds"] == order and generated["prompts"] == ["Bowling"] * 8
    assert {"program", "python", "torch", "numpy", "av"} <= result["versions"].keys()
    before = out.stat().st_mtime_ns
    assert videoar.main(call) == 0 and out.stat().st_mtime_ns == before  # not measured twice
    assert videoar.main([*call, "--seed", "1"]) == 2
    assert "holds the FVD of something else" in capsys.readouterr().err


def test_rfvd_measures_reconstructions_of_the_same_clips(ground, tmp_path):
    out = tmp_path / "rfvd.json"
    call = words(ground, out, "--tokenizer", ground / "tokenizer", "--split", ground / "lists" / "testlist01.txt")
    assert videoar.main([*call, "--start", "centre"]) == 0
    result = json.loads(out.read_text())
    real = [clip for name, clip in middles(ground) if re.search("g0[01]", name)]
    tokenizer = VideoTokenizer.from_pretrained(ground / "tokenizer")
    made = [through(tokenizer, clip).clamp(0, 255).numpy().astype(np.uint8) for clip in real]
    assert result["fvd"] == pytest.approx(direct(real, made, ground / "i3d.pt"), rel=1e-3)
    assert result["arguments"]["protocol"] == "rFVD" and result["real"]["clips"] == result["generated"]["clips"] == 4
    # random starts depend on the seed and nothing else
    scores = []
    for number, seed in enumerate((0, 0, 1)):
        call[call.index("--out") + 1] = str(tmp_path / f"{number}.json")
        assert videoar.main([*call, "--seed", str(seed)]) == 0
        scores.append(json.loads((tmp_path / f"{number}.json").read_text())["fvd"])
    assert scores[0] == scores[1] != scores[2]


def test_two_processes_give_exactly_what_one_gives(ground, tmp_path):
    (tmp_path / "real").mkdir()
    for index, source in enumerate(find_sources(ground / "UCF-101")[0]):
        (tmp_path / "real" / f"{index:02d}.mp4").symlink_to(source.path)
    (tmp_path / "real" / "04.mp4").unlink()
    (tmp_path / "real" / "04.mp4").write_bytes(b"broken")  # batches keep their members
    call = words(ground, tmp_path / "one.json", "--generated", ground / "made", "--clips", 10)
    call[call.index("--real") + 1] = str(tmp_path / "real")
    environment = os.environ | {"PYTHONPATH": str(HOUSE), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert videoar.main(call) == 0
    finally:
        torch.set_num_threads(threads)
    call[call.index("--out") + 1] = str(tmp_path / "two.json")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "videoar"]
    done = subprocess.run([*torchrun, *call], cwd=HOUSE, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("gFVD") == 1  # one of them speaks
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one == two and one["fvd"] > 1  # to the last bit
    assert [item["source"] for item in one["skipped"]] == ["04.mp4"] and one["real"]["clips"] == 9


def wide_features(batch: np.ndarray) -> tuple[FeatureStatistics, ...]:
    """As many features as I3D has."""
    flat = batch[:, :, :5, :5].reshape(len(batch), -1)[:, :400].astype(np.float64)
    return (FeatureStatistics.of(flat + 1e4),)


def stream(count: int, side: int = 128) -> FeatureStatistics:
    sources = [Source(Path("none"), str(index), "") for index in range(count)]
    return statistics(sources, lambda source: noise(int(source.name), 17, side), wide_features, 8, ALONE, [], "noise")[
        0
    ]


def test_streamed_statistics_equal_direct_ones():
    streamed = stream(203, side=16)
    clips = np.stack([noise(index, 17, 16) for index in range(203)])
    features = clips[:, :, :5, :5].reshape(203, -1)[:, :400].astype(np.float64) + 1e4
    assert streamed.count == 203
    np.testing.assert_allclose(streamed.mean, features.mean(0), rtol=1e-10)
    expected = np.cov(features, rowvar=False)
    np.testing.assert_allclose(streamed.covariance, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())


def peak() -> int:
    """Bytes of memory that this process has held at most since the last `clear`."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def clear() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def test_memory_does_not_grow_with_the_number_of_clips():
    stream(16)  # libraries load, pools fill
    peaks = []
    for count in (16, 256):
        clear()
        stream(count)
        peaks.append(peak())
    one_clip = 17 * 128 * 128 * 3
    assert peaks[1] - peaks[0] < 40 * one_clip, peaks  # and not 240 clips of 0.8 MB; libraries' pools move by some


def test_clips_of_a_video_follow_seed_and_name(tmp_path):
    encode(tmp_path / "long.mp4", frames=48, size=(32, 32))
    shape = ClipShape(32, 32, 13)
    clips = [
        Clips(shape, None, "random", seed).read(Source(tmp_path / "long.mp4", name, ""))
        for seed, name in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))
    ]
    assert np.array_equal(clips[0], clips[1])
    assert not np.array_equal(clips[0], clips[2]) and not np.array_equal(clips[0], clips[3])
    half = Clips(shape, 4.0, "centre", 0).read(Source(tmp_path / "long.mp4", "a", ""))  # every second frame
    steps = np.diff(half[:, 4:-4, 4:-4].mean((1, 2, 3)))
    assert steps.mean() == pytest.approx(8, abs=0.5)  # of grey: 4 a frame


def test_bad_requests_end_with_one_sentence(ground, tmp_path, capsys):
    made = ["--generated", ground / "made"]
    (tmp_path / "list.txt").write_text("Bowling/v_Bowling_g99_c01.avi 1\n")
    (tmp_path / "path.txt").write_text("../../etc/passwd 1\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "out.json").write_text("{}")
    (tmp_path / "short").mkdir()
    for index in range(3):
        write_video(noise(index, 5), tmp_path / "short" / f"{index}.mp4")
    cases = [
        ([*made, "--split", tmp_path / "none.txt"], "none.txt does not exist"),
        (
            [*made, "--split", tmp_path / "list.txt"],
            "1 of the 1 videos of list.txt are not there, such as Bowling/v_Bowling_g99_c01",
        ),
        ([*made, "--split", tmp_path / "path.txt"], "line 1 of"),
        ([*made, "--split", tmp_path / "empty.txt"], "names no videos"),
        ([*made, "--clips", 99], "ask for 2 to 10"),
        ([*made, "--shape", "32x32x9"], "at least 10 frames, not 9"),
        ([*made, "--shape", "32x32"], "not HEIGHTxWIDTHxFRAMES"),
        ([*made, "--fps", -1], "rate of -1"),
        ([*made, "--i3d", tmp_path / "none.pt"], "none.pt does not exist"),
        (["--generated", tmp_path / "none"], "none does not exist"),
        (["--generated", tmp_path / "short"], "at least 2 clips of each side (0.mp4: too short"),
        (["--tokenizer", tmp_path], "no tokenizer"),
        ([*made, "--out", tmp_path / "out.json"], "holds no FVD"),
    ]
    for more, sentence in cases:
        assert videoar.main(words(ground, tmp_path / "x.json", *more)) == 2, more
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("videoar evaluate: ") and sentence in error, error
    call = words(ground, tmp_path / "x.json", *made)
    del call[call.index("--i3d") : call.index("--i3d") + 2]
    assert videoar.main(call) == 2 and "no file of it was named" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()
