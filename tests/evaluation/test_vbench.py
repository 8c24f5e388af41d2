"""VBench: its table against a published row, its prompt files, names, kills, several processes, and its package's interface."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import videoar
from evaluation.media import read_video
from evaluation.vbench_prompts import read_suite
from evaluation.vbench_scores import DIMENSIONS, PAPER, summarise, tables
from tests.inference.test_pipeline import tiny_pipeline
from tokenizer import UserError
from tokenizer.video_metadata import read_metadata

HOUSE = Path(__file__).resolve().parents[2]
VIDEOCRAFTER_2 = {
    "subject_consistency": 96.85, "background_consistency": 98.22, "temporal_flickering": 98.41, "motion_smoothness": 97.73,
    "dynamic_degree": 42.50, "aesthetic_quality": 63.13, "imaging_quality": 67.22, "object_class": 92.55, "multiple_objects": 40.66,
    "human_action": 95.00, "color": 92.92, "spatial_relationship": 35.86, "scene": 55.29, "appearance_style": 25.13,
    "temporal_style": 25.84, "overall_consistency": 28.23,
}  # fmt: skip
"""The row of VideoCrafter-2.0 on VBench's public leaderboard, whose three scores stand beside it: 80.44, 82.20, 73.42."""

SUITE = [
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a person swimming in ocean", "dimension": ["subject_consistency", "dynamic_degree", "motion_smoothness"]},
    {"prompt_en": "a red bird", "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}},
    {"prompt_en": "The bund Shanghai, oil painting", "dimension": ["appearance_style"]},
    {"prompt_en": "The bund Shanghai, oil painting", "dimension": ["overall_consistency", "aesthetic_quality"]},
    {"prompt_en": "A boat, 50% off. It's \"Ça va?\" -1", "dimension": ["scene"]},
]  # fmt: skip


def test_the_table_equals_a_published_row():
    found = summarise({name: value / 100 for name, value in VIDEOCRAFTER_2.items()})
    assert {name: round(100 * value, 2) for name, value in found.items()} == {
        "total": 80.44, "quality": 82.20, "semantic": 73.42,
    }  # fmt: skip
    assert len(DIMENSIONS) == 16
    # and the paper's own three numbers belong together
    assert (4 * PAPER["quality"] + PAPER["semantic"]) / 5 == pytest.approx(PAPER["total"], abs=1e-4)


def test_worked_out_by_hand_and_what_is_missing():
    ends = {name: one.most for name, one in DIMENSIONS.items()}
    assert summarise(ends) == pytest.approx({"total": 1, "quality": 1, "semantic": 1})
    # dynamic degree weighs half: of 6.5 in all
    assert summarise(ends | {"dynamic_degree": 0.0})["quality"] == pytest.approx(6 / 6.5)
    assert summarise(ends | {"scene": 0.4111})["semantic"] == pytest.approx(8.5 / 9)
    part = {name: value for name, value in ends.items() if name != "color"}
    assert summarise(part) == {"total": None, "quality": pytest.approx(1), "semantic": None}
    text = tables("mine", part)
    assert "| mine (measured)    | not measured |  100.00 | not measured |" in text
    assert "| VideoAR-4B (paper) |        81.74 |   82.88 |        77.15 |" in text
    assert "| color " in text and text.count("not measured") == 3


def test_prompt_files_of_both_kinds(tmp_path):
    (tmp_path / "VBench_full_info.json").write_text(json.dumps(SUITE))
    suite = read_suite(tmp_path / "VBench_full_info.json")
    assert [prompt.index for prompt in suite] == [0, 1, 2, 3, 4]  # one prompt is there twice
    assert suite[3].dimensions == ("aesthetic_quality", "appearance_style", "overall_consistency")
    assert suite[4].file_name(3) == 'A boat, 50% off. It\'s "Ça va?" -1-3.mp4'  # as it is
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "scene.txt").write_text(" alley \n\nbeach\n")
    (tmp_path / "lists" / "color.txt").write_text("a red bird")
    (tmp_path / "lists" / "other.txt").write_text("not of VBench")
    assert [(prompt.text, prompt.dimensions) for prompt in read_suite(tmp_path / "lists")] == [
        ("a red bird", ("color",)), ("alley", ("background_consistency", "scene")), ("beach", ("background_consistency", "scene")),
    ]  # fmt: skip
    assert [prompt.text for prompt in read_suite(tmp_path / "lists" / "scene.txt")] == ["alley", "beach"]
    for name, content, words in (
        ("a.json", "[", "not in the layout"), ("b.json", '[{"prompt": "x"}]', "not in the layout"), ("c.json", "[]", "holds no prompts"),
        ("d.json", '[{"prompt_en": "x", "dimension": ["charm"]}]', "'charm'"), ("e.json", '[{"prompt_en": 3, "dimension": []}]', "'3'"),
        ("f.json", '[{"prompt_en": "../x", "dimension": []}]', "can't be a file's name"), ("g.txt", "a/b", "can't be a file's name"),
        ("h.txt", "x" * 250, "can't be a file's name"), ("i.json", '{"a": 1}', "not in the layout"),
    ):  # fmt: skip
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=words):
            read_suite(tmp_path / name)


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A model and a suite."""
    base = tmp_path_factory.mktemp("vbench")
    tiny_pipeline(num_frames=2).save_pretrained(base / "model")
    (base / "suite.json").write_text(json.dumps(SUITE))
    return base


def words(ground, out, *more):
    call = [
        "evaluate",
        "vbench",
        "--model",
        ground / "model",
        "--prompts",
        ground / "suite.json",
        "--out",
        out,
        "--seed",
        100,
    ]
    return [str(word) for word in (*call, "--batch-size", 2, *more)]


@pytest.fixture(scope="module")
def whole(ground, tmp_path_factory):
    """All videos, made by one process without an interruption."""
    out, threads = tmp_path_factory.mktemp("whole") / "out", torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert videoar.main(words(ground, out, "--generate-only")) == 0
    finally:
        torch.set_num_threads(threads)
    return out


def content(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (out / "videos").iterdir()}


def test_videos_have_the_names_that_vbench_looks_for_and_seeds_of_their_own(whole):
    prompts = list(dict.fromkeys(entry["prompt_en"] for entry in SUITE))
    assert set(content(whole)) == {f"{prompt}-{sample}.mp4" for prompt in prompts for sample in range(5)}
    for index, prompt in enumerate(prompts):
        for sample in (0, 4):
            said = read_metadata(whole / "videos" / f"{prompt}-{sample}.mp4")
            assert (said["prompt"], said["seed"], said["guidance"]) == (prompt, 100 + 5 * index + sample, "t2v")
    assert len(set(content(whole).values())) == 25
    request = json.loads((whole / "request.json").read_text())
    assert (request["seed"], request["samples"], request["prompts"]) == (100, 5, prompts)
    assert sorted(path.name for path in whole.iterdir()) == ["request.json", "videos"]


def test_kill_9_and_another_number_of_processes_change_no_byte(ground, whole, tmp_path):
    out, environment = (
        tmp_path / "out",
        os.environ | {"PYTHONPATH": str(HOUSE), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    call = words(ground, out, "--generate-only")
    process = subprocess.Popen(
        [sys.executable, "-m", "videoar", *call], cwd=HOUSE, env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (out / "videos").is_dir() or len(list((out / "videos").iterdir())) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = content(out)
    assert 3 <= len(left) < 25 and all(content(whole)[name] == data for name, data in left.items())
    times = {name: (out / "videos" / name).stat().st_mtime_ns for name in left}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "videoar"]
    done = subprocess.run([*torchrun, *call], cwd=HOUSE, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert content(out) == content(whole)
    assert all((out / "videos" / name).stat().st_mtime_ns == before for name, before in times.items())
    assert not (out / "writing").exists()


PACKAGE = '''
"""Stands in for the vbench package 0.1.5, whose networks need weights that are not here: its interface and its files."""
import json, os
from pathlib import Path

class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.info, self.out = full_info_dir, output_path
        os.makedirs(output_path, exist_ok=True)

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, read_frame=False, **kwargs):
        names = os.listdir(videos_path)
        postfix = Path(names[0]).suffix
        results = {}
        for dimension in dimension_list:
            if os.environ.get("VBENCH_FAILS") == dimension:
                raise RuntimeError("no weights of a network")
            found = []
            for entry in json.load(open(self.info, encoding="utf-8")):
                if dimension in entry["dimension"]:
                    found += [n for i in range(5) if (n := f"{entry['prompt_en']}-{i}{postfix}") in names]
            results[dimension] = [len(found) / 100, [{"video_path": n, "video_results": 0.1} for n in found]]
        json.dump(results, open(os.path.join(self.out, name + "_eval_results.json"), "w"))
'''


def test_its_package_is_called_where_it_is_installed(ground, whole, tmp_path, monkeypatch, capsys):
    out = whole
    assert videoar.main(words(ground, out)) == 2
    assert "VBench is not installed here" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "vbench").mkdir()
    (tmp_path / "vbench" / "__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("VBENCH_FAILS", "color")
    before = content(out)
    assert videoar.main(words(ground, out)) == 2
    assert "VBench failed on color (no weights of a network)" in capsys.readouterr().err
    done = sorted(file.name for file in (out / "results").iterdir())
    assert "aesthetic_quality_eval_results.json" in done and "color_eval_results.json" not in done
    monkeypatch.delenv("VBENCH_FAILS")
    kept = (out / "results" / done[0]).stat().st_mtime_ns
    assert videoar.main(words(ground, out)) == 0
    captured = capsys.readouterr()
    assert (out / "results" / done[0]).stat().st_mtime_ns == kept and content(out) == before  # nothing is done twice
    result = json.loads((out / "vbench.json").read_text())
    # five videos of each prompt were found under their names
    expected = {name: 0.05 for name in (
        "temporal_flickering", "subject_consistency", "dynamic_degree", "motion_smoothness", "color", "appearance_style",
        "overall_consistency", "aesthetic_quality", "scene",
    )}  # fmt: skip
    assert result["scores"] == expected and result["summary"]["total"] is None
    assert sorted(result["missing"]) == sorted(DIMENSIONS.keys() - expected.keys())
    assert result["request"]["seed"] == 100 and result["versions"]["vbench"] == "not installed"
    assert captured.out == (out / "vbench.md").read_text() and "| color " in captured.out
    # scores that were measured elsewhere complete the table
    elsewhere = {name: [one / 100, []] for name, one in VIDEOCRAFTER_2.items()}
    for file in (out / "results").iterdir():
        file.unlink()
    (out / "results" / "all_eval_results.json").write_text(json.dumps(elsewhere))
    assert videoar.main(words(ground, out)) == 0
    assert "80.44 |   82.20 |    73.42 |" in capsys.readouterr().out
    (out / "results" / "bad_eval_results.json").write_text('{"color": "high"}')
    assert videoar.main(words(ground, out)) == 2 and "no result of VBench" in capsys.readouterr().err


def test_other_requests_are_refused(ground, whole, tmp_path, capsys):
    tiny_pipeline(num_classes=3).save_pretrained(tmp_path / "classes")
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "mine.txt").write_text("x")
    for call, sentence in (
        (words(ground, whole, "--seed", 7), "other values of seed"),
        (words(ground, whole, "--guidance", 3), "other values of guidance"),
        (words(ground, tmp_path / "diary"), "not written by this command"),
        (words(ground, tmp_path / "x", "--dimensions", "charm"), "no dimension 'charm'"),
        (words(ground, tmp_path / "x", "--dimensions", "human_action"), "no prompt of the suite is for 'human_action'"),
        (words(ground, tmp_path / "x", "--samples", 0), "give 1 or more"),
        (words(ground, tmp_path / "x", "--prompts", tmp_path / "none.json"), "none.json do not exist"),
        (words(ground, tmp_path / "x", "--model", tmp_path / "classes"), "steered by classes"),
    ):
        assert videoar.main(call) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("videoar evaluate: ") and sentence in error, error
    assert not (tmp_path / "x").exists()


def test_a_part_of_the_dimensions_makes_the_same_videos(ground, whole, tmp_path):
    out = tmp_path / "out"
    assert videoar.main(words(ground, out, "--dimensions", "color,scene", "--generate-only", "--batch-size", 3)) == 0
    assert len(content(out)) == 10
    for name in content(out):
        assert read_metadata(out / "videos" / name) == read_metadata(whole / "videos" / name)
        one, other = (read_video(folder / "videos" / name)[0].astype(int) for folder in (out, whole))
        assert abs(one - other).mean() < 1  # other batch mates: pixels may be rounded otherwise
