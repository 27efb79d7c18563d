"""Ending on a signal: what is at hand is finished first."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger("unlearn")


class Stopped(BaseException):
    """A signal asked for the end, and what was at hand is finished. Not an Exception: nothing is to
    be made of it but to end."""


class Stop:
    """What SIGTERM and SIGUSR1 do (`install`): schedulers send them some time before they kill.
    Within `finishing` the end is put off until what is at hand is done; elsewhere they raise
    Stopped at once. Another one, REPEAT seconds later, kills: before that it is the same one, which
    a launcher that got it too has handed on."""

    REPEAT = 3

    def __init__(self) -> None:
        self.asked, self.depth = threading.Event(), 0
        self.signal: str | None = None
        self.time = 0.0  # when it was asked for

    def install(self) -> None:
        """Takes over both signals."""
        for number in signal.SIGTERM, signal.SIGUSR1:
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        if self.asked.is_set():
            if time.monotonic() - self.time > self.REPEAT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.signal, self.time = signal.Signals(number).name, time.monotonic()
        self.asked.set()
        if not self.depth:
            raise Stopped(self.signal)
        log.warning(f"{self.signal}: ends when what is at hand is finished")


STOP = Stop()


@contextmanager
def finishing() -> Iterator[threading.Event]:
    """A piece of work that a signal does not break off: yields the event that tells of it; at the
    end it raises Stopped."""
    STOP.depth += 1
    try:
        yield STOP.asked
    finally:
        STOP.depth -= 1
    if STOP.asked.is_set():
        raise Stopped(STOP.signal)
