"""Sums over all workers, as a strategy asks for them."""

from __future__ import annotations

from collections.abc import Generator

from dlion_mpi.loop.ports import Until
from dlion_mpi.loop.worker import Worker
from dlion_mpi.metrics.timeline import Phase
from dlion_mpi.strategies.types import Effect, Sum, Sums
from dlion_mpi.vector.layout import Vector

SUM = "sum"
"""The channel of the sums; see `mpi/collectives.py`."""


def effect_of(w: Worker, answer: Effect | Sums[Effect | None] | None) -> Generator[Until, None, Effect | None]:
    """Compute the sums that a strategy's answer asks for, and return its effect. None if a worker has ended.

    Raises TypeError for sums that `Strategy.sums` does not see, because no worker could end them.
    """
    if isinstance(answer, Generator):
        if not w.strategy.sums():
            raise TypeError(
                f"strategy {w.strategy.name}: a method that asks for sums must be a generator itself, not return one"
            )
        try:
            request = next(answer)
            while True:
                vector = yield from _sum(w, request)
                if vector is None:
                    answer.close()
                    return None
                request = answer.send(vector)
        except StopIteration as stop:
            return stop.value or Effect()
    return answer or Effect()


def _sum(w: Worker, request: Sum) -> Generator[Until, None, Vector | None]:
    """Sum the vectors of all workers. Returns None if a worker has ended; then no worker gets another sum."""
    if not len(request.vector):
        return request.vector
    with w.timed(Phase.WAIT):
        ticket = w.reduce(request.vector, request.value_type)
        if not ticket.done:
            yield Until(lambda: ticket.done)
    if not len(ticket.vector):
        w.summing = False
        return None
    w.summed_step = w.step
    return ticket.vector
