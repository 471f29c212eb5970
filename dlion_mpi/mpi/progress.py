"""The one thread that calls MPI while training runs. TensorFlow computes meanwhile, without the GIL."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from dlion_mpi.mpi.collectives import Collectives
from dlion_mpi.mpi.transport import MpiTransport

PAUSE_MIN_S, PAUSE_MAX_S = 50e-6, (1e-3, 5e-3)
"""Between two looks when nothing moves: doubled from the first until it is LOOKS a step's computing, within the second
two. So an idle thread costs few per cent of a core, and a message waits for a small share of a step."""
LOOKS = 1 / 50
GROWTH, GROWTH_AWAITED = 2.0, 1.05
"""While the loop waits for something there is no computing to disturb: a pause is then a twentieth of the time in which
nothing has moved, so that a short wait is hardly lengthened and a long one costs few per cent of a core."""


class ProgressThread:
    """Drives `MpiTransport` and `Collectives`; the loop waits here for what they bring."""

    def __init__(self) -> None:
        self._wake = threading.Event()
        self._moved = threading.Event()
        self._finish = False
        self._awaited = False
        self._pause_max_s = PAUSE_MAX_S[0]
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """There is something new to do."""
        self._wake.set()

    def notify(self) -> None:
        """Something that the loop may be waiting for has happened beside MPI."""
        self._moved.set()

    def computed(self, seconds: float) -> None:
        """A step's gradient took so long to compute: look as often as matters then."""
        self._pause_max_s = min(max(LOOKS * seconds, PAUSE_MAX_S[0]), PAUSE_MAX_S[1])

    def start(self, transport: MpiTransport, collectives: Collectives) -> None:
        """From here to `stop`, MPI belongs to this thread."""
        self._thread = threading.Thread(
            target=self._run, args=(transport, collectives), name="mpi-progress", daemon=True
        )
        self._thread.start()

    def wait_until(self, ready: Callable[[], bool], timeout_s: float = math.inf, ask_s: float = math.inf) -> bool:
        """Wait until ``ready()``; it is asked again whenever something moved, and after ``ask_s`` seconds. False after
        ``timeout_s``.

        Raises whatever ended the thread.
        """
        started = time.monotonic()
        deadline, asked = started + timeout_s, started + ask_s
        self._awaited = True
        try:
            while True:
                self._moved.clear()
                self.check()
                if ready():
                    return True
                now = time.monotonic()
                if now >= deadline:
                    return False
                # Also ask again from time to time: readiness may come from a signal or another thread.
                self._moved.wait(min(0.05, asked - now) if asked > now else 0.05)
        finally:
            self._awaited = False

    def check(self) -> None:
        """Raise what ended the thread, if anything did."""
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """End the thread and wait for it; MPI belongs to the caller again."""
        self._finish = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, transport: MpiTransport, collectives: Collectives) -> None:
        pause_s = PAUSE_MIN_S
        try:
            transport.start()
            while not self._finish:
                moved = transport.progress()
                moved = collectives.progress() or moved
                if moved:
                    self._moved.set()
                    pause_s = PAUSE_MIN_S
                    continue
                self._wake.wait(pause_s)
                self._wake.clear()
                growth = GROWTH_AWAITED if self._awaited else GROWTH
                pause_s = min(growth * pause_s, PAUSE_MAX_S[1] if self._awaited else self._pause_max_s)
        except BaseException as failure:  # handed to the loop, which must not wait for a thread that is gone
            self._failure = failure
            self._moved.set()
