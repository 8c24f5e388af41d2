"""The page in a real headless browser: Debian's chromium, steered by playwright.

    VIDEOAR_SCREENSHOT=docs/serve.png VIDEOAR_MODEL=runs/demo/model python -m pytest tests/inference/test_server_page.py -k grows

writes the picture of the README.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import av
import pytest

from inference import VideoARPipeline
from tests.inference.serving_tools import Paced, picture, running
from tests.inference.test_pipeline import pixels, tiny_pipeline

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
GROWN = "#growing[data-frames='%d']"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture()
def page(browser):
    """A page of a new session; it may load nothing but the server, and no script may fail."""
    context = browser.new_context(viewport={"width": 1000, "height": 760}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(20_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: None if _is_own(request.url) else problems.append(request.url))
    yield page
    context.close()
    assert problems == []


def _is_own(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "data:", "blob:"))


def _until(fits: Callable[[], bool]) -> None:
    """The page's policy forbids the evaluation that playwright's own waiting needs."""
    end = time.monotonic() + 20
    while not fits():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_video_grows_and_is_downloaded(page, tmp_path):
    model = os.environ.get("VIDEOAR_MODEL")
    paced = Paced(VideoARPipeline.from_pretrained(model) if model else tiny_pipeline(num_frames=5))
    with running(paced) as server:
        page.goto(server.url)
        page.get_by_label("Prompt").fill("a red circle moving left slowly")
        page.get_by_label("Length in seconds").fill("2.1")
        page.get_by_label("Seed").fill("3")
        page.get_by_label("Guidance").select_option("a number")
        page.get_by_label("Strength").fill("2.5")
        page.get_by_role("button", name="Make the video").click()
        for chunk, frames in enumerate((1, 5, 9), start=1):
            paced.allow(1)
            page.locator(GROWN % frames).wait_for()
            assert paced.chunks == chunk and page.locator("#growing").is_visible()
            page.get_by_role("status").filter(has_text=f"frame {frames} of 17").wait_for()
        assert server.http.get("/v1/videos").json()["data"][0]["status"] == "in_progress"
        drawn = page.evaluate("document.querySelector('#growing').toDataURL().length")
        assert drawn > 500  # pixels, no empty canvas
        paced.allow()
        video = page.locator("#finished")
        video.wait_for()
        _until(lambda: page.evaluate("document.querySelector('#finished').readyState") >= 2)
        assert abs(page.evaluate("document.querySelector('#finished').duration") - 17 / 8) < 0.2
        job = server.http.get("/v1/videos").json()["data"][0]
        assert (job["status"], job["seed"], job["guidance"], job["num_frames"]) == ("completed", 3, 2.5, 17)
        with page.expect_download() as download:
            page.get_by_role("link", name="Download").click()
        download.value.save_as(tmp_path / "video.mp4")
        assert download.value.suggested_filename == f"{job['id']}.mp4"
        with av.open(str(tmp_path / "video.mp4")) as container:
            assert sum(1 for _ in container.decode(video=0)) == 17
        screenshot = Path(os.environ.get("VIDEOAR_SCREENSHOT", tmp_path / "page.png"))
        page.screenshot(path=screenshot)
        assert 5_000 < screenshot.stat().st_size < 300_000

        # the history outlives a reload, and deletes
        page.reload()
        page.get_by_role("button", name="Show: a red circle").wait_for()
        video.wait_for()
        page.get_by_role("button", name="Delete: a red circle").click()
        _until(lambda: page.locator("#history li").count() == 0)
        assert server.http.get("/v1/videos").json()["data"] == []


def test_errors_uploads_and_cancelling(page, tmp_path):
    (tmp_path / "start.png").write_bytes(picture(pixels(1)[0]))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "large.png").write_bytes(bytes(100_001))
    paced = Paced(tiny_pipeline(max_text_length=16))
    with running(paced, max_upload_bytes=100_000) as server:
        page.goto(server.url)
        make, alert = page.get_by_role("button", name="Make the video"), page.get_by_role("alert")
        make.click()
        alert.filter(has_text="The field 'prompt' does not fit").wait_for()
        page.get_by_label("Prompt").fill("<img src=x onerror=alert(1)>")
        for name, words in (("broken.png", "can't be decoded"), ("large.png", "too large")):
            page.get_by_label("Start from an image or a video").set_input_files(tmp_path / name)
            make.click()
            alert.filter(has_text=words).wait_for()
        page.get_by_label("Start from an image or a video").set_input_files(tmp_path / "start.png")
        make.click()
        paced.allow(1)
        page.locator(GROWN % 1).wait_for()
        assert alert.text_content() == ""
        job = server.http.get("/v1/videos").json()["data"][0]
        assert (job["input_reference"], job["prompt"]) == ("image", "<img src=x onerror=alert(1)>")
        page.get_by_role("button", name="Cancel").click()
        page.get_by_role("status").filter(has_text="cancelled").wait_for()
        assert server.http.get("/v1/videos").json()["data"] == []
        assert page.locator("#history li img").count() == 0  # what clients write is text
        paced.allow()
        server.service.store.stop()
        make.click()
        alert.filter(has_text="try again when it is back").wait_for()


def test_the_key_is_asked_for(page):
    with running(tiny_pipeline(), api_key="sesame") as server:
        page.goto(server.url)
        page.get_by_role("alert").filter(has_text="The key is missing or wrong").wait_for()
        page.get_by_label("Key of this server").fill("sesame")
        page.get_by_label("Prompt").fill("a red circle")
        page.get_by_label("Prompt").press("Tab")
        page.get_by_role("button", name="Make the video").click()
        page.locator("#finished").wait_for()
        assert "sesame" not in page.url
