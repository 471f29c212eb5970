"""The synchronisation modes (``--sync``): when a worker may go to its next step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mode:
    """A synchronisation mode.

    ``lockstep``: a step takes everyone's messages of that step and no others, so all workers are at the same step.
    ``bounded``: a worker stays at most ``--staleness`` steps ahead of the slowest.
    """

    name: str
    lockstep: bool = False
    bounded: bool = False

    @property
    def reports_progress(self) -> bool:
        """Whether peers wait for this worker's step, so that a peer that gets no entries needs a header."""
        return self.lockstep or self.bounded

    def may_advance(self, step: int, newest: Iterable[int], *, staleness: int = 0, backup: int = 0) -> bool:
        """Whether step ``step`` may be completed. ``newest``: per live peer the step of its newest message.

        ``backup``: the slowest peers that are left out. See docs/algorithms.md, "A step".
        """
        steps = sorted(newest)
        if self.lockstep:
            return all(other >= step for other in steps)
        counted = steps[backup:]
        return not self.bounded or not counted or counted[0] >= step - staleness


MODES = {mode.name: mode for mode in (Mode("sync", lockstep=True), Mode("bounded", bounded=True), Mode("async"))}
