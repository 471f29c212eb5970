"""What makes a run end early and be started again: a signal of the batch system, or the end of its allocation."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

EXIT_CODE = 75
"""EX_TEMPFAIL: start it again, and it goes on."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
END_VARIABLE = "SLURM_JOB_END_TIME"
"""Seconds since the epoch at which Slurm ends the job."""
FIRST_MARGIN_S, MARGIN_S = 60.0, 10.0
"""Before the first checkpoint has been timed: what it is allowed; and what is allowed beside those that were."""
FIRST_SHARE, SHARE = 0.2, 0.05
"""At most so much of the time that there is, for those."""
TIMES = 2.0
"""A checkpoint may take so many times as long as the slowest so far."""


class Preemption:
    """Notices that the run has to make room. ``reason``: why, once it has to.

    ``limit_s``: seconds from now that the run may take (``--time-limit``); the allocation may end before.
    """

    def __init__(
        self,
        limit_s: float | None = None,
        environ: Mapping[str, str] = os.environ,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self.reason: str | None = None
        self._now_s = now_s
        self._began_s = now_s()
        ends = [self._began_s + limit_s] if limit_s is not None else []
        with contextlib.suppress(KeyError, ValueError):
            ends.append(float(environ[END_VARIABLE]))
        self._ends_s = min(ends, default=None)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM and SIGUSR1 ask for a checkpoint and the end, from here on, instead of ending the process."""

        def heard(number: int, frame: FrameType | None) -> None:
            self.reason = self.reason or signal.Signals(number).name

        before = {}
        with contextlib.suppress(ValueError):  # not the main thread: signals are the caller's business
            before = {number: signal.signal(number, heard) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def look(self, checkpoint_s: float | None, step_s: float) -> bool:
        """Whether the run has to end now. ``checkpoint_s``: what the slowest checkpoint took, None before the first.

        ``step_s``: what a step takes; all workers have to finish theirs first.
        """
        if self.reason is None and self._ends_s is not None:
            whole_s = max(0.0, self._ends_s - self._began_s)
            if checkpoint_s is None:
                margin_s = min(FIRST_MARGIN_S, FIRST_SHARE * whole_s)
            else:
                margin_s = TIMES * checkpoint_s + min(MARGIN_S, SHARE * whole_s)
            if self._now_s() >= self._ends_s - margin_s - 2 * step_s:
                self.reason = "time limit"
        return self.reason is not None
