"""The report of a run that real, small parts were made for: what is on the page, what plays, and what metrics.json says."""

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser

import av
import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines import moving_shapes as ms
from evaluation.media import data_video, enlarge, first_of_each_caption, frame_border, read_video
from evaluation.plots import phases, roman, running_mean, series, stages
from evaluation.reconstruction import evaluate_reconstruction
from evaluation.report import build_metrics, write_report
from evaluation.sheet import GAP, SIDE, TEXT_WIDTH, write_sheet
from evaluation.videos import score_videos
from evaluation.wilson import wilson_interval
from tests.evaluation.tiny import write_tokenizer
from tokenizer import UserError
from tokenizer.video_file import write_video

SIZE, FRAMES, CLIPS = 64, 9, 6
PROMPTS = ["a red circle moving right slowly", "a blue square moving left quickly", "a cyan triangle moving up quickly"]
DRAWN = [*PROMPTS[:2], "a cyan circle moving up quickly"]  # the third sample shows the wrong shape
VOID = {"meta", "img", "br", "path", "use", "rect"}
STEPS = {
    "corpus": {"seconds": 12.0, "peak_gb": 0.5, "attempts": 1, "done": True, "fingerprint": "a"},
    "tokenizer": {"seconds": 1500.0, "peak_gb": 3.25, "attempts": 2, "done": True, "fingerprint": "b"},
    "report": {"seconds": 348.0, "peak_gb": 1.0, "attempts": 1, "done": False, "fingerprint": "c"},
}


def draw(caption, seed):
    return ms.render(ms.make_spec(ms.parse_caption(caption), (seed,), SIZE, FRAMES), SIZE, FRAMES)[0]


def write_lines(file, records):
    file.parent.mkdir(parents=True, exist_ok=True)
    # a run that is still going on has an unfinished last line
    file.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 9')


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("report") / "tiny"
    ms.write_corpus(root / "corpus", clips=1, seed=3, size=SIZE, frames=FRAMES, validation=CLIPS)
    write_tokenizer(root / "tokenizer")
    losses = [{"step": s, "loss": 1 / (s + 1), "reconstruction": 0.5, "psnr": 10.0 + s} for s in range(8)]
    write_lines(root / "tokenizer" / "metrics.jsonl", losses)
    (root / "tokenizer" / "train.yaml").write_text(
        "phases: [{steps: 8, batches: [{num_frames: 9, size: 64, batch_size: 1}]}]"
    )
    records = []
    for g in range(1, 13):
        stage, step = ("low <res>", g) if g <= 5 else ("high", g - 5)
        accuracy = {f"bit_accuracy/scale_{k}": 0.5 + g / 100 for k in range(1 if g <= 5 else 2)}
        records.append({"stage": stage, "step": step, "global_step": g, "loss": 0.7, "bit_accuracy": 0.5, **accuracy})
    records.append(
        {"stage": "high", "step": 7, "global_step": 12, "validation/loss": 0.6, "validation/bit_accuracy": 0.6}
    )
    write_lines(root / "pretrain" / "metrics.jsonl", records)
    variants = [f"{SIZE}x{SIZE}x{FRAMES}"]
    evaluate_reconstruction(root / "tokenizer", root / "corpus/validation.csv", root / "reconstructions", variants)
    samples = root / "samples" / "prompts"
    samples.mkdir(parents=True)
    with open(samples / "prompts.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "caption", "seed"])
        for number, (prompt, drawn) in enumerate(zip(PROMPTS, DRAWN)):
            write_video(draw(drawn, number), samples / f"{number}.mp4")
            writer.writerow([f"{number}.mp4", prompt, number])
    for name in ("image_to_video", "continuation"):
        write_video(draw(PROMPTS[0], 7), root / "samples" / f"{name}.mp4")
    (root / "scores").mkdir()
    score_videos(root / "corpus/validation.csv", root / "scores/ruler.json")
    score_videos(root / "reconstructions/reconstructed.csv", root / "scores/reconstructed.json")
    score_videos(samples / "prompts.csv", root / "scores/generated.json")
    (root / "steps.json").write_text(json.dumps(STEPS))
    return root


class Page(HTMLParser):
    """Collects the elements, and finds those that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(run):
    file = write_report(run)
    assert file == run / "report.html"
    return file.read_text()


def decode(uri):
    kind, data = uri.split(",", 1)
    assert kind == "data:video/mp4;base64"
    with av.open(io.BytesIO(base64.b64decode(data))) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == pytest.approx(8, rel=0.01)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])


def test_metrics_hold_what_the_run_measured(run, page):
    metrics = json.loads((run / "metrics.json").read_text())
    reconstruction = json.loads((run / "reconstructions/reconstruction.json").read_text())
    for key in ("psnr", "psnr_foreground"):
        assert metrics["tokenizer"][key] == reconstruction[key]
    generated = metrics["shapes"]["generated"]
    assert (generated["colour"], generated["shape"], generated["direction"], generated["clips"]) == (1, 2 / 3, 1, 3)
    assert generated["shape_interval"] == list(wilson_interval(2, 3))
    assert metrics["shapes"]["ruler"]["shape"] == 1 and metrics["shapes"]["ruler"]["clips"] == CLIPS
    assert metrics["steps"]["tokenizer"] == {"seconds": 1500.0, "peak_gb": 3.25, "attempts": 2, "done": True}
    assert metrics["total_minutes"] == pytest.approx(31) and metrics["peak_gb"] == 3.25
    met = {target["key"]: target["met"] for target in metrics["targets"]}
    assert met["shapes.generated.shape"] is False  # 67% of 70
    assert met["total_minutes"] is False and met["peak_gb"] is True and met["shapes.ruler.colour"] is True
    assert met["tokenizer.psnr"] is False  # it was not trained
    assert metrics["environment"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert metrics["environment"]["cores"] >= 1 and metrics["environment"]["cpu"]


def test_the_page_is_whole_and_needs_nothing_else(run, page):
    parsed = Page(page)
    assert parsed.open == []
    for _, attributes in parsed.elements:
        for name in ("src", "href", "xlink:href", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert set(re.findall(r"https?://[^\"'\s<]*", page)) <= {
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/2000/svg",
    }
    anchors = {attributes["href"][1:] for attributes in parsed.all("a")}
    assert anchors == {attributes["id"] for attributes in parsed.all("section")} and len(anchors) == 8
    assert "$" not in re.sub(r"base64,[^\"]*", "", page)
    assert not [file for file in run.iterdir() if file.name.startswith(".")]
    assert "not run" not in page
    assert "low &lt;res&gt;" in page and "<res>" not in page


def test_every_clip_plays(run, page):
    videos = Page(page).all("video")
    assert len(videos) == len(PROMPTS) + 2 + CLIPS
    for attributes in videos:
        assert {"autoplay", "loop", "muted", "playsinline", "controls"} <= set(attributes)
        frames = decode(attributes["src"])
        assert frames.shape == (FRAMES, int(attributes["height"]), int(attributes["width"]), 3)
    generated = decode(videos[1]["src"])
    assert generated.shape[1:3] == (3 * SIZE, 3 * SIZE)
    original = read_video(run / "samples/prompts/1.mp4")[0]
    assert np.abs(generated[:, 1::3, 1::3].astype(int) - original).mean() < 3
    pairs = [attributes for attributes in videos if int(attributes["width"]) == 2 * 3 * SIZE + 4]
    assert len(pairs) == CLIPS
    left = decode(pairs[0]["src"])[:, 1::3, 1 : 3 * SIZE : 3]
    assert np.abs(left.astype(int) - read_video(run / "corpus/videos/validation/00000.mp4")[0]).mean() < 3


def test_given_frames_have_a_border_of_their_own(run, page):
    labels = {attributes["aria-label"]: attributes["src"] for attributes in Page(page).all("video")}

    def amber(frames):  # right of the middle is the sample; its lowest rows are the border
        colour = frames[:, -4:-2, frames.shape[2] // 2 + 20 : -20].mean((1, 2))
        return (colour[:, 0] > 200) & (colour[:, 2] < 90)

    assert amber(decode(labels["Image to video"])).tolist() == [True] + [False] * 8
    assert amber(decode(labels["Continuation"])).tolist() == [True] * 5 + [False] * 4  # half of 9, 1 + 4n
    assert "5 frames given, 4 made" in page


def test_the_ruler_s_reading_stands_at_each_clip(page):
    figure = next(part for part in page.split("<figure") if PROMPTS[2] in part)
    chips = re.findall(r'class="chip (yes|no)" title="(\w+)">[✓✗] ([\w-]+)<', figure)
    assert chips == [
        ("yes", "colour", "cyan"), ("no", "shape", "circle"), ("yes", "direction", "up"), ("yes", "speed", "quickly"),
    ]  # fmt: skip


def test_plots_take_the_colours_of_the_page(page):
    plots = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(plots) == 5  # loss and PSNR; loss, bits, bits by scale
    for plot in plots:
        assert "currentColor" in plot and "#010203" not in plot and "<style" not in plot and "<image" not in plot
    ids = [identity for plot in plots for identity in set(re.findall(r'id="([^"]*)"', plot))]
    assert len(ids) == len(set(ids))
    assert ">scale 1<" in plots[4] and ">II<" in plots[4] and ">9 frames<" in plots[0]


def test_missing_parts_are_called_not_run(tmp_path):
    (tmp_path / "steps.json").write_text("{}")
    text = write_report(tmp_path).read_text()
    assert Page(text).open == []
    for sentence in (
        "generated from a prompt",
        "not measured",
        "not scored",
        "not trained",
        "No clip was made",
        "timed",
    ):
        assert sentence in text
    metrics = build_metrics(tmp_path)
    assert metrics["tokenizer"]["psnr"] is None and metrics["shapes"]["generated"]["clips"] is None
    assert metrics["total_minutes"] is None and {target["met"] for target in metrics["targets"]} == {None}


def test_a_broken_sample_is_named_and_the_rest_is_shown(tmp_path):
    samples = tmp_path / "samples/prompts"
    samples.mkdir(parents=True)
    write_video(draw(PROMPTS[0], 0), samples / "good.mp4")
    (samples / "bad.mp4").write_bytes(b"no video")
    (samples / "prompts.csv").write_text(f"path,caption\nbad.mp4,{PROMPTS[1]}\ngood.mp4,{PROMPTS[0]}\n")
    text = write_report(tmp_path).read_text()
    assert "bad.mp4 can&#x27;t be read" in text and len(Page(text).all("video")) == 1


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no run"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="is no run"):
        build_metrics(tmp_path / "nowhere")
    (tmp_path / "steps.json").write_text("{")
    with pytest.raises(UserError, match="steps.json"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists() and not (tmp_path / "metrics.json").exists()


def test_curves_are_read_as_written():
    lines = [
        {"stage": s, "step": i, "global_step": g, "y": g}
        for s, i, g in (("a", 1, 1), ("a", 2, 2), ("b", 1, 3), ("b", 4, 6))
    ]
    assert [(s.name, s.first, s.last) for s in stages(lines)] == [("a", 0, 2), ("b", 2, 6)]
    x, y = series([*lines, {"global_step": 2, "y": 20}, {"global_step": 9}], "global_step", "y")
    assert x.tolist() == [1, 2, 3, 6] and y.tolist() == [1, 20, 3, 6]
    assert running_mean(np.array([0.0, 3, 6, 9, 12]), 3).tolist() == [1.5, 3, 6, 9, 10.5]
    assert running_mean(np.array([1.0, 2.0]), 5).shape == (2,)
    assert [roman(n) for n in (1, 3, 4, 9, 14)] == ["I", "III", "IV", "IX", "XIV"]
    recipe = {
        "phases": [
            {"steps": 3, "batches": [{"num_frames": 1}]},
            {"steps": 4, "batches": [{"num_frames": 5}, {"num_frames": 9}]},
        ]
    }
    assert [(s.name, s.first, s.last) for s in phases(recipe)] == [("1 frame", 0, 3), ("9 frames", 3, 7)]


def test_clips_are_picked_without_looking():
    rows = [{"caption": c, "path": str(i)} for i, c in enumerate("aaabbc")]
    assert [row["path"] for row in first_of_each_caption(rows, 5)] == ["0", "3", "5", "1", "4"]


def test_frames_are_enlarged_framed_and_embedded():
    clip = np.arange(2 * 3 * 5 * 3, dtype=np.uint8).reshape(2, 3, 5, 3)
    assert enlarge(clip, 7).shape == (2, 6, 10, 3) and (enlarge(clip, 7)[:, ::2, ::2] == clip).all()
    assert enlarge(clip, 2).shape == clip.shape
    framed = frame_border(clip, (9, 8, 7), 2)
    assert framed.shape == (2, 7, 9, 3) and (framed[:, 2:-2, 2:-2] == clip).all() and (framed[:, 0] == (9, 8, 7)).all()
    odd = np.zeros((5, 33, 47, 3), np.uint8)
    assert decode(data_video(odd, 8)).shape == (5, 32, 46, 3)


def test_the_sheet_shows_the_clips(run, tmp_path):
    out = write_sheet(run / "samples/prompts/prompts.csv", tmp_path / "docs/sheet.png", rows=2, frames=3)
    pixels = np.asarray(Image.open(out))
    assert pixels.shape == (2 * (SIDE + GAP) + GAP, TEXT_WIDTH + 3 * (SIDE + GAP), 3)
    last = read_video(run / "samples/prompts/2.mp4")[0][-1]  # prompts 0 and 2 of 3, frames 0, 4 and 8
    cell = pixels[SIDE + 2 * GAP :, TEXT_WIDTH + 2 * (SIDE + GAP) :][:SIDE, :SIDE]
    assert (cell[::2, ::2] == last).all()
    assert (pixels[:, :TEXT_WIDTH] < 128).any()  # the prompts
    with pytest.raises(UserError, match="0 rows"):
        write_sheet(run / "samples/prompts/prompts.csv", out, rows=0)
    assert [file.name for file in out.parent.iterdir()] == ["sheet.png"]
