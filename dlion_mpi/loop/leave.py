"""The end of a run: all workers leave together, so that nothing is cut off, and with equal weights."""

from __future__ import annotations

import math
from collections.abc import Generator
from functools import partial

import numpy as np

from dlion_mpi.loop.exchange import finish_encoding
from dlion_mpi.loop.ports import Loop, Until
from dlion_mpi.loop.worker import Worker
from dlion_mpi.metrics.timeline import Phase
from dlion_mpi.wire import Kind

CLOSING = "closing"
LACKING = "lacking"


def leave(w: Worker) -> Loop:
    """Leave the run in order.

    First every worker reports that it has ended and how many rounds it has joined, and joins those that it missed. Then
    no worker sends, so the messages in flight can be counted and drained. Then all workers get equal weights.
    After that no rank needs another one. If the strategy sums, every worker joins a last sum without a vector, which
    shows a worker that waits in a sum that this one has left.
    """
    yield from finish_encoding(w)
    with w.timed(Phase.LEAVE):
        serve = partial(_serve, w)
        w.links.announce(Kind.STOP if w.stop_reason else Kind.CLOSE, w.stamp())
        last_sum = w.reduce(None) if w.summing else None
        if w.checkpoints is not None:
            checkpoints = w.checkpoints
            yield Until(lambda: checkpoints.over, serve)
        ended = w.collectives.gather(CLOSING, _rounds(w))
        yield Until(lambda: ended.done and (last_sum is None or last_sum.done), serve)
        rounds_of_batch_sizes, rounds_of_knowledge, rounds_of_averages, rounds_of_epochs = (
            int(most) for most in ended.table.max(axis=0)
        )
        w.batch_sizes.leave(rounds_of_batch_sizes)
        w.averages.leave(rounds_of_averages)
        if w.epochs is not None:
            w.epochs.leave(rounds_of_epochs)
        if w.knowledge.started < rounds_of_knowledge:
            yield Until(lambda: not w.knowledge.gathering, serve)
            w.knowledge.leave(rounds_of_knowledge)
        yield Until(lambda: _is_settled(w), serve)
        sent = w.collectives.gather(CLOSING, w.links.fall_silent())
        yield Until(lambda: sent.done, serve)
        expected = [int(count) for count in sent.table[:, w.rank]]
        yield Until(lambda: w.links.received_counts() == expected, serve)
        _serve(w)
        yield from _equalise(w)


def _equalise(w: Worker) -> Generator[Until, None, None]:
    """Leave out what was applied ahead of all peers. Bring all workers to equal weights, if none was interrupted."""
    ahead = None if w.alone else w.strategy.ahead(w.state)
    if ahead is not None:
        w.replica.move(-ahead)
    lacking = w.strategy.lacking(w.state) if w.exit_code == 0 and not w.alone else None
    if lacking is not None:
        lacking += w.replica.weights()
    complete = lacking is not None and bool(np.isfinite(lacking).all())
    drained = w.collectives.gather(CLOSING, [float(complete)])
    yield Until(lambda: drained.done)
    if drained.table.all():
        total = w.collectives.reduce(LACKING, lacking)
        yield Until(lambda: total.done)
        w.replica.set_weights(total.vector / np.float32(len(drained.table)))


def _rounds(w: Worker) -> list[float]:
    """The number of rounds of each kind that this worker has taken part in."""
    rounds = [w.batch_sizes.started, w.knowledge.started, w.averages.started]
    return [*rounds, 0 if w.epochs is None else w.epochs.started]


def _is_settled(w: Worker) -> bool:
    """Whether no round is in progress."""
    usual = w.batch_sizes.settled() and w.knowledge.settled() and w.averages.settled()
    return usual and (w.epochs is None or w.epochs.settled())


def _serve(w: Worker) -> None:
    """Serve the workers that have not ended: apply what arrives, continue a knowledge transfer."""
    w.collect()
    if w.checkpoints is None or w.checkpoints.over:
        movement = w.strategy.late(w.state, w.inbox.take(math.inf))
        if movement is not None:
            w.replica.move(movement)
    else:  # what has arrived belongs to the last checkpoint
        w.checkpoints.serve(w)
    w.knowledge.serve(w.replica.knowledge)
