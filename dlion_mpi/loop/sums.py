"""Sums over all workers."""

from __future__ import annotations

from collections.abc import Generator

from dlion_mpi.loop.ports import Until
from dlion_mpi.loop.worker import Worker
from dlion_mpi.metrics.timeline import Phase
from dlion_mpi.vector.layout import Vector

SUM = "sum"


def total(w: Worker, share: Vector | None) -> Generator[Until, None, Vector | None]:
    """The sum of everyone's shares, or None if this worker or another has none: then all end before this step."""
    assert w.reduce is not None
    with w.timed(Phase.WAIT):
        w.reductions += 1
        ticket = w.reduce(share)
        if not ticket.done:
            yield Until(lambda: ticket.done)
    if len(ticket.vector):
        return ticket.vector
    w.end_step = min(w.end_step, w.step)
    return None
