"""A file appears whole, and what a process that was killed while it wrote the file has left goes with the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tokenizer.files import write_whole

HOUSE = Path(__file__).resolve().parents[2]
KILLED = """
import os, signal, sys
from pathlib import Path
from tokenizer import files
files.sync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
files.write_whole(Path(sys.argv[1]), "half")
"""


def test_what_a_killed_process_has_left_goes_and_a_living_one_is_let_alone(tmp_path: Path) -> None:
    file = tmp_path / "index.json"
    write_whole(file, "whole")
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", KILLED, str(file)], cwd=HOUSE).returncode == -signal.SIGKILL
        assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["half", "whole"]
    (left,) = tmp_path.glob(".*")
    mine = left.with_name(left.name.replace(left.name.split(".")[-2], str(os.getpid())))
    for other in (mine, tmp_path / ".index.json.other.1.2", tmp_path / ".indexes.json"):
        other.write_text("")
    write_whole(file, "again")
    assert file.read_text() == "again"
    assert {path.name for path in tmp_path.iterdir()} == {
        "index.json",
        mine.name,
        ".index.json.other.1.2",
        ".indexes.json",
    }
