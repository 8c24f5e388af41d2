"""What the tests on one process share."""

import pytest

from parallel.setup import ParallelConfig, destroy, initialize


@pytest.fixture(scope="module")
def info():
    """This process, alone."""
    yield initialize(ParallelConfig(), 0)
    destroy()
