"""The figures of one run: its workers and its links."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dlion_mpi.metrics.gauges import TEST
from dlion_mpi.metrics.grid import Floats, Grid, grid, nanmean
from dlion_mpi.metrics.reader import Run
from dlion_mpi.metrics.records import CHARTS, LINKS, Chart
from dlion_mpi.metrics.series import (
    Links,
    bytes_matrix,
    evaluation_period_s,
    links,
    part_names,
    per_worker,
    requested_s,
    step_parts,
    tested,
)
from dlion_mpi.report.colours import part_colour
from dlion_mpi.report.figure import EACH, ROWS, TIME, Figure, Series, bars, lines, numbers, series
from dlion_mpi.report.tests import axis_of, key_of, scaled

BAND = "the middle 80 %"
LINK_POINTS = 80
"""Values of a line in the small panels of the links."""
UTILISATION = Chart("", "utilisation", "Utilisation of each link", "fraction of the measured bandwidth (%)")


def figures(run: Run, found: Sequence[Links] | None = None) -> list[Figure]:
    """All figures of a run. ``found``: the result of `links_of`, if the caller has it."""
    found = links_of(run) if found is None else found
    fine, on = grid(run), grid(run, LINK_POINTS)
    of_steps, to_peers, from_peers = _charts()
    drawn = [_test(run, metric) for metric in run.metrics]
    drawn += [_over_time(run, fine, chart, per_worker(run, fine, chart.measure)) for chart in of_steps]
    drawn.append(_parts(run))
    if run.workers > 1:
        for chart in to_peers:
            drawn.append(_links(run, on, chart, [_scaled(chart, own.over_time[chart.measure]) for own in found]))
        drawn.append(_links(run, on, UTILISATION, [100 * own.utilisation for own in found], top=100.0, cap=200.0))
        drawn.append(_matrix(run, found))
        for chart in from_peers:
            drawn.append(_over_time(run, on, chart, np.array([own.over_time[chart.measure] for own in found])))
        drawn.append(_transfers(run))
    return drawn


def links_of(run: Run) -> list[Links]:
    """The links of every rank of the run."""
    on = grid(run, LINK_POINTS)
    return [links(rank, on) for rank in run.ranks]


def _charts() -> tuple[list[Chart], list[Chart], list[Chart]]:
    """The charts of measures of steps, of traffic to peers, and of traffic from peers."""
    of_links = [chart for chart in CHARTS if chart.measure in LINKS]
    to_peers = [chart for chart in of_links if LINKS[chart.measure].link == "to"]
    return [c for c in CHARTS if c not in of_links], to_peers, [c for c in of_links if c not in to_peers]


def _scaled(chart: Chart, values: Floats) -> Floats:
    return values / 1e6 if chart.rate else values


def _test(run: Run, metric: str) -> Figure:
    """The values of a test metric of each worker."""
    chart = Chart(f"{TEST}{metric}", f"{key_of(metric)}-of-workers", f"Test {metric} of each worker", axis_of(metric))
    tests = [(r, r.evaluations["time_s"], scaled(metric, tested(r, metric))) for r in run.ranks]
    if run.workers > EACH:
        width_s = max(evaluation_period_s(run), run.seconds / 200, 1e-3)
        on = Grid(width_s, 1 + int(run.seconds / width_s))
        return _over_time(run, on, chart, np.array([on.means(time_s, values) for _, time_s, values in tests]))
    drawn = [series(_name(r.rank), r.rank, values, time_s=time_s) for r, time_s, values in tests]
    return lines(chart.key, chart.title, "Each worker tests its own weights.", chart.axis, [("", drawn)])


def _over_time(run: Run, on: Grid, chart: Chart, values: Floats) -> Figure:
    """A line per worker, (workers, spans), or for many workers their median and a band."""
    says = _means(on, run)
    if chart.measure in LINKS:
        says = f"{LINKS[chart.measure].meaning[0].upper()}{LINKS[chart.measure].meaning[1:]}. {says}"
    drawn = _lines_of(run, values)
    return lines(chart.key, chart.title, says, chart.axis, [("", drawn)], time_s=on.middles_s, band=_band(run))


def _lines_of(run: Run, values: Floats) -> list[Series]:
    if run.workers <= EACH:
        return [series(_name(rank.rank), rank.rank, own) for rank, own in zip(run.ranks, values, strict=True)]
    known = np.isfinite(values).any(axis=0)  # an empty span has no median
    low, middle, high = np.full((3, values.shape[1]), np.nan)
    low[known], middle[known], high[known] = np.nanquantile(values[:, known], (0.1, 0.5, 0.9), axis=0)
    return [series("median worker", 0, middle, low=low, high=high)]


def _parts(run: Run) -> Figure:
    shown, names = run.ranks[:ROWS], part_names()
    means = np.array([step_parts(rank) for rank in shown])
    return bars(
        "parts",
        "Where a step's time goes",
        "Mean over all steps of each worker." + _cut(run),
        "time of a step (s)",
        [_name(rank.rank) for rank in shown],
        [(name, part_colour(n, len(names)), means[:, n]) for n, name in enumerate(names)],
    )


def _links(
    run: Run, on: Grid, chart: Chart, values: Sequence[Floats], *, top: float | None = None, cap: float | None = None
) -> Figure:
    """A panel per sender and a line per receiver; ``values``: (receivers, spans) by sender."""
    if run.workers > EACH:
        panels = [("", _lines_of(run, np.array([nanmean(own.T) for own in values])))]
        says = "Mean over the links of each worker. " + _means(on, run)
    else:
        panels = [
            (
                f"from {_name(rank.rank)}",
                [series(f"to {_name(peer)}", peer, own[peer]) for peer in range(run.workers) if peer != rank.rank],
            )
            for rank, own in zip(run.ranks, values, strict=True)
        ]
        says = _means(on, run)
    if cap is not None:
        # Bytes are counted when they are posted, and the measured bandwidth follows a change with a delay.
        says += f" Values above 100 % can follow a change of the link's rate; the axis ends at {cap:g} %."
    return lines(
        chart.key,
        chart.title,
        says,
        chart.axis,
        panels,
        time_s=on.middles_s,
        band=_band(run),
        log=chart.log,
        top=top,
        cap=cap,
    )


def _matrix(run: Run, found: Sequence[Links]) -> Figure:
    shown = min(run.workers, ROWS)
    names = [_name(worker) for worker in range(shown)]
    return {
        "kind": "matrix",
        "key": "matrix",
        "title": "Bytes between workers",
        "says": "In the whole run, with headers and acknowledgements, without knowledge transfers." + _cut(run),
        "x": "sent to",
        "y": "sent by",
        "unit": "MB",
        "rows": names,
        "columns": names,
        "values": [numbers(row) for row in bytes_matrix(run, found)[:shown, :shown] / 1e6],
    }


def _transfers(run: Run) -> Figure:
    """A bar per knowledge transfer, from its request to its end, in a row per worker."""
    shown = run.ranks[:ROWS]
    items = []
    for row, rank in enumerate(shown):
        columns = [rank.transfers[name] for name in ("time_s", "source", "merged", "payload_bytes")]
        for requested, done, source, merged, size in zip(requested_s(rank), *columns, strict=True):
            times = numbers([requested, done], 6)
            items.append([row, *times, int(source), bool(merged), *numbers([size / 1e6])])
    return {
        "kind": "spans",
        "key": "transfers",
        "title": "Knowledge transfers",
        "says": "From the request to the end of each transfer. The number is the worker whose weights arrived. "
        "Filled bars were merged, empty bars were not." + _cut(run),
        "x": TIME,
        "rows": [_name(rank.rank) for rank in shown],
        "end": run.seconds,
        "items": items,
    }


def _name(worker: int) -> str:
    return f"worker {worker}"


def _means(on: Grid, run: Run) -> str:
    text = f"Means over {on.width_s:g} s."
    if run.workers > EACH:
        text += f" Median of {len(run.ranks)} workers, and {BAND} of them."
    return text


def _band(run: Run) -> str:
    return BAND if run.workers > EACH else ""


def _cut(run: Run) -> str:
    return f" The first {ROWS} of {run.workers} workers." if run.workers > ROWS else ""
