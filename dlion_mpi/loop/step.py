"""The step that a worker is in: where its time goes, what it sent and what it applied."""

from __future__ import annotations

from dataclasses import dataclass, field

from dlion_mpi.metrics.timeline import Phase

TIMED = {Phase.SELECT: "select_encode_s", Phase.WAIT: "wait_s", Phase.APPLY: "apply_s"}
"""The phases whose seconds a step adds up, and where."""


@dataclass(slots=True)
class Step:
    """One step of one worker. Times in seconds; a nested phase counts once, for itself.

    ``quality``: by peer the N of the message that this step sent, once it is known. ``ages``: by sender (seconds,
    steps) of every message that was applied, since its gradient was computed. ``skipped``: steps left out after this.
    """

    started_s: float
    lbs: int
    gbs: int
    compute_s: float = 0.0
    paced_s: float = 0.0
    select_encode_s: float = 0.0
    wait_s: float = 0.0
    apply_s: float = 0.0
    quality: dict[int, float] = field(default_factory=dict)
    ages: dict[int, list[tuple[float, int]]] = field(default_factory=dict)
    skipped: int = 0

    def use(self, samples: int) -> None:
        """Note that the batch had another number of samples than it was to have.

        Fewer count less in the global batch. More are taken for the batch that all workers have, and count no more.
        """
        if samples > self.lbs:
            self.gbs = round(self.gbs * samples / self.lbs)
        self.lbs = samples

    def add(self, phase: Phase, seconds: float) -> None:
        """Add to the time of a phase, if it is one that a step adds up."""
        if name := TIMED.get(phase):
            setattr(self, name, getattr(self, name) + seconds)
