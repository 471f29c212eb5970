"""The one thread that calls MPI while training runs. The gradient is computed meanwhile, without the GIL."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

PAUSE_MIN_S, PAUSE_MAX_S = 50e-6, (1e-3, 5e-3)
"""Pause between two looks when nothing moves. It doubles from the first value up to LOOKS of a step's computing, within
the last two values. So an idle thread costs a few per cent of a core, and a message waits for a small part of a
step."""
LOOKS = 1 / 50
GROWTH, GROWTH_AWAITED = 2.0, 1.05
"""While the loop waits there is no computing to disturb, and the pause grows slowly: it is a twentieth of the time in
which nothing has moved. So a short wait is hardly longer, and a long one costs a few per cent of a core."""
ASK_S = 0.05
"""Longest time between two looks at a condition, which may also change by a signal or another thread."""


class ProgressThread:
    """Moves the transport and the collectives on. The loop waits here for what they bring."""

    def __init__(self) -> None:
        self._wake = threading.Event()
        self._moved = threading.Event()
        self._finish = False
        self._awaited = False
        self._pause_max_s = PAUSE_MAX_S[0]
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """Let the thread look at once: there is work to do."""
        self._wake.set()

    def notify(self) -> None:
        """Let the loop look at its condition: something has happened outside MPI."""
        self._moved.set()

    def computed(self, seconds: float) -> None:
        """Choose how often the thread looks, given how long a gradient takes to compute."""
        self._pause_max_s = min(max(LOOKS * seconds, PAUSE_MAX_S[0]), PAUSE_MAX_S[1])

    def start(self, *parts: Callable[[], bool]) -> None:
        """Let the thread own MPI, until `stop`. It calls each part again and again; True means that anything moved."""
        self._thread = threading.Thread(target=self._run, args=parts, name="mpi-progress", daemon=True)
        self._thread.start()

    def wait_until(self, ready: Callable[[], bool], timeout_s: float = math.inf, ask_s: float = math.inf) -> bool:
        """Wait until ``ready()``. Returns False after ``timeout_s`` seconds.

        It is asked whenever something has moved, and after ``ask_s`` seconds. Raises what ended the thread.
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
                self._moved.wait(min(ASK_S, asked - now) if asked > now else ASK_S)
        finally:
            self._awaited = False

    def check(self) -> None:
        """Raise what ended the thread, if anything did."""
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """End the thread and wait for it. MPI belongs to the caller again."""
        self._finish = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, *parts: Callable[[], bool]) -> None:
        pause_s = PAUSE_MIN_S
        try:
            while not self._finish:
                moved = [part() for part in parts]
                if any(moved):
                    self._moved.set()
                    pause_s = PAUSE_MIN_S
                    continue
                self._wake.wait(pause_s)
                self._wake.clear()
                growth = GROWTH_AWAITED if self._awaited else GROWTH
                pause_s = min(growth * pause_s, PAUSE_MAX_S[1] if self._awaited else self._pause_max_s)
        except BaseException as failure:  # the loop must not wait for a thread that has ended
            self._failure = failure
            self._moved.set()
