"""Signals as exceptions, in the process that asked for it alone."""

from __future__ import annotations

import os
import signal
import time

import pytest

from avrt_lib.run_signals import Interrupted, signals_raise


def test_a_signal_is_an_exception_within_the_block() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as raised, signals_raise():
        os.kill(os.getpid(), signal.SIGTERM)
    assert raised.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_forked_process_ends_by_the_signal_itself() -> None:
    reads, writes = os.pipe()
    with signals_raise():
        child = os.fork()
        if child == 0:
            try:
                os.write(writes, b".")
                time.sleep(60)
            finally:  # an exception would get here
                os._exit(1)
        os.read(reads, 1)  # Python drops signals that arrive while it forks
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
    os.close(reads)
    os.close(writes)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGTERM
