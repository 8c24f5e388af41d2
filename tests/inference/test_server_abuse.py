"""Bad input, files of all kinds, crowds, and clients that vanish: an answer to that client, and the server lives on."""

from __future__ import annotations

import io
import json
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import httpx
import numpy as np
import pytest
from PIL import Image

from inference.serving import ServeConfig, app
from inference.serving.errors import ApiError
from inference.serving.uploads import DECODERS, read_reference
from tests.inference.serving_tools import Paced, Running, film, picture, running
from tests.inference.test_pipeline import pixels, tiny_pipeline


@pytest.fixture(scope="module")
def server():
    limits = {
        "max_pixels": 1_000_000,
        "max_upload_bytes": 200_000,
        "max_upload_pixels": 1_000_000,
        "max_upload_frames": 100,
    }
    with running(tiny_pipeline(), max_queue=64, max_prompt_characters=50, max_seconds=5, **limits) as server:
        yield server


@pytest.fixture(autouse=True)
def lives(request):
    """After every test the server makes a video."""
    yield
    if "server" in request.fixturenames:
        server: Running = request.getfixturevalue("server")
        assert server.wait(server.make()["id"])["status"] == "completed"


def refused(answer: httpx.Response, status: int, code: str) -> str:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), answer.text
    assert set(error) == {"message", "type", "code"} and error["message"].endswith(".")
    return error["message"]


BODIES = {
    "no prompt": ({}, "missing_field", "give it"),
    "empty": ({"prompt": ""}, "invalid_value", "at least 1 character"),
    "blank": ({"prompt": " \n\t"}, "empty_prompt", "say what"),
    "long": ({"prompt": "a" * 51}, "prompt_too_long", "at most 50"),
    "unknown field": ({"prompt": "a", "sed": 1}, "unknown_field", "'sed'"),
    "odd field": ({"prompt": "a", "my seed; é": 1}, "unknown_field", "'my seed; é'"),
    "frames": ({"prompt": "a", "num_frames": 12}, "invalid_value", "9 or 13"),
    "too many frames": ({"prompt": "a", "num_frames": 45}, "too_long", "at most 41, 5.125 seconds"),
    "huge seconds": ({"prompt": "a", "seconds": 1e300}, "too_long", "at most 41"),
    "two lengths": ({"prompt": "a", "num_frames": 9, "seconds": 1}, "invalid_value", "one of them"),
    "no size": ({"prompt": "a", "size": "big"}, "invalid_value", "WIDTHxHEIGHT"),
    "odd size": ({"prompt": "a", "size": "40x32"}, "invalid_value", "multiple of 16"),
    "no area": ({"prompt": "a", "size": "0x32"}, "invalid_value", "multiple of 16"),
    "large": ({"prompt": "a", "size": "2048x1024"}, "too_large", "1000000 pixels"),
    "long side": ({"prompt": "a", "size": "16x8192"}, "too_large", "4096"),
    "negative seed": ({"prompt": "a", "seed": -1}, "invalid_value", "'seed'"),
    "huge seed": ({"prompt": "a", "seed": 10**30}, "invalid_value", "'seed'"),
    "text as seed": ({"prompt": "a", "seed": "1"}, "invalid_value", "'seed'"),
    "truth as seed": ({"prompt": "a", "seed": True}, "invalid_value", "'seed'"),
    "guidance": ({"prompt": "a", "guidance": "strong"}, "invalid_value", "'guidance'"),
    "temperature": ({"prompt": "a", "temperature": -0.1}, "invalid_value", "'temperature'"),
    "model": ({"prompt": "a", "model": "../../etc/passwd"}, "unknown_model", "only the model 'tiny'"),
    "number as prompt": ({"prompt": 5}, "invalid_value", "'prompt'"),
    "list": ([1, 2], "invalid_value", "no JSON object"),
}


@pytest.mark.parametrize("name", BODIES)
def test_fields_that_do_not_fit(server, name):
    body, code, words = BODIES[name]
    assert words in refused(server.http.post("/v1/videos", json=body), 422, code)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b'{"prompt": NaN}', b'{"prompt": "\\ud800"}', b"[" * 10_000, b'{"prompt": "a'], ids=repr
)  # fmt: skip
def test_what_is_no_json(server, content):
    answer = server.http.post("/v1/videos", content=content, headers={"Content-Type": "application/json"})
    refused(answer, 422, "invalid_json")


def test_other_bodies(server):
    refused(
        server.http.post("/v1/videos", content=b"prompt=a", headers={"Content-Type": "text/plain"}),
        415,
        "unsupported_type",
    )
    refused(server.http.post("/v1/videos", data={"prompt": "a"}), 415, "unsupported_type")
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    for content in (b"", b"nonsense", b"--x\r\nnonsense\r\n\r\n", b"--x--"):
        answer = server.http.post("/v1/videos", content=content, headers=form)
        assert answer.status_code in (400, 422) and answer.json()["error"]["message"].endswith(".")
    answer = server.http.post("/v1/videos", content=b"--x", headers={"Content-Type": "multipart/form-data"})
    refused(answer, 400, "bad_request")
    charset = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\xff\xfe\r\n--x--\r\n'
    answer = server.http.post(
        "/v1/videos", content=charset, headers={"Content-Type": "multipart/form-data; boundary=x; charset=nix"}
    )
    assert answer.status_code == 200  # unknown encodings are read as Latin-1
    twice = [("prompt", (None, "a")), ("prompt", (None, "b"))]
    assert "twice" in refused(server.http.post("/v1/videos", files=twice), 422, "invalid_value")
    other = [("prompt", (None, "a")), ("weights", ("w.pkl", b"cos\nsystem"))]
    assert "only input_reference" in refused(server.http.post("/v1/videos", files=other), 422, "invalid_value")
    text = [("prompt", (None, "a")), ("input_reference", (None, "/etc/passwd"))]
    assert "no file" in refused(server.http.post("/v1/videos", files=text), 422, "bad_input_reference")
    long = [("prompt", (None, "a" * 100_000))]
    refused(server.http.post("/v1/videos", files=long), 400, "bad_request")
    many = [("input_reference", (f"{i}.png", b"x")) for i in range(3)]
    refused(server.http.post("/v1/videos", files=many), 400, "bad_request")
    unchosen = [("prompt", (None, "a")), ("num_frames", (None, "9")), ("input_reference", ("", b""))]
    job = server.http.post("/v1/videos", files=unchosen).json()  # as browsers send a field without a file
    assert server.wait(job["id"])["input_reference"] is None


@pytest.mark.parametrize(
    "name", ["../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/x", "video_\x00", "a/b", "~root",
    "video_" + "a" * 5000, "\u202e"],
)  # fmt: skip
def test_ids_are_no_paths(server, name):
    for path in (f"/v1/videos/{name}", f"/v1/videos/{name}/content", f"/v1/videos/{name}/frames"):
        raw = path.replace("\x00", "%00").replace("\u202e", "%E2%80%AE")
        answer = server.http.get(httpx.URL(server.url, raw_path=raw.encode()))
        assert answer.status_code == 404 and "root:" not in answer.text
        assert answer.json()["error"]["code"] in ("unknown_video", "not_found")
    for path in ("/page.css/../../config.py", "/..%2fconfig.py", "//etc/passwd", "/page/index.html"):
        assert server.http.get(httpx.URL(server.url, raw_path=path.encode())).status_code == 404


@pytest.mark.parametrize(
    "name", ["../../evil.png", "/etc/cron.d/evil", "a\x00b.png", "x" * 4000, "\u202egnp.exe", "concat:/etc/passwd"]
)
def test_names_of_files_are_never_used(server, name, tmp_path):
    before = set(Path(server.service.folder).rglob("*"))
    answer = server.upload(picture(pixels(1)[0]), name=name)
    assert answer.status_code == 200, answer.text
    assert server.wait(answer.json()["id"])["status"] == "completed"
    new = {file.name for file in set(Path(server.service.folder).rglob("*")) - before}
    assert new <= {
        "video.mp4",
        "given.npy",
        *(f"{i:06d}.jpg" for i in range(9)),
        *(f.name for f in server.service.folder.iterdir()),
    }


def modes() -> dict[str, bytes]:
    grey = np.tile(np.linspace(0, 65535, 64, dtype=np.uint16), (64, 1))
    colour = Image.fromarray(pixels(1, size=(64, 64))[0])
    turned = Image.new("RGB", (64, 32), "blue")
    exif = turned.getexif()
    exif[0x0112] = 6
    transparent = Image.new("P", (64, 64))
    return {
        "RGBA": picture(colour.convert("RGBA")),
        "P": picture(colour.convert("P")),
        "P with a transparent colour": picture(transparent, transparency=0),
        "1": picture(colour.convert("1")),
        "L": picture(colour.convert("L")),
        "LA": picture(colour.convert("LA")),
        "CMYK": picture(colour.convert("CMYK"), "JPEG"),
        "16 bits": picture(Image.fromarray(grey)),
        "turned": picture(turned, "JPEG", exif=exif),
        "one pixel": picture(Image.new("RGB", (1, 1))),
        "a thread": picture(Image.new("RGB", (3000, 1))),
        "webp": picture(colour, "WEBP"),
        "gif": picture(colour, "GIF", save_all=True, append_images=[colour.convert("L")]),
        "bmp": picture(colour, "BMP"),
    }


@pytest.mark.parametrize("name", modes())
def test_images_of_any_mode(server, name):
    answer = server.upload(modes()[name])
    assert answer.status_code == 200, answer.text
    job = server.wait(answer.json()["id"])
    assert (job["status"], job["input_reference"]) == ("completed", "image")


def read(content: bytes, folder: Path, **limits) -> tuple[str, np.ndarray]:
    return read_reference(io.BytesIO(content), folder, (32, 32), 8.0, 9, ServeConfig(**limits))


def test_what_becomes_of_odd_modes(tmp_path):
    made = modes()
    kind, grey = read(made["16 bits"], tmp_path)
    assert kind == "image" and grey.shape == (1, 32, 32, 3)
    assert grey[0, 0, 0, 0] < 8 and grey[0, 0, -1, 0] > 247  # the whole range, not cut at 255
    assert np.abs(np.diff(grey[0, 0, :, 0].astype(int)) - 8).max() <= 1
    assert (read(made["P with a transparent colour"], tmp_path)[1] == 255).all()
    half = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    assert (read(picture(half), tmp_path)[1] == 255).all()
    corner = Image.new("RGB", (64, 64), "black")
    corner.paste((255, 255, 255), (0, 0, 32, 32))  # top left
    exif = corner.getexif()
    exif[0x0112] = 6  # to be turned clockwise: then it is top right
    upright = read(picture(corner, "JPEG", exif=exif, quality=100), tmp_path)[1][0].mean(axis=-1)
    assert upright[4, 28] > 240 and upright[4, 4] < 15 and upright[28, 28] < 15
    assert list(tmp_path.iterdir()) == []


def bomb(side: int) -> bytes:
    """A PNG of side x side black pixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeeze = zlib.compressobj(9)
    rows = b"".join(squeeze.compress(bytes(side // 8 + 1)) for _ in range(side)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_broken_and_huge_files(server, tmp_path):
    image, video = picture(pixels(1, size=(64, 64))[0]), film(tmp_path, frames=20)
    broken = {
        "empty": b"",
        "cut image": image[: len(image) // 2],
        "bit rot": image[:60] + b"\x00" * 20 + image[80:],
        "text": b"just some text " * 100,
        "pickle": b"cos\nsystem\n(S'touch /tmp/x'\ntR.",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n",
        "concatenation": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "cut video": video[: len(video) // 2],
        "no index": video[:-200],
        "sound": sound(tmp_path),
    }
    for name, content in broken.items():
        answer = server.upload(content, name="x.png")
        assert "can't be decoded" in refused(answer, 422, "bad_input_reference") or name == "sound", name
        assert str(server.service.folder) not in answer.text
    for side in (1008, 20_000):
        assert "1000000 pixels" in refused(server.upload(bomb(side)), 413, "upload_too_large")
    large = film(tmp_path, frames=2, size=1024)
    assert "1000000 pixels" in refused(server.upload(large), 413, "upload_too_large")
    long = film(tmp_path, frames=101, size=16)
    assert "at most 100, 12.5 seconds" in refused(server.upload(long), 413, "upload_too_long")
    assert server.wait(server.upload(film(tmp_path, frames=100, size=16)).json()["id"])["status"] == "completed"
    assert not list(server.service.folder.glob("*/upload"))


def sound(folder: Path) -> bytes:
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return (folder / "sound.mp4").read_bytes()


def test_the_pixels_of_all_frames_are_limited(tmp_path):
    """A black video of 47 million pixels a frame takes little of the wire and minutes of a processor."""
    content = film(tmp_path, frames=10)  # 64x64
    assert read(content, tmp_path, max_upload_video_pixels=10 * 64 * 64)[1].shape[0] == 9
    with pytest.raises(ApiError, match="at most 40959, smaller or fewer frames") as problem:
        read(content, tmp_path, max_upload_video_pixels=10 * 64 * 64 - 1)
    assert problem.value.status == 413


def test_downloads_do_not_wait_for_uploads(monkeypatch, tmp_path):
    """While as many uploads are decoded as may, finished videos are sent, also in other kinds of files."""
    entered, leave = threading.Semaphore(0), threading.Event()

    def held(*arguments):
        entered.release()
        assert leave.wait(60)
        return read_reference(*arguments)

    with running(tiny_pipeline()) as server, ThreadPoolExecutor(DECODERS) as crowd:
        done = server.wait(server.make()["id"])
        monkeypatch.setattr(app, "read_reference", held)
        try:
            uploads = [crowd.submit(server.upload, picture(pixels(1)[0])) for _ in range(DECODERS)]
            for _ in uploads:
                assert entered.acquire(timeout=30)
            for variant in ("mp4", "gif", "gif"):
                answer = server.http.get(f"/v1/videos/{done['id']}/content", params={"variant": variant}, timeout=20)
                assert answer.status_code == 200
            assert not any(upload.done() for upload in uploads)
        finally:
            leave.set()
        assert [server.wait(upload.result().json()["id"])["status"] for upload in uploads] == ["completed"] * DECODERS


def test_a_gap_in_a_videos_time_counts(tmp_path):
    """Two frames a month apart would be sampled 20 million times."""
    with av.open(str(tmp_path / "gap.mkv"), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuvj420p"
        for index in range(2):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24").reformat(
                format="yuvj420p"
            )
            frame.pts = index * 25 * 3600 * 24 * 30
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ApiError, match="too many frames"):
        read((tmp_path / "gap.mkv").read_bytes(), tmp_path)


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_short_videos_give_what_they_have(server, frames, tmp_path):
    job = server.wait(server.upload(film(tmp_path, frames=frames)).json()["id"])
    assert (job["status"], job["input_reference"]) == ("completed", "video")


def test_uploads_over_the_limit_are_stopped_while_they_are_read(server):
    assert "at most" in refused(server.upload(bytes(400_000)), 413, "body_too_large")  # by its Content-Length
    sent = 0

    def endless():
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="input_reference"; filename="a"\r\n\r\n'
        while sent < 10**9:
            sent += 65536
            yield bytes(65536)

    answer = server.http.post(
        "/v1/videos", content=endless(), headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    refused(answer, 413, "body_too_large")
    assert sent < 50_000_000  # what the sockets and the polite end take
    chunked = server.http.post(
        "/v1/videos", content=(b" " * 65536 for _ in range(10)), headers={"Content-Type": "application/json"}
    )
    refused(chunked, 413, "body_too_large")


@pytest.mark.parametrize("order", [1, -1])
def test_a_body_has_one_type(server, order):
    """Of two the guard once took the last, which has the larger limit, and the parser the first: JSON of any size was parsed."""
    body = b'{"prompt": "' + b"a" * 150_000
    headers = [("Content-Type", kind) for kind in ("application/json", "multipart/form-data; boundary=x")][::order]
    refused(server.http.post("/v1/videos", content=body, headers=headers), 400, "repeated_header")


def test_a_slow_client_is_told_to_hurry():
    with running(tiny_pipeline(), upload_seconds=0.3, max_queue=1) as server:
        with socket.create_connection(_address(server), timeout=30) as client:
            client.sendall(_HEAD + b'application/json\r\n\r\n{"prompt": ')  # and no more
            answer = b""
            while b"too_slow" not in answer:
                assert (part := client.recv(65536)), answer
                answer += part
        assert answer.startswith(b"HTTP/1.1 408 ")
        with server.service.store.place():  # the only one, which it held, is free
            pass
        assert server.http.get("/health").json()["status"] == "ok"


def test_pages_of_other_sites_may_not_use_it(server):
    headers = {"Sec-Fetch-Site": "cross-site"}
    refused(server.http.post("/v1/videos", json={"prompt": "a"}, headers=headers), 403, "cross_site")
    assert server.http.get("/v1/videos", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200
    page = server.http.get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"] and "http" not in page.text.replace(
        "http-", ""
    )


def test_two_hundred_at_once():
    """Each is accepted or told to come again; all accepted ones are made, also those that bring an image."""
    image, paced = picture(pixels(1)[0]), Paced(tiny_pipeline(num_frames=1))
    with running(paced, max_queue=20) as server:
        limits = httpx.Limits(max_connections=200)
        with httpx.Client(base_url=server.url, limits=limits, timeout=60) as http:

            def ask(index: int) -> httpx.Response:
                if index % 4:
                    return http.post("/v1/videos", json={"prompt": f"video {index}", "num_frames": 1})
                return http.post(
                    "/v1/videos", data={"prompt": "a", "num_frames": "1"}, files={"input_reference": image}
                )

            with ThreadPoolExecutor(200) as crowd:
                answers = list(crowd.map(ask, range(200)))
        counts = {status: sum(answer.status_code == status for answer in answers) for status in (200, 429)}
        # one runs, which has left its place to another one if it was taken before all were answered
        assert counts[200] + counts[429] == 200 and counts[200] in (20, 21), counts
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 429)
        paced.allow()
        made = [server.wait(answer.json()["id"]) for answer in answers if answer.status_code == 200]
        assert {job["status"] for job in made} == {"completed"}
        assert server.service.store.waiting() == 0 and server.wait(server.make(num_frames=1)["id"])


def test_clients_that_vanish():
    paced = Paced(tiny_pipeline())
    with running(paced, max_queue=2) as server:
        address = _address(server)
        abort = struct.pack("ii", 1, 0)  # an RST at once, as of a client that was killed

        def vanish(request: bytes, read: int) -> None:
            with socket.create_connection(address) as client:
                client.sendall(request)
                if read:
                    client.recv(read)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, abort)

        # in the middle of uploads, more than the queue has places
        part = b'--x\r\nContent-Disposition: form-data; name="input_reference"; filename="a"\r\n\r\n' + bytes(30_000)
        for _ in range(5):
            vanish(_HEAD + b"multipart/form-data; boundary=x\r\n\r\n" + part, 0)
            vanish(_HEAD + b"application/json\r\n\r\n{", 0)
        job = _eventually_made(server)
        # in the middle of the frames
        for _ in range(5):
            vanish(f"GET /v1/videos/{job['id']}/frames HTTP/1.1\r\nHost: x\r\n\r\n".encode(), 200)
        paced.allow()
        assert server.wait(job["id"])["status"] == "completed"
        # in the middle of a download
        large = server.wait(server.make(size="512x512", num_frames=13)["id"])
        for _ in range(5):
            vanish(f"GET /v1/videos/{large['id']}/content HTTP/1.1\r\nHost: x\r\n\r\n".encode(), 100)
        assert server.http.get("/health").json()["status"] == "ok"
        store = server.service.store
        server.wait_for(lambda: not any(job._watchers for job in store.listed()))
        server.wait_for(lambda: not store._reserved)  # no place in the queue is lost
        assert server.wait(server.make()["id"])["status"] == "completed"


_HEAD = b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nContent-Length: 90000\r\nContent-Type: "


def _address(server: Running) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").rsplit(":", 1)
    return host, int(port)


def _eventually_made(server: Running) -> dict:
    """The broken uploads hold their places until the server has seen that their clients are gone."""
    for _ in range(500):
        answer = server.http.post("/v1/videos", json={"prompt": "a", "num_frames": 9})
        if answer.status_code == 200:
            return answer.json()
        refused(answer, 429, "queue_full")
        time.sleep(0.01)
    raise AssertionError("the queue stayed full")


def test_a_video_that_is_deleted_while_it_is_downloaded_arrives():
    with running(tiny_pipeline()) as server:
        job = server.wait(server.make(size="512x512", num_frames=13)["id"])
        expected = server.http.get(f"/v1/videos/{job['id']}/content").content
        assert len(expected) > 500_000
        with server.http.stream("GET", f"/v1/videos/{job['id']}/content") as stream:
            pieces = stream.iter_bytes(65536)
            first = next(pieces)
            assert httpx.delete(f"{server.url}/v1/videos/{job['id']}").status_code == 200
            assert first + b"".join(pieces) == expected


def test_many_watch_one_video():
    paced = Paced(tiny_pipeline())
    with running(paced) as server:
        job = server.make()
        url = f"{server.url}/v1/videos/{job['id']}/frames"
        texts: list[str] = []
        crowd = [threading.Thread(target=lambda: texts.append(httpx.get(url, timeout=60).text)) for _ in range(30)]
        for watcher in crowd:
            watcher.start()
        paced.allow()
        for watcher in crowd:
            watcher.join(30)
        assert len(texts) == 30 and all(text.count("event: frame") == 9 for text in texts)
        ends = {json.dumps(json.loads(text.rsplit("data: ", 1)[1])["status"]) for text in texts}
        assert ends == {'"completed"'}
