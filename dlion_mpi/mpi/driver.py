"""Drive a worker's loop in real time: compute over batches, wait for messages."""

from __future__ import annotations

import time

from dlion_mpi.errors import Stalled
from dlion_mpi.loop import compute
from dlion_mpi.loop.ports import Compute, Computed, Loop, Replica, Until
from dlion_mpi.microcloud.environments import PaceClock
from dlion_mpi.mpi.exchange import Exchange


def drive(loop: Loop, *, replica: Replica, exchange: Exchange, pace: PaceClock | None) -> None:
    """Run the loop to its end. ``pace``: the machine to emulate, if any."""
    now_s = exchange.clock.now_s
    request = advance(loop, None, exchange)
    while request is not None:
        started_s = now_s()
        found = compute.answer(request, replica)
        paced_s = slow_down(pace, request.samples, started_s, now_s() - started_s)
        answer = Computed.of(found, now_s() - started_s, paced_s)
        request = advance(loop, answer, exchange)


def advance(loop: Loop, answer: Computed | None, exchange: Exchange) -> Compute | None:
    """Run the loop to its next request to compute, waiting as it asks. Returns None at its end.

    Raises Stalled for a wait that lasts too long; the loop is then closed.
    """
    if answer is not None:
        exchange.progress.computed(answer.seconds)
    while True:
        try:
            request = loop.send(answer)
        except StopIteration:
            return None
        exchange.progress.check()
        if isinstance(request, Compute):
            return request
        if not request.ask():
            _wait(loop, request, exchange)
        answer = None


def _wait(loop: Loop, request: Until, exchange: Exchange) -> None:
    try:
        with exchange.stall.waiting() as look:
            exchange.progress.wait_until(
                lambda: request.ask() or look(), ask_s=request.deadline_s - exchange.clock.now_s()
            )
    except Stalled:
        loop.close()
        raise


def slow_down(pace: PaceClock | None, samples: int, started_s: float, seconds: float) -> float:
    """Sleep until ``samples`` have taken as long as on the emulated machine. Returns the seconds slept."""
    paced_s = 0.0 if pace is None else max(0.0, pace.seconds(samples, started_s) - seconds)
    if paced_s:
        time.sleep(paced_s)
    return paced_s
