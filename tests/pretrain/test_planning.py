"""`videoar plan`: from the codes or from what is expected of them, what each number changes, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import videoar
from benchmarks.training import network
from parallel.setup import ParallelConfig
from pretrain.config import PretrainConfig
from pretrain.planning.flops import count
from pretrain.planning.gpus import KINDS, Gpu, load_gpu
from pretrain.planning.loads import stage_loads
from pretrain.planning.plan import make
from pretrain.planning.report import text
from pretrain.planning.search import Search, sizes_of
from pretrain.planning.shapes import read_shapes
from pretrain.planning.step_time import Work, step_time
from pretrain.planning.storage import folders
from tests.pretrain.tiny import DIM, TEXT_DIM, stage, write_codes, write_run, write_tokenizer
from tokenizer import settings
from tokenizer.errors import UserError
from tokenizer.scales import ScaleSchedule

HOUSE = Path(__file__).parents[2]
CONFIGS = HOUSE / "pretrain" / "configs"
RESULTS = HOUSE / "benchmarks" / "results"


def recipe(name: str, *words: str) -> PretrainConfig:
    return settings.load(PretrainConfig, CONFIGS / f"{name}.yaml", list(words))


def edited(folder: Path, change) -> PretrainConfig:
    """The 4B recipe, changed."""
    content = yaml.safe_load((CONFIGS / "t2v-4b.yaml").read_text())
    change(content)
    (folder / "edited.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return settings.load(PretrainConfig, folder / "edited.yaml")


@pytest.fixture(scope="module")
def plan_4b() -> dict[str, Any]:
    return make(recipe("t2v-4b"), 64, "h100")


def test_the_same_run_is_planned_from_its_codes_and_from_what_is_expected_of_them(tmp_path: Path) -> None:
    fingerprint = write_tokenizer(tmp_path / "tokenizer")
    write_codes(tmp_path / "codes", fingerprint, side=4, frames=3, others=((2, 2, 12),), has_latents=False)
    expected = [{"variant": "64x64x9", "clips": 24}, {"variant": "32x32x5", "clips": 12}]
    sources = [{"dir": str(tmp_path / "codes"), "expected": expected}]
    sources.append({"dir": str(tmp_path / "codes"), "expected": expected, "num_frames": 1, "proportion": 0.5})
    common = {"text_dim": TEXT_DIM, "text_tokens": 2, "fps": 8.0}
    file = write_run(tmp_path, stages=[stage(tmp_path / "codes", 4, codes=sources, token_budget=102)], expected=common)
    run = settings.load(PretrainConfig, file).rooted()
    there = read_shapes(run)
    assert there.found == {str(tmp_path / "codes")} and there.notes == ()
    real = folders(run, there)[0]
    written = sum(one.stat().st_size for one in (tmp_path / "codes").rglob("shard.*"))
    assert real.code_bytes == pytest.approx(written, rel=0.1)

    (tmp_path / "codes").rename(tmp_path / "elsewhere")
    guessed = read_shapes(run)
    assert guessed.found == frozenset() and guessed.plan.model == there.plan.model

    def seen(shapes) -> list:
        (load,) = stage_loads(run, shapes)
        return [(one.layout, one.share, one.flops, load.clips(one, load.config)) for one in load.loads]

    assert seen(guessed) == seen(there) and len(seen(there)) == 4
    planned = folders(run, guessed)[0]
    assert not planned.there and planned.code_bytes == real.code_bytes
    assert (planned.hours, planned.encode_flops) == (real.hours, real.encode_flops)

    # other numbers of clips only change the estimate; another network is refused
    (tmp_path / "elsewhere").rename(tmp_path / "codes")
    expected[0]["clips"] = 48
    run = settings.load(
        PretrainConfig, write_run(tmp_path, stages=[stage(tmp_path / "codes", 4, codes=sources[:1])], expected=common)
    )
    (clips, tokens) = read_shapes(run.rooted()).notes
    assert "holds 36 clips, 60 were expected" in clips and "tokens a clip" in tokens
    with pytest.raises(UserError, match=f"have text width {TEXT_DIM}, the settings expect 16: mend `expected`"):
        read_shapes(settings.load(PretrainConfig, tmp_path / "run.yaml", ["--expected.text_dim", "16"]).rooted())
    assert there.tokenizer.autoencoder.dim == DIM


EXPECTED = {  # a field, another value, and where the plan changes
    "variant": ("256x9", lambda plan: plan["stages"][0]["shapes"][1]["tokens_a_clip"]),
    "aspect": (1.0, lambda plan: plan["stages"][0]["shapes"][1]["pixels"]),
    "clips": (20_000_000, lambda plan: plan["stages"][0]["shapes"][1]["epochs"]),
    "raw_megabytes": (1.0, lambda plan: plan["folders"][1]["raw_bytes"]),
}
COMMON = {
    "text_dim": (4096, lambda plan: plan["network"]["parameters"]),
    "text_tokens": (
        60,
        lambda plan: (plan["folders"][0]["text_bytes"], plan["stages"][0]["shapes"][0]["flops_a_clip"]),
    ),
    "latents": (True, lambda plan: plan["folders"][0]["latent_bytes"]),
    "fps": (16.0, lambda plan: plan["folders"][1]["hours"]),
    "tokenizer": ("tokenizer/configs/demo.yaml", lambda plan: plan["encoding"]["flops"]),
}


@pytest.fixture(scope="module")
def written_4b() -> dict[str, Any]:
    return make(recipe("t2v-4b"), 64, "h100", as_written=True)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_expected_of_clips_has_an_effect(tmp_path: Path, written_4b: dict, name: str) -> None:
    value, where = EXPECTED[name]

    def change(content: dict) -> None:
        content["stages"] = content["stages"][:1]
        content["stages"][0]["token_budget"] = None
        content["stages"][0]["codes"][1]["expected"][0][name] = value

    assert where(make(edited(tmp_path, change), 64, "h100", as_written=True)) != where(written_4b)


def test_a_stages_window_makes_its_clips_cheaper(tmp_path: Path, written_4b: dict) -> None:
    def change(content: dict) -> None:
        content["stages"][2]["window"] = 4

    plan = make(edited(tmp_path, change), 64, "h100", as_written=True)
    assert [one["window"] for one in plan["stages"]] == [None, None, 4]
    cheaper = [one["flops_a_step"] < all["flops_a_step"] for one, all in zip(plan["stages"], written_4b["stages"])]
    assert cheaper == [False, False, True]


@pytest.mark.parametrize("name", COMMON)
def test_what_is_expected_of_all_codes_has_an_effect(written_4b: dict, name: str) -> None:
    value, where = COMMON[name]
    words = [f"--expected.{name}", str(value).lower()]
    assert where(make(recipe("t2v-4b", *words), 64, "h100", as_written=True)) != where(written_4b)
    shapes = read_shapes(recipe("ucf101-l", "--expected.classes", "7"))
    assert shapes.plan.model.num_classes == 7


def test_every_number_of_a_gpu_has_an_effect(tmp_path: Path) -> None:
    base = yaml.safe_load(KINDS.read_text())["h100"]
    run = recipe(
        "ucf101-xl", "--parallel.fp8", "delayed", "--parallel.context_parallel_size", "2", "--parallel.overlap", "off"
    )

    def planned(**changes: Any) -> dict[str, Any]:
        (tmp_path / "gpu.yaml").write_text(yaml.safe_dump({**base, **changes}))
        plan = make(run, 16, str(tmp_path / "gpu.yaml"), as_written=True)
        return {key: plan[key] for key in ("stages", "encoding")}

    before, untouched = planned(), []
    halves = {field.name: getattr(load_gpu("h100"), field.name) for field in fields(Gpu)}
    for name, value in halves.items():
        new = 0.5 if name == "tensor_hidden" else 4 if name == "gpus_per_node" else 0.9 * value
        if planned(**{name: new}) == before:
            untouched.append(name)
    assert untouched == []


def test_the_clock_of_the_planner_is_set_by_the_step_that_was_measured() -> None:
    measured = json.loads((RESULTS / "train_step_gpu.json").read_text())
    assert measured["hardware"] == "NVIDIA H200"
    model = network("ucf101-l", ScaleSchedule.for_grid(16, 16, 10), 5)
    layout = model.layout()
    work = Work(model, 8 * layout.length, count(model, layout, torch.ones(8, dtype=torch.long)))
    gpu, results = load_gpu("h200"), measured["results"]
    plain = step_time(work, ParallelConfig(precision="bfloat16"), 1, 1, gpu).total
    eight = step_time(work, ParallelConfig(precision="bfloat16", fp8="delayed"), 1, 1, gpu).total
    assert plain == pytest.approx(results["step_seconds_bfloat16"], rel=0.02)
    assert plain / eight == pytest.approx(results["fp8_speedup"], rel=0.02)


def test_the_search_finds_the_fastest_layout_that_fits(plan_4b: dict) -> None:
    run = recipe("ucf101-xl").rooted()
    loads, gpu = stage_loads(run, read_shapes(run)), load_gpu("h100")
    search = Search(loads, run.parallel, 8, gpu)
    found = search.run()
    # every layout and every micro batch, one by one
    every = []
    for sizes in search.sizes(8):
        for parallel in search.layouts(*sizes):
            for option in search.micro_batches(0, parallel, 8) if search.refusal(*sizes) is None else ():
                if loads[0].memory(parallel, 8, option).total <= gpu.usable_bytes:
                    every.append((loads[0].time(parallel, 8, option, gpu).total, parallel))
    least, fastest = min(every, key=lambda one: one[0])
    assert found.best.stages[0].time.total == least and found.best.parallel == fastest
    assert found.best.days <= found.next[0].days <= found.next[1].days
    assert len({sizes_of(one.parallel) for one in (found.best, *found.next)}) == 1 + len(found.next)

    assert plan_4b["total"]["days"] <= plan_4b["as_written"]["days"]
    assert sum(one["days"] for one in plan_4b["alone"]) <= plan_4b["total"]["days"]
    assert all(one["memory"]["total"] <= one["memory"]["usable"] for one in plan_4b["stages"])
    reasons = {one["layout"]: one["reason"] for one in plan_4b["rejected"]}
    assert "GB at least, of 74.1" in reasons["DP 64"] and len(reasons) == len(plan_4b["rejected"]) > 3
    assert reasons["PP 3, 6, 9, 12, 18, 36"] == "64 GPUs do not divide by it"


def test_parts_add_up(plan_4b: dict) -> None:
    for one in plan_4b["stages"]:
        for part in ("memory", "seconds"):
            whole = {name: value for name, value in one[part].items() if name not in ("total", "usable")}
            assert sum(whole.values()) == pytest.approx(one[part]["total"]) and min(whole.values()) >= 0
        assert one["mfu"] == pytest.approx(one["flops_a_step"] / one["seconds"]["total"] / (64 * 989e12))
        assert one["days"] == pytest.approx(one["steps"] * one["seconds"]["total"] / 86400)
        modes = one["activations_by_recompute"]
        assert modes["none"]["kept"] > modes["selective"]["kept"] > modes["full"]["kept"]
    assert plan_4b["total"]["tokens"] == pytest.approx(sum(one["tokens"] for one in plan_4b["stages"]))
    # 50 million images of 530 tokens of 6 bytes, 50 bytes a record, 120 rows of 2,048 halves of text
    assert plan_4b["folders"][0]["code_bytes"] == 50_000_000 * (530 * 6 + 50 + 120 * 2048 * 2)
    assert plan_4b["encoding"]["flops"] == sum(one["encode_flops"] for one in plan_4b["folders"])


def test_the_command_prints_the_same_plan_again_and_again(capsys: pytest.CaptureFixture[str], plan_4b: dict) -> None:
    words = ["plan", "--config", str(CONFIGS / "ucf101-l.yaml"), "--gpus", "8", "--gpu", "a100"]
    printed = []
    for extra in ([], [], ["--json"]):
        assert videoar.main([*words, *extra]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "906,375,168 parameters" in printed[0] and "Assumed" in printed[0]
    assert json.loads(printed[2])["network"]["parameters"] == 906_375_168
    assert json.loads(json.dumps(plan_4b)) == plan_4b
    lines = text(plan_4b).splitlines()
    assert sum("| 3 III, clips of 33 to 65" in line for line in lines) == 4 and any(
        "left out" in line for line in lines
    )


TP1 = ["--parallel.tensor_parallel_size", "1", "--parallel.recompute", "none"]
BAD = {
    "there is no GPU kind 'h1000': choose a100, h100, h200, b200": ("t2v-4b", 8, "h1000", []),
    "0 GPUs can train nothing": ("t2v-4b", 0, "h100", []),
    "no layout of 7 GPUs divides the network's 36 layers and 32 heads and the batches of all stages (512, 256, 128 clips): try 6 or 8": (
        "t2v-4b", 7, "h100", [],
    ),
    "the run fits no layout of 2 GPUs: the leanest one (": ("t2v-4b", 2, "a100", ["--network.hidden_size", "10240"]),
    "parallel.fp8 is delayed, which 'a100' does not compute in": ("ucf101-l", 8, "a100", ["--parallel.fp8", "delayed"]),
    "num_attention_heads 12 does not divide by tensor_parallel_size 8": ("ucf101-l", 8, "h100", ["--parallel.tensor_parallel_size", "8"]),
    "global_batch_size 256 is no multiple of micro_batch_size 16 x 24 data-parallel ranks": ("ucf101-l", 24, "h100", []),
    "stage 'UCF-101 at 128 px' takes 80.4 GB a GPU as written": ("ucf101-xl", 8, "h100", TP1),
}  # fmt: skip


@pytest.mark.parametrize("sentence", BAD, ids=range(len(BAD)))  # type: ignore[arg-type]
def test_what_can_not_be_planned_is_refused_in_one_sentence(capsys: pytest.CaptureFixture[str], sentence: str) -> None:
    name, gpus, kind, words = BAD[sentence]
    written = [] if "no layout" in sentence else ["--as-written"]
    status = videoar.main(
        ["plan", "--config", str(CONFIGS / f"{name}.yaml"), "--gpus", str(gpus), "--gpu", kind, *written, *words]
    )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2 and error.startswith("videoar plan: ") and sentence in error


def test_what_is_expected_must_be_said_once_and_make_sense(tmp_path: Path) -> None:
    def missing(content: dict) -> None:
        content["stages"][1]["codes"][0]["expected"] = []

    def twice(content: dict) -> None:
        content["stages"][1]["codes"][0]["dir"] = "data/t2v-codes/256-images"

    def lengths(content: dict) -> None:
        content["stages"][2]["codes"][0]["expected"][0]["variant"] = "512x33+65"

    def frames(content: dict) -> None:
        content["stages"][2]["codes"][0]["num_frames"] = 20

    for change, words in (
        (missing, "512-images holds no codes yet, and the settings do not say what it will hold: add `expected`"),
        (twice, "expected to hold different clips in two places"),
        (lengths, "lists several lengths: give each an entry of its own"),
        (frames, "holds clips of 17 latent frames, 20 were asked for"),
    ):
        with pytest.raises(UserError, match=words):
            make(edited(tmp_path, change), 64, "h100")
    for words in (["--expected.text_dim", "0"], ["--expected.fps", "0"]):
        with pytest.raises(UserError, match=f"{words[0][2:]} is 0"):
            recipe("t2v-4b", *words)
    with pytest.raises(UserError, match="the GPU's matmul_share is 1.5"):
        Gpu(1, 1, 1, 1, 1, matmul_share=1.5)
