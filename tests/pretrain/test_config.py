"""Settings: round trip, and mistakes that end in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pretrain.config import PretrainConfig
from pretrain.stages import make_plan
from pretrain.train import main_entry
from tests.pretrain.tiny import metrics, stage, write_codes, write_run, write_tokenizer
from tokenizer import settings
from tokenizer.errors import UserError

FOLDER = Path(__file__).parents[2] / "pretrain" / "configs"
CONFIGS = [file for file in sorted(FOLDER.rglob("*.yaml")) if "stages:" in file.read_text()]


def _edit(file: Path, **changes) -> Path:
    content = yaml.safe_load(file.read_text())
    content["stages"][0] |= changes
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_shipped_file_loads(file: Path, tmp_path: Path) -> None:
    config = settings.load(PretrainConfig, file)
    settings.save(config, tmp_path / "again.yaml")
    assert settings.load(PretrainConfig, tmp_path / "again.yaml") == config


def test_overrides_and_round_trip(tmp_path: Path) -> None:
    config = settings.load(PretrainConfig, write_run(tmp_path), ["--optimizer.betas", "[0.8, 0.9]", "--seed", "5"])
    assert config.optimizer.betas == (0.8, 0.9) and config.seed == 5 and config.stages[0].codes[1].num_frames == 1
    settings.save(config, tmp_path / "again.yaml")
    assert settings.load(PretrainConfig, tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"p_masc": 0.1}, "p_masc"),
        ({"p_mask": 1.5}, "p_mask is 1.5"),
        ({"micro_batch_size": 3}, "microbatches of 3"),
        ({"error_correction": {"p_max": 0.7}}, "p_max 0.7"),
        ({"codes": []}, "no codes"),
    ],
)
def test_mistakes_in_a_stage_are_named(tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        settings.load(PretrainConfig, _edit(write_run(tmp_path), **changes))


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="optimizer.warmup_steps"):
        settings.load(PretrainConfig, write_run(tmp_path, optimizer={"warmup_step": 3}))


def test_the_plan_follows_the_stages(tmp_path: Path) -> None:
    """Grids and frames grow over the stages; the network's weights keep their shapes."""
    fingerprint = write_tokenizer(tmp_path / "tokenizer")
    write_codes(tmp_path / "codes", fingerprint, side=2, frames=3, clips=6)
    write_codes(tmp_path / "large", fingerprint, side=4, frames=2, clips=6)
    images = stage(tmp_path / "codes", 3, codes=[{"dir": str(tmp_path / "codes"), "num_frames": 1}], name="I")
    clips = stage(tmp_path / "codes", 3, codes=[{"dir": str(tmp_path / "codes")}], name="II")
    large = stage(tmp_path / "large", 3, codes=[{"dir": str(tmp_path / "large")}], name="III")
    plan = make_plan(settings.load(PretrainConfig, write_run(tmp_path, stages=[images, clips, large])))
    seen = [(one.model.num_frames, one.model.schedule.grid) for one in plan.stages]
    assert seen == [(1, (2, 2)), (3, (2, 2)), (3, (4, 4))]
    assert len({one.model.parameter_count() for one in plan.stages}) == 1
    assert len({one.objective.randomness for one in plan.stages}) == 3

    classes = make_plan(settings.load(PretrainConfig, tmp_path / "run.yaml", ["--network.condition", "class"]))
    assert classes.model.num_classes == 4 and classes.export_info(0)["class_names"] == ["a", "b", "c", "d"]


def test_a_token_budget_makes_all_sources_steps_alike(tmp_path: Path) -> None:
    fingerprint = write_tokenizer(tmp_path / "tokenizer")
    write_codes(tmp_path / "codes", fingerprint, side=2, frames=3)  # 15 tokens a clip, 5 an image
    write_codes(tmp_path / "large", fingerprint, side=4, frames=2)  # 34
    sources = [{"dir": str(tmp_path / "codes")}, {"dir": str(tmp_path / "codes"), "num_frames": 1}]
    sources.append({"dir": str(tmp_path / "large")})
    changes = {"codes": sources, "global_batch_size": 8, "micro_batch_size": 2, "validation": str(tmp_path / "codes")}
    file = write_run(tmp_path, stages=[stage(tmp_path / "codes", 6, **changes, token_budget=136)])
    config = settings.load(PretrainConfig, file)
    (plan,) = make_plan(config).stages
    assert [source.batch_size for source in plan.sources] == [
        4 * 9,
        4 * 27,
        4 * 4,
    ]  # four microbatches of 135, 135, 136
    assert [source.batch_size for source in plan.validation] == [4 * 9]
    main_entry(config)
    clips = {line["clips"]: line["tokens"] for line in metrics(tmp_path / "run") if "clips" in line}
    assert {count: tokens // count for count, tokens in clips.items()} == {36: 15, 108: 5, 16: 34}
    with pytest.raises(UserError, match="token_budget 40 its steps have 136 to 180 tokens.*: choose 68"):
        make_plan(settings.load(PretrainConfig, _edit(file, **changes, token_budget=40)))
    with pytest.raises(UserError, match="token_budget of 0: choose at least 1"):
        settings.load(PretrainConfig, _edit(file, **changes, token_budget=0))


def test_clips_of_all_shapes_in_a_folder_are_seen_equally_often(tmp_path: Path) -> None:
    """24 clips of 15 tokens, 12 of 10 and 6 of 34: in buckets, with a budget and without one, on one network."""
    fingerprint = write_tokenizer(tmp_path / "tokenizer")
    write_codes(tmp_path / "codes", fingerprint, others=((2, 2, 12), (4, 2, 6)))
    changes = {"codes": [{"dir": str(tmp_path / "codes")}], "global_batch_size": 6, "micro_batch_size": 6}
    file = write_run(tmp_path, stages=[stage(tmp_path / "codes", 7, **changes)])
    config = settings.load(PretrainConfig, file)
    (plan,) = make_plan(config).stages
    shares = [(source.num_latent_frames, round(7 * source.proportion, 9)) for source in plan.sources]
    assert shares == [(3, 4), (2, 2), (2, 1)]  # an epoch is seven steps
    assert plan.model.schedule.grid == (4, 4) and plan.model.num_frames == 3
    main_entry(config)
    tokens = [line["tokens"] // line["clips"] for line in metrics(tmp_path / "run") if "clips" in line]
    assert {count: tokens.count(count) for count in tokens} == {15: 4, 10: 2, 34: 1}
    stream = plan.stream(config, 0, 1)
    drawn = [index for _ in range(7) for index in next(stream).sample_index.tolist()]
    assert sorted(drawn) == list(range(42))  # every clip once

    (plan,) = make_plan(settings.load(PretrainConfig, _edit(file, **changes, token_budget=150))).stages
    assert [source.batch_size for source in plan.sources] == [10, 15, 4]
    seen = [source.proportion * source.batch_size for source in plan.sources]
    assert [round(one / seen[2], 9) for one in seen] == [4, 2, 1]  # by clips
    one = [{"dir": str(tmp_path / "codes"), "num_frames": 3}]
    (plan,) = make_plan(
        settings.load(PretrainConfig, _edit(file, codes=one, validation=str(tmp_path / "codes")))
    ).stages
    assert [(source.bucket, source.proportion) for source in plan.sources] == [(0, 1)]  # the others have two frames
    assert [source.bucket for source in plan.validation] == [0]
    with pytest.raises(UserError, match="holds clips of 3 latent frames, 4 were asked for"):
        make_plan(settings.load(PretrainConfig, _edit(file, codes=[one[0] | {"num_frames": 4}])))


def test_other_codes_are_refused(tmp_path: Path) -> None:
    file = write_run(tmp_path)
    write_codes(tmp_path / "other", "0" * 16)
    with pytest.raises(UserError, match="made by the tokenizer 0000"):
        make_plan(settings.load(PretrainConfig, _edit(file, codes=[{"dir": str(tmp_path / "other")}])))
    with pytest.raises(UserError, match="no finished code shards"):
        make_plan(settings.load(PretrainConfig, _edit(file, codes=[{"dir": str(tmp_path / "nothing")}])))
    with pytest.raises(UserError, match="holds no tokenizer"):
        make_plan(settings.load(PretrainConfig, write_run(tmp_path), ["--tokenizer", str(tmp_path)]))
    with pytest.raises(UserError, match="no classes"):
        write_codes(
            tmp_path / "unclassed",
            make_plan(settings.load(PretrainConfig, write_run(tmp_path))).fingerprint,
            classes=[],
        )
        unclassed = stage(tmp_path / "unclassed", 2)
        run = write_run(tmp_path, stages=[unclassed])
        make_plan(settings.load(PretrainConfig, run, ["--network.condition", "class"]))


def test_relative_paths_start_at_the_root(tmp_path: Path) -> None:
    codes = [{"dir": "codes", "cache": "cache"}, {"dir": "s3://bucket/codes"}, {"dir": "/absolute"}]
    file = write_run(tmp_path, out="run", tokenizer="tokenizer", root=str(tmp_path))
    config = settings.load(PretrainConfig, _edit(file, codes=codes, validation="codes")).rooted()
    assert (config.out, config.tokenizer) == (str(tmp_path / "run"), str(tmp_path / "tokenizer"))
    assert [source.dir for source in config.stages[0].codes] == [
        str(tmp_path / "codes"),
        "s3://bucket/codes",
        "/absolute",
    ]
    assert config.stages[0].codes[0].cache == str(tmp_path / "cache")
    assert config.stages[0].validation == str(tmp_path / "codes")
    assert config.rooted() == config
