"""The figures of one run: its workers and its links."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dlion_mpi.metrics.reader import Run
from dlion_mpi.metrics.series import (
    PARTS,
    Floats,
    Grid,
    Links,
    asked_s,
    bytes_matrix,
    evaluation_period_s,
    grid,
    links,
    nanmean,
    per_worker,
    step_parts,
)
from dlion_mpi.report.colours import PARTS as PART_COLOURS
from dlion_mpi.report.figure import EACH, ROWS, TIME, Figure, Series, bars, lines, numbers, series

BAND = "the middle 80 % of them"


LINK_POINTS = 80
"""Of a line in the small panels of the links."""


def figures(run: Run, found: Sequence[Links] | None = None) -> list[Figure]:
    """All of them. ``found``: `links_of` the run, if they are there already."""
    found = links_of(run) if found is None else found
    fine, on = grid(run), grid(run, LINK_POINTS)
    lbs, step_s = (per_worker(run, fine, name) for name in ("lbs", "step_s"))
    drawn = [
        _accuracy(run),
        _over_time(run, fine, "batch-size", "Batch size of each worker", "local batch size (samples)", lbs),
        _over_time(run, fine, "step-time", "Iteration time of each worker", "time of a step (s)", step_s),
        _parts(run),
    ]
    if run.workers > 1:
        drawn += [
            _links(run, on, "n", "N of Max N on each link", "N (%)", [own.quality for own in found], log=True),
            _links(run, on, "rate", "Bytes sent on each link", "sent (MB/s)", [own.bytes_per_s / 1e6 for own in found]),
            _links(
                run,
                on,
                "utilisation",
                "Utilisation of each link",
                "sent, of the bandwidth measured then (%)",
                [100 * own.utilisation for own in found],
                top=100.0,
                cap=200.0,
            ),
            _matrix(run, found),
            *_ages(run, on, found),
            _transfers(run),
        ]
    return drawn


def links_of(run: Run) -> list[Links]:
    """The links of every rank of the run."""
    on = grid(run, LINK_POINTS)
    return [links(rank, on) for rank in run.ranks]


def _accuracy(run: Run) -> Figure:
    title, y = "Test accuracy of each worker", "test accuracy (%)"
    if run.workers > EACH:
        width_s = max(evaluation_period_s(run), run.seconds / 200, 1e-3)
        on = Grid(width_s, 1 + int(run.seconds / width_s))
        tests = [on.means(r.evaluations["time_s"], 100 * r.evaluations["accuracy"]) for r in run.ranks]
        return _over_time(run, on, "accuracy-of-workers", title, y, np.array(tests))
    drawn = [
        series(_name(r.rank), r.rank, 100 * r.evaluations["accuracy"], time_s=r.evaluations["time_s"])
        for r in run.ranks
    ]
    says = "Of its own weights, on the whole test set."
    return lines("accuracy-of-workers", title, says, y, [("", drawn)])


def _over_time(run: Run, on: Grid, key: str, title: str, y: str, values: Floats) -> Figure:
    """A value of each worker over time, (workers, spans); of many workers, the median and a band."""
    drawn = _lines_of(run, values)
    return lines(key, title, _means(on, run), y, [("", drawn)], time_s=on.middles_s, band=_band(run))


def _lines_of(run: Run, values: Floats) -> list[Series]:
    if run.workers <= EACH:
        return [series(_name(rank.rank), rank.rank, own) for rank, own in zip(run.ranks, values, strict=True)]
    known = np.isfinite(values).any(axis=0)  # in an empty span there is no median
    low, middle, high = np.full((3, values.shape[1]), np.nan)
    low[known], middle[known], high[known] = np.nanquantile(values[:, known], (0.1, 0.5, 0.9), axis=0)
    return [series("median worker", 0, middle, low=low, high=high)]


def _parts(run: Run) -> Figure:
    shown = run.ranks[:ROWS]
    means = np.array([step_parts(rank) for rank in shown])
    return bars(
        "parts",
        "Where a step's time goes",
        "The mean over all steps of each worker." + _cut(run),
        "time of a step (s)",
        [_name(rank.rank) for rank in shown],
        [(name, colour, means[:, n]) for n, (name, colour) in enumerate(zip(PARTS, PART_COLOURS, strict=True))],
    )


def _links(
    run: Run,
    on: Grid,
    key: str,
    title: str,
    y: str,
    values: Sequence[Floats],
    *,
    log: bool = False,
    top: float | None = None,
    cap: float | None = None,
) -> Figure:
    """A value of each link over time, (receivers, spans) by sender: a panel for each sender."""
    if run.workers > EACH:
        drawn = _lines_of(run, np.array([nanmean(own.T) for own in values]))
        panels = [("", drawn)]
        says = "Each worker's mean over its links: " + _means(on, run).lower()
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
        # Bytes count when they are posted, and the estimate of the bandwidth follows a change with a delay.
        says += f" Where a link's rate has just changed this can pass 100 %; drawn up to {cap:g} %."
    return lines(key, title, says, y, panels, time_s=on.middles_s, band=_band(run), log=log, top=top, cap=cap)


def _matrix(run: Run, found: Sequence[Links]) -> Figure:
    shown = min(run.workers, ROWS)
    names = [_name(worker) for worker in range(shown)]
    return {
        "kind": "matrix",
        "key": "matrix",
        "title": "Bytes from whom to whom",
        "says": "In the whole run, headers and acknowledgements included; knowledge transfers are not." + _cut(run),
        "x": "sent to",
        "y": "sent by",
        "unit": "MB",
        "rows": names,
        "columns": names,
        "values": [numbers(row) for row in bytes_matrix(run, found)[:shown, :shown] / 1e6],
    }


def _ages(run: Run, on: Grid, found: Sequence[Links]) -> list[Figure]:
    says = "From the computing of a gradient to its use at the receiver, the mean over what was applied. "
    drawn = []
    for key, y, values in (
        ("age-s", "age (s)", [own.age_s for own in found]),
        ("age-steps", "age (steps)", [own.age_steps for own in found]),
    ):
        title = f"Message age at each worker, in {'seconds' if key == 'age-s' else 'steps'}"
        figure = _over_time(run, on, key, title, y, np.array(values))
        figure["says"] = says + figure["says"]
        drawn.append(figure)
    return drawn


def _transfers(run: Run) -> Figure:
    """From the step that asked for a transfer to the step at which it was done, in a row for each worker."""
    shown = run.ranks[:ROWS]
    items = []
    for row, rank in enumerate(shown):
        columns = rank.transfers
        for asked, done, source, merged, size in zip(
            asked_s(rank),
            columns["time_s"],
            columns["source"],
            columns["merged"],
            columns["payload_bytes"],
            strict=True,
        ):
            times = numbers([asked, done], 6)
            items.append([row, *times, int(source), bool(merged), *numbers([size / 1e6])])
    return {
        "kind": "spans",
        "key": "transfers",
        "title": "Knowledge transfers",
        "says": "From the asking to the end of each transfer. The number is the worker whose weights came; a full bar "
        "merged them, an empty one did not." + _cut(run),
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
        text = (
            f"The median of {len(run.ranks)} workers, and {BAND}; each worker's values are {text[0].lower()}{text[1:]}"
        )
    return text


def _band(run: Run) -> str:
    return BAND if run.workers > EACH else ""


def _cut(run: Run) -> str:
    return f" The first {ROWS} of {run.workers} workers." if run.workers > ROWS else ""
