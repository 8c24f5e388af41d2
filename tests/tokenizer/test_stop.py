"""Signals ask for a stop; a second Ctrl-C does not wait for it."""

import os
import signal

import pytest

from tokenizer import stop
from tokenizer.stop import SIGNALS, stop_on_signals


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks(number):
    before = signal.getsignal(number)
    with stop_on_signals() as flag:
        assert not flag.requested
        os.kill(os.getpid(), number)
        assert flag.requested
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_interrupts_and_one_that_was_passed_on_does_not(monkeypatch):
    with stop_on_signals() as flag:
        for _ in range(3):  # the terminal's, and a launcher's
            os.kill(os.getpid(), signal.SIGINT)
        assert flag.requested
        monkeypatch.setattr(stop, "SAME", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
