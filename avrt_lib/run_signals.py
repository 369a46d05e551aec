"""Signals that ask a command to end, as an exception that unwinds everything it started."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator


class Interrupted(BaseException):
    """A signal asked the command to end; ``exit_code`` is what a shell expects of it (128 and the signal's number)."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextlib.contextmanager
def signals_raise(*numbers: signal.Signals) -> Iterator[None]:
    """Turn signals (SIGINT, SIGTERM and SIGHUP if none is given) into ``Interrupted`` within the block.

    A process that a library forks there inherits the handler and has nothing of ours to unwind: it ends as by default.
    """
    numbers = numbers or (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    owner = os.getpid()

    def interrupt(number: int, _: object) -> None:
        if os.getpid() == owner:
            raise Interrupted(number)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    earlier = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
