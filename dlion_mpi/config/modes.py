"""The synchronisation modes (``--sync``): the rule for when a worker may complete a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mode:
    """A synchronisation mode.

    ``lockstep``: a step applies exactly the messages of that step from all peers, so all workers are at the same step.
    ``bounded``: a worker is at most ``--staleness`` steps ahead of the slowest.
    """

    name: str
    lockstep: bool = False
    bounded: bool = False

    @property
    def reports_progress(self) -> bool:
        """Whether peers wait for this worker's step, so that they need a bare header when they get no entries."""
        return self.lockstep or self.bounded

    def may_advance(self, step: int, newest: Iterable[int], *, staleness: int = 0, backup: int = 0) -> bool:
        """Whether step ``step`` may be completed. ``newest``: step of the newest message of each live peer.

        ``backup``: number of slowest peers to ignore. See docs/algorithms.md, "A step".
        """
        steps = sorted(newest)
        if self.lockstep:
            return all(other >= step for other in steps)
        counted = steps[backup:]
        return not self.bounded or not counted or counted[0] >= step - staleness


MODES = {mode.name: mode for mode in (Mode("sync", lockstep=True), Mode("bounded", bounded=True), Mode("async"))}
