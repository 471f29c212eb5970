"""Early end of a run: a signal from the batch system, or the end of the allocation."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

EXIT_CODE = 75
"""EX_TEMPFAIL: the run saved a checkpoint and can be started again."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
END_VARIABLE = "SLURM_JOB_END_TIME"
"""Environment variable with the time at which Slurm ends the job, in seconds since the epoch."""
FIRST_MARGIN_S, MARGIN_S = 60.0, 10.0
"""Time reserved before the end: until a checkpoint has been timed, and later in addition to its time."""
FIRST_SHARE, SHARE = 0.2, 0.05
"""Upper limits of those two, as fractions of the total time."""
TIMES = 2.0
"""Time reserved for a checkpoint, as a multiple of the slowest one so far."""


class Preemption:
    """Detects that the run has to end. ``reason`` says why, and is None before.

    ``limit_s``: time limit in seconds from now (``--time-limit``). The allocation may end earlier.
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
        """Let SIGTERM and SIGUSR1 request a checkpoint and the end of the run instead of ending the process."""

        def heard(number: int, frame: FrameType | None) -> None:
            self.reason = self.reason or signal.Signals(number).name

        before = {}
        with contextlib.suppress(ValueError):  # outside the main thread the caller handles signals
            before = {number: signal.signal(number, heard) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def look(self, checkpoint_s: float | None, step_s: float) -> bool:
        """Whether the run has to end now.

        ``checkpoint_s``: duration of the slowest checkpoint so far, None before the first. ``step_s``: duration of a
        step, which all workers have to finish first.
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
