"""Drive a worker's loop in real time: compute over batches, wait for messages."""

from __future__ import annotations

import time
from collections.abc import Callable

from dlion_mpi.loop import compute
from dlion_mpi.loop.ports import Compute, Computed, Loop, Replica
from dlion_mpi.microcloud.environments import PaceClock
from dlion_mpi.mpi.exchange import Exchange


def drive(loop: Loop, *, replica: Replica, exchange: Exchange, pace: PaceClock | None) -> None:
    """Run the loop to its end. ``pace``: the machine to emulate, if any."""
    now_s, progress = exchange.clock.now_s, exchange.progress
    answer: Computed | None = None
    while True:
        try:
            request = loop.send(answer)
        except StopIteration:
            return
        progress.check()
        if isinstance(request, Compute):
            answer = _compute(request, replica, now_s, pace)
            progress.computed(answer.seconds)
        else:
            progress.wait_until(request.ask, ask_s=request.deadline_s - now_s())
            answer = None


def _compute(request: Compute, replica: Replica, now_s: Callable[[], float], pace: PaceClock | None) -> Computed:
    started_s = now_s()
    found = compute.answer(request, replica)
    paced_s = 0.0
    if pace is not None:
        paced_s = max(0.0, pace.seconds(request.samples, started_s) - (now_s() - started_s))
        time.sleep(paced_s)
    return Computed.of(found, now_s() - started_s, paced_s)
