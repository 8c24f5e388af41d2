"""The interface fuzzed from its own schema: by schemathesis' command line, with its stateful tests along the links of the schema."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from inference.serving.jobs import Job
from tests.inference.serving_tools import running
from tests.inference.test_pipeline import tiny_pipeline

PROGRAM = Path(sys.executable).with_name("schemathesis")


def test_no_request_breaks_it_and_every_answer_is_one_that_the_schema_promises(tmp_path):
    limits = {"max_queue": 4, "max_seconds": 1, "max_pixels": 4096}
    with running(tiny_pipeline(num_frames=1, max_text_length=64), **limits) as server:
        # a job's end is not what is tried: every answer to its making finds it ended, so that the links lead to finished videos
        add = server.service.store.add

        def add_and_make(job: Job) -> None:
            add(job)
            server.wait_for(lambda: job.ended)

        server.service.store.add = add_and_make
        # a schema can't say 1+4n frames, multiples of 16, or which class names a model knows: requests that fit it may be refused
        options = ["--max-examples", "10", "--seed", "1", "--exclude-checks", "positive_data_acceptance", "--no-color"]
        options += ["--request-timeout", "20", "--warnings", "off"]
        done = subprocess.run(
            [PROGRAM, "run", f"{server.url}/openapi.json", *options],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        generated = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
        assert generated and int(generated.group(1)) == int(generated.group(2)) >= 200, done.stdout[-2000:]
        made = server.metric('videoar_requests_total{method="POST",path="/v1/videos",status="200"}')
        content = server.metric(
            'videoar_requests_total{method="GET",path="/v1/videos/{video_id}/content",status="200"}'
        )
        assert made > 0 and content > 0  # it got as far as finished videos
        assert server.metric('videoar_jobs_total{status="failed"}') == 0
        assert server.wait(server.make(num_frames=1)["id"])["status"] == "completed"
