"""A whole run as a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from dlion_mpi import __version__
from dlion_mpi.metrics.reader import Rank, Run, _Notes
from dlion_mpi.metrics.series import Grid, grid
from dlion_mpi.metrics.timeline import RECORDS
from dlion_mpi.trace import loop, messages
from dlion_mpi.trace.events import Events, Window, micros

COUNTER_POINTS = 2000
"""Values of a counter over what is shown, about."""
MOST_POINTS = 100_000
WITHOUT = {
    "spans": "when in a step it computed, selected, waited and applied",
    "sent": "the messages it sent",
    "arrived": "when the messages to it arrived",
    "applied": "which of the messages to it were used when",
}
"""What cannot be shown without a data set."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What was written. ``notes``: what cannot be shown, a line each."""

    events: int
    messages: int
    size_bytes: int
    notes: Sequence[str]

    def text(self) -> str:
        """In one line."""
        size = f"{self.size_bytes / 1e6:.1f} MB of JSON"
        return f"{self.events:,} events, {self.messages:,} messages, {size}; open it at ui.perfetto.dev"


def write(run: Run, window: Window, file: IO[bytes]) -> Summary:
    """Write the trace of a run; of ranks and messages one after the other, so that it needs little memory."""
    about = {
        "program": f"dlion-mpi {__version__}",
        "strategy": run.strategy,
        "clock": "microseconds since training began, as rank 0 counts them",
        "incomplete": "; ".join(run.notes),
    }
    events, notes = Events(file, run.workers, about), _Notes()
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
        notes.add(f"{tally.cut_off} messages whose arrival was not recorded: under way when the run or its files end")
    if tally.early:
        notes.add(
            f"{tally.early} messages arrived before they were posted, by at most {tally.early_us} us: so much the "
            "ranks' clocks differ; drawn as arriving at once"
        )
    return Summary(events.count, tally.messages, events.size_bytes, notes.lines())


def _rank(events: Events, rank: Rank, on: Grid, window: Window, notes: _Notes) -> int:
    """A rank's own tracks. Returns its last time, in microseconds."""
    host = rank.attributes.get("host")
    events.process(rank.rank + 1, f"rank {rank.rank}" + f" ({host})" * bool(host))
    spans = rank.timeline("spans")
    for name in RECORDS:
        if (spans if name == "spans" else rank.timeline(name)) is None:
            notes.add(f"without timeline/{name}, written by another version: {WITHOUT[name]} is not shown", rank.rank)
    loop.loop(events, rank, spans, window)
    loop.beside(events, rank, spans, window)
    loop.counters(events, rank, on, window)
    ends = [rank.steps["time_s"], rank.evaluations["time_s"]]
    if spans is not None:
        ends.append(spans["end_s"])
    return max((int(micros(times.max())) for times in ends if len(times)), default=0)


def _grid(run: Run, window: Window) -> Grid:
    """Spans for the counters: finer where less is shown."""
    shown_s = min(run.seconds, window.end / 1e6) - window.begin / 1e6
    points = COUNTER_POINTS * max(1.0, run.seconds / max(shown_s, 1e-3))
    return grid(run, points=int(min(points, MOST_POINTS)))
