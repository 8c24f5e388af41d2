"""A step that is not finite or a spike: its batch is left out, or the run rolls back; what comes after is the same however it is cut."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import PretrainConfig
from pretrain.events import FILE, read_events, write_event
from pretrain.faults import Fault, Faults, parse
from pretrain.resilience import ResilienceConfig
from pretrain.skips import Skips
from pretrain.spikes import Spikes
from pretrain.train import main_entry
from tests.pretrain.ranks import run_ranks
from tests.pretrain.tiny import metrics, stage, write_run
from tokenizer import settings
from tokenizer.errors import UserError

EXACT = ("stage", "step", "global_step", "loss", "bit_accuracy", "grad_norm", "lr")


def _file(folder: Path, name: str, steps: int = 10, every: int = 3, **resilience: Any) -> Path:
    return write_run(
        folder,
        out=str(folder / name),
        stages=[stage(folder / "codes", steps)],
        checkpoint_every=every,
        log_samples=True,
        resilience={"save_pause": 0.0} | resilience,
    )


def _run(file: Path) -> bool:
    return main_entry(settings.load(PretrainConfig, file))


def _exact(out: Path) -> list[tuple]:
    return [tuple(line[name] for name in EXACT) for line in metrics(out)]


def _bad(out: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(out) if event["event"] == "bad_step"]


def _samples(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples-0.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """The curve without a fault."""
    folder = tmp_path_factory.mktemp("sound")
    assert _run(_file(folder, "sound"))
    return _exact(folder / "sound")


@pytest.mark.parametrize(
    ("action", "fault", "left_out"),
    [("skip", "nan@5", (4, 4)), ("rollback", "nan@5", (3, 4)), ("rollback", "spike@8", (6, 7))],
)
def test_a_run_is_a_function_of_the_batches_left_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sound: list[tuple],
    action: str,
    fault: str,
    left_out: tuple[int, int],
) -> None:
    """The fault alone, the fault and a preemption, and a run that was told at its start what to leave out: one curve, to the last digit."""
    options = {"on_bad_step": action, "spike_factor": 500, "spike_window": 4}
    monkeypatch.setenv("VIDEOAR_FAULT", fault)
    assert _run(_file(tmp_path, "alone", **options))
    expected = _exact(tmp_path / "alone")
    assert [line[1] for line in expected] == list(range(1, 11)) and all(math.isfinite(line[3]) for line in expected)
    (bad,) = _bad(tmp_path / "alone")
    assert (bad["first"], bad["last"], bad["action"]) == (*left_out, action)
    assert ("not finite" if "nan" in fault else "times the usual spread") in bad["reason"]

    monkeypatch.setenv("VIDEOAR_FAULT", f"{fault},usr1@{int(fault[-1]) + 1}")
    cut = _file(tmp_path, "cut", every=3, **options)
    assert not _run(cut)  # stopped and saved; the second start leaves the same batches out
    assert _run(cut)
    assert _exact(tmp_path / "cut") == expected

    monkeypatch.delenv("VIDEOAR_FAULT")
    told = _file(tmp_path, "told", **options)
    (tmp_path / "told").mkdir()
    write_event(
        tmp_path / "told",
        "bad_step",
        bad["global_step"],
        **{k: bad[k] for k in ("stage", "first", "last", "action", "reason")},
    )
    assert _run(told)
    assert _exact(tmp_path / "told") == expected
    assert _samples(tmp_path / "told") == _samples(tmp_path / "alone") == _samples(tmp_path / "cut")

    first = left_out[0]
    assert sound[:first] == expected[:first] and sound[first] != expected[first]


def test_a_kill_after_a_bad_step_on_one_of_two_processes(tmp_path: Path) -> None:
    """Tensor parallel 2; one process alone computes a NaN, all leave the batch out; then one is killed before the next checkpoint."""
    words, options = ["--parallel.tensor_parallel_size", "2"], {"on_bad_step": "skip", "steps": 6, "every": 3}
    alone, cut = _file(tmp_path, "alone", **options), _file(tmp_path, "cut", **options)
    assert run_ranks(alone, 2, words, faults="nan@4:rank1") == [0, 0]
    other, killed = run_ranks(cut, 2, words, faults="nan@4:rank1,kill@6:rank1")
    assert killed == -9 and other != 0  # the other one may notice before it is ended
    assert run_ranks(cut, 2, words, faults="nan@4:rank1,kill@6:rank1") == [0, 0]
    assert _exact(tmp_path / "cut") == _exact(tmp_path / "alone")
    happened = [event["event"] for event in read_events(tmp_path / "cut") if event["event"] != "saved"]
    assert happened == ["start", "fault_injected", "bad_step", "fault_injected", "start", "finished"]


def test_bad_steps_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDEOAR_FAULT", "nan@2,nan@3")
    with pytest.raises(UserError, match=r"^step 3 of .* not finite: .*step-2, .* after 1 such steps"):
        _run(_file(tmp_path, "run", every=1, on_bad_step="rollback", max_bad_steps=1))
    assert len(_bad(tmp_path / "run")) == 1
    with pytest.raises(UserError, match="^step 2 of .* not finite: lower the learning rate .now"):
        _run(_file(tmp_path, "stops"))
    assert _bad(tmp_path / "stops") == []


def test_spikes() -> None:
    spikes = Spikes(factor=10, window=4)
    for value in (1.0, 1.2, 1.1):
        assert spikes.reason(100 * value, 0.5) is None  # nothing is judged yet
        spikes.add(value, 0.5 * value)
    assert spikes.reason(50.0, 0.5) is None
    spikes.add(1.3, 0.5)
    # median 1.15, median distance 0.1
    assert spikes.limit("loss") == pytest.approx(1.15 + 10 * 1.4826 * 0.1)
    assert "loss 3 is above 2.633" in (spikes.reason(3.0, 0.5) or "")
    assert "gradient norm 9" in (spikes.reason(1.0, 9.0) or "")
    assert spikes.reason(2.6, 0.5) is None
    assert "not finite" in (spikes.reason(math.nan, 0.5) or "") and "not finite" in (spikes.reason(1.0, math.inf) or "")
    other = Spikes(10, 4)
    other.load_state_dict(json.loads(json.dumps(spikes.state_dict())))
    assert other.limit("loss") == spikes.limit("loss")
    other.load_state_dict({})
    assert other.limit("loss") == math.inf
    assert Spikes(0, 4).reason(1e9, 1e9) is None


def test_what_is_left_out_is_known_from_position_and_events() -> None:
    entry = {"stage": 1, "first": 3, "last": 5, "global_step": 9, "action": "rollback", "reason": "?"}
    skips = Skips()
    skips.read([entry], [{"event": "start", "global_step": 0}, {"event": "bad_step", "time": 1.0, **entry}])
    assert skips.to_list() == [entry] and skips.count(1) == 1 and skips.count(0) == 0
    assert [batch for batch in range(9) if skips.covers(1, batch)] == [3, 4, 5] and not skips.covers(0, 3)


def test_faults_are_read_announced_and_happen_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert parse("nan@12, hang@5:rank1,usr1@3") == [
        Fault("nan", 12, None, "nan@12"),
        Fault("hang", 5, 1, "hang@5:rank1"),
        Fault("usr1", 3, 0, "usr1@3"),
    ]
    with pytest.raises(UserError, match="holds 'burn@3': write nan, "):
        parse("burn@3")
    monkeypatch.setenv("VIDEOAR_FAULT", "spike@2")
    faults = Faults(0, tmp_path, [])
    assert "WILL FAIL ON PURPOSE: spike@2" in capsys.readouterr().err
    assert [faults.loss_factor(step) for step in (1, 2, 2, 3)] == [1, 1000, 1, 1]
    assert Faults(0, tmp_path, read_events(tmp_path)).loss_factor(2) == 1
    monkeypatch.delenv("VIDEOAR_FAULT")
    Faults(0, tmp_path, [])
    assert capsys.readouterr().err == ""


def test_an_event_after_a_torn_line_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"time": 1, "ev')
    write_event(tmp_path, "stopped", 3)
    assert [event["event"] for event in read_events(tmp_path)] == ["stopped"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spike_window": 1}, "spike_window"),
        ({"save_tries": 0}, "save_tries"),
        ({"heartbeat_every": 0}, "heartbeat_every"),
        ({"max_bad_steps": -1}, "max_bad_steps"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ResilienceConfig(**changes)


def test_settings_that_do_not_go_together(tmp_path: Path) -> None:
    file = _file(tmp_path, "run")
    with pytest.raises(UserError, match="hang_timeout 500 is not above data_timeout 600"):
        settings.load(PretrainConfig, file, ["--resilience.hang_timeout", "500"])
    with pytest.raises(UserError, match="choose rollback"):
        settings.load(PretrainConfig, file, ["--resilience.on_bad_step", "skip", "--parallel.fp8", "delayed"])
