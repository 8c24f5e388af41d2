"""One temporary folder for all that a test session and the processes it starts leave behind; it goes when the session ends."""

from __future__ import annotations

import os
import shutil
import tempfile
from multiprocessing.util import Finalize

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Set before xdist starts its workers, which inherit it, as does every process that a test starts."""
    if not hasattr(config, "workerinput"):
        # short: sockets in it have paths of at most 107 characters
        folder = os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="vt-")
        # after multiprocessing's own folder in it, which goes at -100; pytest's folders of failed tests go with it
        Finalize(None, shutil.rmtree, (folder, True), exitpriority=-200)
