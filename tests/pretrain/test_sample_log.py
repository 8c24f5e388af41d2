"""Which clips each step trained on: what is written is what was read, once a step, also over a kill and on other numbers of ranks."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from pretrain.config import PretrainConfig
from pretrain.stages import make_plan
from tests.pretrain.ranks import run_ranks
from tests.pretrain.tiny import stage, write_run
from tokenizer import settings


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_two_ranks_log_their_parts_and_one_goes_on(tmp_path: Path) -> None:
    stages = [stage(tmp_path / "codes", 5), stage(tmp_path / "codes", 3, name="two")]
    file, log = (
        write_run(tmp_path, stages=stages, checkpoint_every=3, save_in_background=False),
        ["--log_samples", "true"],
    )
    config = settings.load(PretrainConfig, file)
    expected = []
    for one in make_plan(config.rooted()).stages:
        stream = one.stream(config, 0, 1)
        for step in range(1, one.config.steps + 1):
            batch = next(stream)
            source = int(batch.tokens.shape[1] == 1)  # the second one's clips are images
            clips = {"source": source, "sample_index": batch.sample_index.tolist(), "epoch": batch.epoch.tolist()}
            expected.append({"stage": one.config.name, "step": step, "global_step": len(expected) + 1} | clips)
    assert {entry["source"] for entry in expected} == {0, 1}

    def part(entry: dict[str, Any], rank: int) -> dict[str, Any]:
        return entry | {name: entry[name][2 * rank : 2 * rank + 2] for name in ("sample_index", "epoch")}

    out = tmp_path / "run"
    assert (
        run_ranks(file, 2, log, {4: (1, signal.SIGKILL)})[1] == -signal.SIGKILL
    )  # at the fifth step, after a checkpoint at 3
    for rank in range(2):
        assert lines(out / f"samples-{rank}.jsonl") == [part(entry, rank) for entry in expected[:4]]
    with (out / "samples-1.jsonl").open("a") as cut:
        cut.write('{"stage": "one", "st')
    assert run_ranks(file, 1, log) == [0]
    assert lines(out / "samples-0.jsonl") == [part(entry, 0) for entry in expected[:3]] + expected[3:]
    assert lines(out / "samples-1.jsonl") == [part(entry, 1) for entry in expected[:3]]


def test_ranks_that_read_the_same_clips_log_them_once_and_only_if_asked(tmp_path: Path) -> None:
    file = write_run(tmp_path, stages=[stage(tmp_path / "codes", 2)])
    tensor = ["--parallel.tensor_parallel_size", "2"]
    assert run_ranks(file, 2, [*tensor, "--log_samples", "true"]) == [0, 0]
    assert [file.name for file in (tmp_path / "run").glob("samples*")] == ["samples-0.jsonl"]
    assert [entry["step"] for entry in lines(tmp_path / "run" / "samples-0.jsonl")] == [1, 2]
    assert run_ranks(file, 1, ["--out", str(tmp_path / "silent")]) == [0]
    assert not list((tmp_path / "silent").glob("samples*"))
