"""Snapshot of a worker between two steps as named arrays, and its restoration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dlion_mpi.loop.links import LinkTotals
from dlion_mpi.loop.worker import History, Worker
from dlion_mpi.metrics.names import column_of, metric_of
from dlion_mpi.metrics.records import Evaluation
from dlion_mpi.vector.layout import Entries
from dlion_mpi.vector.named_arrays import (
    Array,
    Arrays,
    StateError,
    array,
    column,
    integer,
    integers,
    number,
    numbers,
    part,
    under,
)
from dlion_mpi.wire import Header, Kind, Message

HEADER = ("sender", "step", "lbs", "gbs")
COLUMNS = 1 + len(HEADER) + 2
"""Columns of a saved message: kind, the header fields above, number of entries, whether it is dense."""


def take(w: Worker, spare: Arrays) -> Arrays:
    """Copy all state that the worker needs to resume at step ``w.step``; `restore` is the inverse.

    ``spare``: arrays of an earlier snapshot, reused where they fit, because new memory costs more than copying.
    """
    strategy = under("strategy", w.strategy.to_arrays(w.state))
    return {
        **{name: _copy(value, spare.get(name)) for name, value in strategy.items()},
        **under("worker", _progress(w)),
        **under("model", w.replica.to_arrays()),
        **under("data", integers(**w.batches.state())),
        **under("status", w.batch_sizes.to_arrays()),
        **under("transfer", w.knowledge.to_arrays()),
        **under("averages", w.averages.to_arrays()),
        **under("epochs", {} if w.epochs is None else w.epochs.to_arrays()),
    }


def _copy(value: Array, place: Array | None) -> Array:
    if place is None or place.shape != value.shape or place.dtype != value.dtype:
        return np.array(value, order="C")
    np.copyto(place, value)
    return place


def _progress(w: Worker) -> Arrays:
    history = w.history
    return {
        **integers(step=w.step),
        **w.budget.to_arrays(),
        **numbers(time_s=w.now_s(), step_s=history.step_s, evaluated_s=history.evaluated_s),
        **under("totals", history.totals.to_arrays()),
        **under("evaluations", _tests(history.evaluations)),
        **under("links", {str(peer): _totals(total) for peer, total in w.links.totals().items()}),
    }


def _tests(evaluations: Sequence[Evaluation]) -> Arrays:
    """The evaluations so far by column. All have the metrics of the latest; NaN where an earlier one lacks one."""
    metrics = evaluations[-1].metrics if evaluations else ()
    return {
        "step": column([e.step for e in evaluations]),
        "time_s": column([e.time_s for e in evaluations]),
        **under("metrics", {column_of(m): column([e.metrics.get(m, math.nan) for e in evaluations]) for m in metrics}),
    }


def _totals(total: LinkTotals) -> Array:
    return np.array([total.bytes_sent, total.bytes_received], np.int64)


def mail(messages: Sequence[Message]) -> Arrays:
    """Pack received messages that have not been applied yet."""
    headers = [
        [int(m.header.kind), *(getattr(m.header, name) for name in HEADER), len(m.entries), m.entries.indices is None]
        for m in messages
    ]
    numbers = [[m.header.quality, m.header.computed_at] for m in messages]
    sparse = [m.entries.indices for m in messages if m.entries.indices is not None]
    return under(
        "inbox",
        {
            "headers": np.array(headers, np.int64).reshape(-1, COLUMNS),
            "numbers": np.array(numbers, np.float64).reshape(-1, 2),
            "values": np.concatenate([np.empty(0, np.float32), *(m.entries.values for m in messages)]),
            "indices": np.concatenate([np.empty(0, np.uint32), *sparse]),
        },
    )


def messages_of(arrays: Mapping[str, Array], size: int, ranks: int) -> list[Message]:
    """Unpack the messages of `mail` for a vector of ``size`` entries. Raises StateError."""
    headers = array(arrays, "inbox/headers", np.int64, None, COLUMNS)
    numbers = array(arrays, "inbox/numbers", np.float64, len(headers), 2)
    kinds, senders, counts, dense = headers[:, 0], headers[:, 1], headers[:, -2], headers[:, -1].astype(bool)
    known = np.isin(kinds, [Kind.GRADIENT, Kind.WEIGHTS]) & (senders >= 0) & (senders < ranks)
    if not (known & (counts >= 0) & (counts <= size) & (~dense | (counts == size))).all():
        raise StateError("inbox/headers has a message that does not belong to this run")
    values = array(arrays, "inbox/values", np.float32, int(counts.sum()))
    indices = array(arrays, "inbox/indices", np.uint32, int(counts[~dense].sum()))
    found, value_at, index_at = [], 0, 0
    for header, (quality, computed_at), count, whole in zip(headers, numbers, counts, dense, strict=True):
        places = None if whole else indices[index_at : index_at + count]
        if places is not None and count and (int(places[-1]) >= size or (places[1:] <= places[:-1]).any()):
            raise StateError("inbox/indices are not ascending entries of the gradient")
        fields = dict(zip(HEADER, header[1:-2].tolist(), strict=True))
        kind = Kind(int(header[0]))
        made = Header(
            kind=kind,
            epoch=0,
            sequence=0,
            acknowledged=0,
            quality=float(quality),
            computed_at=float(computed_at),
            **fields,
        )
        found.append(Message(made, Entries(size, values[value_at : value_at + count], places)))
        value_at += count
        index_at += 0 if whole else count
    return found


def step_of(arrays: Mapping[str, Array]) -> int:
    """Step at which the worker resumes."""
    return integer(arrays, "worker/step")


def time_of(arrays: Mapping[str, Array]) -> float:
    """Seconds from the start of the run to the snapshot."""
    return number(arrays, "worker/time_s")


def restore(w: Worker, arrays: Mapping[str, Array], steps: Mapping[int, int]) -> None:
    """Set a new worker to the state of its snapshot.

    ``steps``: by rank, the step at which it resumes. Raises StateError, or UserError for different data.
    """
    size, ranks = w.replica.layout.size, len(w.members)
    data = part(arrays, "data")
    w.batches.restore({name: integer(data, name) for name in data})
    w.replica.from_arrays(part(arrays, "model"))
    w.strategy.from_arrays(w.state, part(arrays, "strategy"))
    _restore_progress(w, part(arrays, "worker"))
    w.inbox.newest = {peer: steps[peer] - 1 for peer in w.peers}
    w.inbox.held = messages_of(arrays, size, ranks)
    w.batch_sizes.from_arrays(part(arrays, "status"), max(steps.values()))
    w.knowledge.from_arrays(part(arrays, "transfer"), w.replica.knowledge)
    w.averages.from_arrays(part(arrays, "averages"))
    _restore_epochs(w, arrays)


def _restore_epochs(w: Worker, arrays: Mapping[str, Array]) -> None:
    if w.epochs is not None:
        w.epochs.from_arrays(part(arrays, "epochs"))


def _restore_progress(w: Worker, saved: Mapping[str, Array]) -> None:
    w.step = integer(saved, "step")
    w.budget.from_arrays(saved)
    w.history = History(
        evaluations=list(evaluations_of(saved)),
        evaluated_s=number(saved, "evaluated_s"),
        step_s=number(saved, "step_s"),
    )
    w.history.totals.from_arrays(part(saved, "totals"))


def restore_elsewhere(w: Worker, arrays: Mapping[str, Array]) -> None:
    """Resume from another worker's snapshot: its model, optimizer and step, with this worker's data and links.

    Timings, residuals and received messages belong to the old ranks and are dropped.
    """
    w.replica.from_arrays(
        part(arrays, "model"), generators=False
    )  # with equal generators all workers would drop the same units
    w.step = integer(arrays, "worker/step")
    w.budget.exchanged_step = w.step
    w.history.evaluated_s = number(arrays, "worker/evaluated_s")
    w.inbox.newest = dict.fromkeys(w.peers, w.step - 1)
    w.history.evaluations.extend(evaluations_of(part(arrays, "worker")))
    _restore_epochs(w, arrays)


def evaluations_of(saved: Mapping[str, Array]) -> Iterable[Evaluation]:
    """Return the evaluations so far. Raises StateError."""
    found = part(saved, "evaluations")
    steps = array(found, "step", np.float64, None)
    times = array(found, "time_s", np.float64, len(steps))
    metrics = part(found, "metrics")
    columns = {metric_of(name): array(metrics, name, np.float64, len(steps)).tolist() for name in metrics}
    return [
        Evaluation(int(step), float(time_s), {name: values[row] for name, values in columns.items()})
        for row, (step, time_s) in enumerate(zip(steps, times, strict=True))
    ]


def links_of(arrays: Mapping[str, Array]) -> dict[int, tuple[int, int]]:
    """Return (bytes sent, bytes received) by peer. Raises StateError."""
    found = part(arrays, "worker/links")
    totals = {int(peer): array(found, peer, np.int64, 2) for peer in found}
    return {peer: (int(sent), int(received)) for peer, (sent, received) in totals.items()}
