"""Signals that end a run."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Protocol

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Stoppable(Protocol):
    """A worker, or something else that ends after the step at hand when it is given a reason."""

    stop_reason: str | None
    exit_code: int


@contextlib.contextmanager
def stopped_by_signals(workers: Sequence[Stoppable], numbers: Sequence[signal.Signals] = STOPPING) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the workers' run after the step at hand; a second Ctrl-C ends it at once.

    A second SIGTERM, which launchers send, changes nothing.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if workers[0].stop_reason == name and number == signal.SIGINT:
            raise KeyboardInterrupt
        for worker in workers:
            worker.stop_reason, worker.exit_code = name, 128 + number

    try:
        before = {number: signal.signal(number, stop) for number in numbers}
    except ValueError:  # not the main thread: signals are the caller's business
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
