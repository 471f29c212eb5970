"""The main path: a worker's loop, written once.

`train` is a generator. It yields what it waits for (`Compute` a gradient, `Until` something has arrived), and
what drives it waits in real time (`mpi/driver.py`) or advances a virtual clock. Everything else happens at once.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping, Sequence

import numpy as np

from dlion_mpi.errors import RunError
from dlion_mpi.loop.batch_sizes import StatusRounds
from dlion_mpi.loop.exchange import is_quiet, local_gradient, post, quiet, send_first, settle
from dlion_mpi.loop.knowledge import KnowledgeRounds
from dlion_mpi.loop.ports import Compute, Computed, Loop, Until
from dlion_mpi.loop.worker import Timings, Worker
from dlion_mpi.metrics.records import StepRecord, Transfer
from dlion_mpi.metrics.timeline import Phase
from dlion_mpi.vector.layout import Vector
from dlion_mpi.wire import Kind

CLOSING, SUM = "closing", "sum"
CHANNELS = (StatusRounds.channel, KnowledgeRounds.channel, CLOSING, SUM)
"""The collectives' channels; see `mpi/collectives.py`."""
SMOOTHING = 0.2
"""Weight of the newest step in the running mean of step times."""


def train(w: Worker) -> Loop:
    """Train until the run ends: compute, post, complete, and now and then tell the others how it goes.

    The exchange of a step overlaps the computing of the next wherever the synchronisation mode and the strategy's
    patience let a worker go on. Raises RunError for a loss or gradient that is not finite, before it
    could reach a peer.
    """
    if w.status.adapts and not w.status.fit.pairs:  # a resumed worker knows its machine
        yield from profile(w)
    w.moved_cpu_s = w.links.cpu_s()  # what was moved so far is nobody's exchange
    while not w.ended():
        w.midway = True
        timings = Timings(w.now_s(), w.status.lbs, w.status.gbs)
        sent = send_first(w, timings)
        computed = yield from compute(w, timings)
        if computed.gradient is not None:
            sent |= yield from post(w, computed, timings)
            yield from wait(w, timings, sent)
            yield from wait_for_shares(w, timings)
            if w.cut_short():
                break
            ages = yield from complete(w, computed, timings)
            if ages is None:
                break
        else:
            ages = {}
        yield from converse(w, computed, timings)
        finish_step(w, computed, timings, sent, ages)
        if w.checkpoints is not None:
            yield from w.checkpoints.advance(w)
    yield from settle(w, Timings(w.now_s(), 0, 0))
    yield from leave(w)


def profile(w: Worker) -> Loop:
    """Time two batch sizes before the first step, so that the first step is already balanced.

    Small ones, since everyone waits for the slowest worker's timings.
    """
    start_s = w.now_s()
    for size in (max(1, w.config.lbs // 8), max(1, w.config.lbs // 2)):
        for attempt in range(2):
            computed = yield Compute(w.batches.take(size), size)
            assert computed is not None
            if attempt:  # the first of a size pays for allocation
                w.status.fit.add(size, computed.seconds)
    yield from w.status.first(w.step)
    w.recorder.span(Phase.PROFILE, w.step, start_s, w.now_s())


def compute(w: Worker, timings: Timings) -> Generator[Compute, Computed | None, Computed]:
    """The local gradient of this step, known to be finite or replaced by zero (``--non-finite skip``)."""
    computed = yield Compute(w.batches.take(w.status.lbs), w.status.lbs, w.alone)
    assert computed is not None
    timings.compute_s, timings.paced_s = computed.seconds, computed.paced_s
    now_s = w.now_s()
    w.recorder.span(Phase.COMPUTE, w.step, now_s - computed.seconds, now_s)
    if computed.finite:
        return computed
    if w.config.non_finite == "stop":
        raise RunError(
            f"rank {w.rank}, step {w.step}: the loss is {computed.loss:g} or its gradient is not finite; "
            "lower --learning-rate, or leave such gradients out with --non-finite skip"
        )
    zero = None if computed.gradient is None else np.zeros_like(computed.gradient)
    return Computed(computed.loss, zero, True, computed.seconds, computed.paced_s)


def wait(w: Worker, timings: Timings, sent: dict[int, float]) -> Generator[Until, None, None]:
    """Until the synchronisation mode lets this step be completed, and a little longer for the peers' gradients of this
    same step (``--patience``). ``sent``: of this step, for what goes meanwhile."""
    start_s, cpu_s = w.now_s(), w.links.cpu_s()
    sending_s, decoding_s = timings.select_encode_s, w.decoding_s
    patient_until_s = start_s + (w.config.patience or 0.0) * timings.compute_s

    def ready() -> bool:
        if w.may_complete() and (w.cut_short() or w.is_fresh() or w.now_s() >= patient_until_s):
            return True
        sent.update(send_first(w, timings, waiting=True))  # a link that was busy when the step began may be free now
        is_quiet(w)  # what fails there must not be waited for
        return False

    if not ready():
        yield Until(ready, patient_until_s)
    now_s = w.now_s()
    w.recorder.span(Phase.WAIT, w.step, start_s, now_s)
    decoding_s = w.decoding_s - decoding_s
    timings.wait_s = now_s - start_s - (timings.select_encode_s - sending_s) - decoding_s
    timings.apply_s += decoding_s  # of what came meanwhile
    w.moved_cpu_s += w.links.cpu_s() - cpu_s  # while the loop waits, moving messages disturbs no computing


def wait_for_shares(w: Worker, timings: Timings) -> Generator[Until, None, None]:
    """Until the shares of the batch are here that everyone takes after this step, or somebody has left."""

    def ready() -> bool:
        is_quiet(w)
        w.collect()
        return w.cut_short() or w.members.epoch > 0 or not w.status.awaits(w.step + 1)

    if ready():
        return
    start_s, cpu_s, decoding_s = w.now_s(), w.links.cpu_s(), w.decoding_s
    yield Until(ready)
    now_s = w.now_s()
    w.recorder.span(Phase.AGREE, w.step, start_s, now_s)
    decoding_s = w.decoding_s - decoding_s
    timings.wait_s += now_s - start_s - decoding_s
    timings.apply_s += decoding_s
    w.moved_cpu_s += w.links.cpu_s() - cpu_s


def complete(
    w: Worker, computed: Computed, timings: Timings
) -> Generator[Until, None, dict[int, list[tuple[float, int]]] | None]:
    """Weigh what has arrived, update the replica. Returns the ages (seconds, steps) of what was applied.

    None if it takes a sum over all workers, and one of them has ended.
    """
    start_s, start_cpu_s, waited_s = w.now_s(), w.cpu_s(), timings.wait_s
    messages = w.inbox.take(w.step if w.config.mode.lockstep else math.inf)
    w.state, effect = w.strategy.incoming(w.state, local_gradient(w, computed), w.replica.weights, messages)
    w.exchange_cpu_s += w.cpu_s() - start_cpu_s
    gradient = effect.gradient
    if effect.share is not None:
        gradient = yield from total(w, effect.share, timings)
        if gradient is None:
            return None
    if effect.weights is not None:
        w.replica.set_weights(effect.weights)
    if gradient is not None:
        w.replica.apply(gradient)
    ages: dict[int, list[tuple[float, int]]] = {}
    for header in (message.header for message in messages):
        ages.setdefault(header.sender, []).append((start_s - header.computed_at, w.step - header.step))
        w.recorder.applied(header, w.step, start_s)
    now_s = w.now_s()
    w.recorder.span(Phase.APPLY, w.step, start_s, now_s)
    timings.apply_s += now_s - start_s - (timings.wait_s - waited_s)
    w.skipped = effect.skipped
    w.step += effect.skipped
    return ages


def total(w: Worker, share: Vector | None, timings: Timings) -> Generator[Until, None, Vector | None]:
    """The sum of everyone's shares, or None if this worker or another has none: then all end before this step."""
    assert w.reduce is not None
    start_s = w.now_s()
    w.reductions += 1
    ticket = w.reduce(share)
    if not ticket.done:
        yield Until(lambda: ticket.done)
    now_s = w.now_s()
    w.recorder.span(Phase.WAIT, w.step, start_s, now_s)
    timings.wait_s += now_s - start_s
    if len(ticket.vector):
        return ticket.vector
    w.end_step = min(w.end_step, w.step)
    return None


def converse(w: Worker, computed: Computed, timings: Timings) -> Generator[Until, None, None]:
    """What is not the gradient: evaluations, batch sizes, knowledge."""
    step = w.step + 1  # steps done, as schedules and periods count them
    for evaluation in w.evaluator.poll():
        w.evaluations.append(evaluation)
        w.recorder.evaluation(evaluation)
        w.status.accuracy = evaluation.accuracy
    if _evaluation_due(w, step):
        w.evaluated_s = w.now_s()
        w.evaluator.submit(step, w.now_s(), w.replica.knowledge())
    w.recent_losses.append(computed.loss)
    w.status.observe(timings.lbs, computed.seconds)
    w.knowledge.observe(computed.loss)
    yield from _agree(w, w.status.advance(step, w.skipped))
    if w.status.target_reached:
        w.end("target accuracy reached")
    asked = w.knowledge.started
    for event in w.knowledge.advance(step, w.replica.knowledge, w.replica.set_knowledge):
        if isinstance(event, Transfer):
            now_s = w.now_s()
            w.recorder.transfer(event, now_s)
            w.recorder.span(Phase.TRANSFER, event.started_step, w.transfer_asked_s, now_s)
        else:
            yield from _agree(w, [event])
    if w.knowledge.started > asked:
        w.transfer_asked_s = w.now_s()


def _agree(w: Worker, waits: Iterable[Until]) -> Generator[Until, None, None]:
    """Wait for what everyone's word is needed for."""
    for until in waits:
        start_s = w.now_s()
        yield until
        w.recorder.span(Phase.AGREE, w.step, start_s, w.now_s())


def _evaluation_due(w: Worker, step: int) -> bool:
    every = w.config.evaluate_every
    if every.steps is not None:
        return step % every.steps <= w.skipped and w.evaluator.pending() <= 1  # at most one snapshot waits
    # By the clock, a slow evaluation delays the next one.
    return not w.evaluator.pending() and w.now_s() - w.evaluated_s >= (every.seconds or math.inf)


def finish_step(
    w: Worker,
    computed: Computed,
    timings: Timings,
    sent: Mapping[int, float],
    ages: Mapping[int, Sequence[tuple[float, int]]],
) -> None:
    """Record the step, learn from its timings, count it."""
    totals = w.links.totals()
    now_s = w.now_s()
    step_s = now_s - timings.started_s
    record = StepRecord(
        step=w.step,
        time_s=now_s,
        compute_s=timings.compute_s,
        paced_s=timings.paced_s,
        select_encode_s=timings.select_encode_s,
        wait_s=timings.wait_s,
        apply_s=timings.apply_s,
        step_s=step_s,
        loss=computed.loss,
        lbs=timings.lbs,
        gbs=timings.gbs,
        mpi_cpu_s=w.links.cpu_s(),
        quality=sent,
        bytes_sent={peer: t.bytes_sent for peer, t in totals.items()},
        bytes_received={peer: t.bytes_received for peer, t in totals.items()},
        bytes_per_s={peer: t.bytes_per_s for peer, t in totals.items()},
        age_s={peer: sum(age for age, _ in a) / len(a) for peer, a in ages.items()},
        age_steps={peer: sum(age for _, age in a) / len(a) for peer, a in ages.items()},
    )
    w.recorder.step(record)
    w.on_step(record)
    w.spent.add(timings)
    # Without the waiting: else large messages would make steps long, and long steps would pay for large messages.
    w.step_s = _running_mean(w.step_s, step_s - timings.wait_s)
    w.step += 1
    w.midway = False


def _running_mean(mean: float, value: float) -> float:
    return mean + SMOOTHING * (value - mean) if mean else value


def leave(w: Worker) -> Loop:
    """Leave together, so that nobody's message, collective or knowledge transfer is cut off half-way.

    First everyone says that it has ended and which rounds it took part in; who missed a round that others have
    started takes part now. Then nobody sends any more, so the messages that are still under way can be counted
    and waited for. After that no rank has anything left to do for another. Where gradients are summed, the others
    learn from the sum that this worker is not in it.
    """
    start_s = w.now_s()
    yield from quiet(w)
    if w.reduce is not None and w.reductions < w.end_step:
        yield from total(w, None, Timings(w.now_s(), 0, 0))
    w.links.announce(Kind.STOP if w.stop_reason else Kind.CLOSE, w.stamp())
    if w.checkpoints is not None:
        checkpoints = w.checkpoints
        yield Until(lambda: _keep_moving(w) and checkpoints.over)
    ended = w.collectives.gather(CLOSING, [w.status.started, w.knowledge.started])
    yield Until(lambda: _keep_moving(w) and ended.done)
    status_rounds, knowledge_rounds = ended.table.max(axis=0)
    w.status.leave(int(status_rounds))
    if w.knowledge.started < knowledge_rounds:
        yield Until(lambda: _keep_moving(w) and not w.knowledge.gathering)
        w.knowledge.leave(int(knowledge_rounds))
    yield Until(lambda: _keep_moving(w) and w.status.settled() and w.knowledge.settled(w.replica.knowledge))
    sent = w.collectives.gather(CLOSING, w.links.fall_silent())
    yield Until(lambda: _keep_moving(w) and sent.done)
    expected = [int(count) for count in sent.table[:, w.rank]]
    yield Until(lambda: _keep_moving(w) and w.links.received_counts() == expected)
    drained = w.collectives.gather(CLOSING, [0.0])
    yield Until(lambda: drained.done)
    w.recorder.span(Phase.LEAVE, w.step, start_s, w.now_s())


def _keep_moving(w: Worker) -> bool:
    """Go on serving those who have not ended: empty the inbox, move a knowledge transfer on."""
    w.collect()
    if w.checkpoints is None or w.checkpoints.over:
        w.inbox.held.clear()
    else:  # what has come belongs to the last checkpoint
        w.checkpoints.serve(w)
    w.knowledge.settled(w.replica.knowledge)
    return True
