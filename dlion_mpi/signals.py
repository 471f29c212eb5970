"""Signals that end a run."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Protocol

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Stoppable(Protocol):
    """A worker: it ends after its current step when it is given a reason."""

    stop_reason: str | None
    exit_code: int


@contextlib.contextmanager
def stopped_by_signals(workers: Sequence[Stoppable], numbers: Sequence[signal.Signals] = STOPPING) -> Iterator[None]:
    """End the workers' run after the current step on Ctrl-C or SIGTERM, and at once on a second Ctrl-C.

    A second SIGTERM changes nothing: launchers send several.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if workers[0].stop_reason == name and number == signal.SIGINT:
            raise KeyboardInterrupt
        for worker in workers:
            worker.stop_reason, worker.exit_code = name, 128 + number

    try:
        before = {number: signal.signal(number, stop) for number in numbers}
    except ValueError:  # outside the main thread the caller handles signals
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
