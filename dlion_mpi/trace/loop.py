"""The tracks of a rank: its loop, its background encoder, its evaluations and knowledge transfers, its counters."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dlion_mpi.metrics.files import Array
from dlion_mpi.metrics.grid import Grid
from dlion_mpi.metrics.rank import Rank
from dlion_mpi.metrics.records import STEPS, TABLES
from dlion_mpi.metrics.timeline import Phase
from dlion_mpi.trace.events import Events, Lanes, Micros, Window, micros, nested, number

NAMES = {
    Phase.COMPUTE: "compute",
    Phase.SELECT: "select, encode",
    Phase.WAIT: "wait",
    Phase.APPLY: "apply",
    Phase.AGREE: "wait for a collective",
    Phase.PROFILE: "time batch sizes",
    Phase.LEAVE: "leave together",
}
"""Names of the loop's phases in the trace."""
SLEEP = "sleep (paced)"


@dataclass(frozen=True, slots=True)
class Slices:
    """Slices of the loop's track, (K,) each. ``label``: phase, STEP_LABEL or SLEEP_LABEL. ``step``: row or -1."""

    start: Micros
    end: Micros
    label: npt.NDArray[np.int64]
    step: npt.NDArray[np.int64]


STEP_LABEL, SLEEP_LABEL = 0, -1


def loop(events: Events, rank: Rank, spans: Array | None, window: Window) -> None:
    """Draw the track of the loop: its steps, and the phases in them."""
    slices = _slices(rank, spans)
    shown = window.shows(slices.start, slices.end)
    start, end, label, row = (a[shown].tolist() for a in (slices.start, slices.end, slices.label, slices.step))
    if not start:
        return
    pid = rank.rank + 1
    tid = events.thread(pid, "loop", 0)
    steps = rank.steps["step"].tolist()
    shown_with = {name: rank.steps[name].tolist() for name, measure in STEPS.items() if measure.trace}
    names = {int(phase): name for phase, name in NAMES.items()} | {SLEEP_LABEL: SLEEP}
    for (begin, finish), what, at in zip(nested(start, end), label, row, strict=True):
        if what == STEP_LABEL:
            args = ",".join(f'"{name}":{number(values[at])}' for name, values in shown_with.items())
            events.slice(pid, tid, begin, finish, f"step {steps[at]:.0f}", args)
        else:
            events.slice(pid, tid, begin, finish, names[what])


def _slices(rank: Rank, spans: Array | None) -> Slices:
    """Steps and spans in order of start, outer ones first."""
    start, end = step_times(rank)
    parts = [Slices(start, end, np.full(len(start), STEP_LABEL), np.arange(len(start)))]
    if spans is not None:
        inner = spans[np.isin(spans["phase"], [int(phase) for phase in NAMES])]
        inner_start, inner_end = micros(inner["start_s"]), micros(inner["end_s"])
        row = _row((inner_start + inner_end) // 2, start, end)
        # A span and its step are timed separately, so they can differ by a microsecond.
        within = row >= 0
        if len(start):
            inner_start = np.where(within, np.maximum(inner_start, start[row]), inner_start)
            inner_end = np.where(within, np.minimum(inner_end, end[row]), inner_end)
        parts.append(Slices(inner_start, inner_end, inner["phase"].astype(np.int64), row))
        parts.append(_sleeps(rank, parts[-1]))
    joined = Slices(*(np.concatenate([getattr(part, f) for part in parts]) for f in ("start", "end", "label", "step")))
    kept = joined.end > joined.start
    # A step contains spans, and a span contains a sleep, also where they begin and end together. Of two such spans the
    # later one contains the other, since a span is recorded when it ends.
    depth = np.where(joined.label == STEP_LABEL, 0, np.where(joined.label == SLEEP_LABEL, 2, 1))
    order = np.lexsort((-np.arange(len(depth)), depth, -joined.end, joined.start))
    order = order[kept[order]]
    return Slices(joined.start[order], joined.end[order], joined.label[order], joined.step[order])


def step_times(rank: Rank) -> tuple[Micros, Micros]:
    """Begin and end of each step, (T,). No step begins before the previous one has ended."""
    time_s, step_s = rank.steps["time_s"], rank.steps["step_s"]
    end = micros(time_s)
    if len(end):
        end = np.maximum.accumulate(end)
    length = np.where(np.isfinite(step_s), step_s, 0.0)
    start = np.minimum(micros(time_s - length), end)
    start[1:] = np.maximum(start[1:], end[:-1])
    return start, end


def _row(time: Micros, start: Micros, end: Micros) -> npt.NDArray[np.int64]:
    """The row of the step that contains each time, -1 for none."""
    if not len(end):
        return np.full(len(time), -1)
    row = np.minimum(np.searchsorted(end, time, side="left"), len(end) - 1)
    return np.where((time >= start[row]) & (time <= end[row]), row, -1)


def _sleeps(rank: Rank, spans: Slices) -> Slices:
    """The sleep at the end of computing that emulates a slower machine. There is none in virtual time."""
    paced_s = rank.steps["paced_s"]
    computing = (spans.label == int(Phase.COMPUTE)) & (spans.step >= 0)
    if "environment" in rank.attributes or not len(paced_s) or not computing.any():
        computing[:] = False
    end, row = spans.end[computing], spans.step[computing]
    slept = micros(np.where(np.isfinite(paced_s), paced_s, 0.0))[row] if len(row) else row
    start = np.maximum(end - slept, spans.start[computing])
    return Slices(start, end, np.full(len(row), SLEEP_LABEL), row)


def background(events: Events, rank: Rank, spans: Array | None, window: Window) -> None:
    """Draw the tracks of the background work. Without spans, only one time of each piece of work is known."""
    pid = rank.rank + 1
    if spans is not None:
        _exchange(events, pid, spans[spans["phase"] == int(Phase.EXCHANGE)], window)
    tests, moves = rank.evaluations, rank.transfers
    start, end = _extents(tests["time_s"], spans, Phase.EVALUATE, by="start_s")
    lanes = Lanes(events, pid, "evaluations", 2)
    for row in np.flatnonzero(window.shows(start, end)).tolist():
        a, b = int(start[row]), int(end[row])
        args = ",".join(f"{json.dumps(name)}:{number(tests[name][row])}" for name in tests if name != "time_s")
        events.slice(pid, lanes.take(a, b), a, b, "evaluate", args)
    start, end = _extents(moves["time_s"], spans, Phase.TRANSFER, by="end_s")
    lanes = Lanes(events, pid, "knowledge transfers", 3)
    for row in np.flatnonzero(window.shows(start, end)).tolist():
        a, b = int(start[row]), int(end[row])
        args = ",".join(f'"{name}":{number(moves[name][row])}' for name in TABLES["transfers"] if name != "time_s")
        events.slice(pid, lanes.take(a, b), a, b, "knowledge transfer", args)


def _exchange(events: Events, pid: int, spans: Array, window: Window) -> None:
    """Draw the track of the background encoder."""
    lanes = Lanes(events, pid, "exchange", 1)
    start, end = micros(spans["start_s"]), micros(spans["end_s"])
    for row in np.flatnonzero(window.shows(start, end)).tolist():
        a, b = int(start[row]), int(end[row])
        events.slice(pid, lanes.take(a, b), a, b, NAMES[Phase.SELECT])


def _extents(time_s: Array, spans: Array | None, phase: Phase, *, by: str) -> tuple[Micros, Micros]:
    """Begin and end of work of which one time is known: from the span with this time ``by``, else just this time."""
    start_s, end_s = time_s.astype(np.float64), time_s.astype(np.float64)
    if spans is not None and len(time_s):
        own = np.sort(spans[spans["phase"] == int(phase)], order=by)
        if len(own):
            at = np.minimum(np.searchsorted(own[by], time_s), len(own) - 1)
            same = own[by][at] == time_s
            start_s = np.where(same, own["start_s"][at], start_s)
            end_s = np.where(same, own["end_s"][at], end_s)
    return micros(start_s), micros(end_s)


def counters(events: Events, rank: Rank, on: Grid, window: Window) -> None:
    """Draw counters: the batch size, and for each link the MB/s sent and the measured bandwidth."""
    pid = rank.rank + 1
    time_s, lbs = rank.steps["time_s"], rank.steps["lbs"]
    if not len(time_s):
        return
    start, end = step_times(rank)
    changed = np.flatnonzero(np.diff(lbs, prepend=np.nan) != 0)
    until = np.append(start[changed[1:]], end[-1])
    for row in changed[window.shows(start[changed], until)].tolist():
        events.counter(pid, int(start[row]), "batch size", f'"lbs":{number(lbs[row])}')
    columns = rank.links()
    for peer in range(rank.workers):
        if peer != rank.rank:
            sent, measured = columns["bytes_sent"][:, peer], columns["bytes_per_s"][:, peer]
            _link_counter(events, pid, peer, on, window, time_s, sent, measured)


def _link_counter(
    events: Events, pid: int, peer: int, on: Grid, window: Window, time_s: Array, sent: Array, measured: Array
) -> None:
    """Draw the counter of one link, on a grid; 0 after the last step."""
    starts = micros(on.width_s * np.arange(on.count))
    rates = np.nan_to_num(on.rates(time_s, sent)) / 1e6
    bandwidth = on.means(time_s, measured) / 1e6
    before, end = "", micros(time_s[-1:])
    for span in np.flatnonzero((starts < end) & window.shows(starts, starts + int(micros(on.width_s)))).tolist():
        args = f'"sent":{number(rates[span])}'
        if bandwidth[span] > 0:
            args += f',"measured":{number(bandwidth[span])}'
        if args != before:
            events.counter(pid, int(starts[span]), f"MB/s to rank {peer}", args)
        before = args
    if before and window.shows(end, end).all():
        events.counter(pid, int(end[0]), f"MB/s to rank {peer}", '"sent":0')
