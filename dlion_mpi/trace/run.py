"""Draw a whole run as a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from dlion_mpi import __version__
from dlion_mpi.metrics.grid import Grid, grid
from dlion_mpi.metrics.notes import Notes
from dlion_mpi.metrics.rank import Rank
from dlion_mpi.metrics.reader import Run
from dlion_mpi.metrics.timeline import RECORDS
from dlion_mpi.trace import loop, messages
from dlion_mpi.trace.events import Events, Window, micros

COUNTER_POINTS = 2000
"""Approximate number of values of a counter in the window."""
MOST_POINTS = 100_000
WITHOUT = {
    "spans": "the phases of its steps",
    "sent": "the messages that it sent",
    "arrived": "when messages to it arrived",
    "applied": "when messages to it were applied",
}
"""What is missing without a data set."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The size of a trace. ``notes``: what is missing from it."""

    events: int
    messages: int
    size_bytes: int
    notes: Sequence[str]

    def text(self) -> str:
        """Say it in one line."""
        size = f"{self.size_bytes / 1e6:.1f} MB of JSON"
        return f"{self.events:,} events, {self.messages:,} messages, {size}; open it at ui.perfetto.dev"


def write(run: Run, window: Window, file: IO[bytes]) -> Summary:
    """Write the trace of a run, rank by rank and link by link, so that it needs little memory."""
    about = {
        "program": f"dlion-mpi {__version__}",
        "strategy": run.strategy,
        "clock": "microseconds since training began, on rank 0's clock",
        "incomplete": "; ".join(run.notes),
    }
    events, notes = Events(file, run.workers, about), Notes()
    on = _grid(run, window)
    end = 0
    for rank in run.ranks:
        end = max(end, _rank(events, rank, on, window, notes))
    for number in range(run.workers):
        if number not in {rank.rank for rank in run.ranks}:
            events.process(number + 1, f"rank {number} (no metrics file)")
    tally = messages.draw(events, run, window, end)
    events.close()
    if tally.cut_off:
        notes.add(f"{tally.cut_off} messages were in flight when the run or its files ended")
    if tally.early:
        notes.add(
            f"{tally.early} messages arrived before they were posted, by at most {tally.early_us} us, since the clocks "
            "of the ranks differ; they are drawn as arriving at once"
        )
    return Summary(events.count, tally.messages, events.size_bytes, notes.lines())


def _rank(events: Events, rank: Rank, on: Grid, window: Window, notes: Notes) -> int:
    """Draw the tracks of a rank. Return its last time in microseconds."""
    host = rank.attributes.get("host")
    events.process(rank.rank + 1, f"rank {rank.rank}" + f" ({host})" * bool(host))
    spans = rank.timeline("spans")
    for name in RECORDS:
        if (spans if name == "spans" else rank.timeline(name)) is None:
            notes.add(f"timeline/{name} missing (written by another version): without {WITHOUT[name]}", rank.rank)
    loop.loop(events, rank, spans, window)
    loop.background(events, rank, spans, window)
    loop.counters(events, rank, on, window)
    ends = [rank.steps["time_s"], rank.evaluations["time_s"]]
    if spans is not None:
        ends.append(spans["end_s"])
    return max((int(micros(times.max())) for times in ends if len(times)), default=0)


def _grid(run: Run, window: Window) -> Grid:
    """The grid of the counters, finer in a shorter window."""
    shown_s = min(run.seconds, window.end / 1e6) - window.begin / 1e6
    points = COUNTER_POINTS * max(1.0, run.seconds / max(shown_s, 1e-3))
    return grid(run, points=int(min(points, MOST_POINTS)))
