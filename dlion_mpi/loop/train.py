"""The main path: the training loop of one worker.

`train` is a generator. It yields what it waits for: `Compute` over a batch, or `Until` something has arrived. A driver
waits for that in real time (`mpi/driver.py`) or advances a virtual clock (`simulation/driver.py`). Everything else
happens at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from functools import partial

import numpy as np

from dlion_mpi.algorithms.lengths import sampled
from dlion_mpi.errors import RunError
from dlion_mpi.loop.averages import AverageRounds
from dlion_mpi.loop.batch_sizes import BatchSizeRounds
from dlion_mpi.loop.exchange import encodes_in_background, finish_encoding, is_encoded, post, post_weights
from dlion_mpi.loop.knowledge import KnowledgeRounds
from dlion_mpi.loop.leave import CLOSING, LACKING, leave
from dlion_mpi.loop.ports import Compute, Computed, Loop, Until
from dlion_mpi.loop.step import Step
from dlion_mpi.loop.sums import SUM, effect_of
from dlion_mpi.loop.worker import Worker
from dlion_mpi.metrics.records import StepRecord, Transfer
from dlion_mpi.metrics.timeline import Phase
from dlion_mpi.strategies.types import Effect, LocalUpdate
from dlion_mpi.vector.layout import Vector

CHANNELS = (BatchSizeRounds.channel, KnowledgeRounds.channel, AverageRounds.channel, CLOSING, LACKING, SUM)
"""The channels of the collectives; see `mpi/collectives.py`."""
SMOOTHING = 0.2
"""Weight of the newest step in the running mean of step times."""


def train(w: Worker) -> Loop:
    """Train until the run ends.

    A step has three phases: compute the local update and post what each link can carry of it; wait for the peers as
    long as the synchronisation mode and the strategy's patience ask for; complete the step with what has arrived.

    Raises RunError for a loss or update that is not finite, before it could reach a peer.
    """
    if w.profiles and w.batch_sizes.needs_profile():
        yield from profile(w)
    w.budget.start()
    while not w.ended():
        w.current = Step(w.now_s(), w.batch_sizes.lbs, w.batch_sizes.gbs)
        if w.epochs is not None:
            w.epochs.batch_begin(w)
        post_weights(w)
        computed = yield from compute(w)
        if computed.vector is not None:
            local = LocalUpdate(
                vector=computed.vector,
                step=w.step,
                lbs=w.current.lbs,
                gbs=w.current.gbs,
                shortened=w.averages.shortened,
            )
            yield from post(w, local, computed)
            yield from wait_for_peers(w)
            yield from wait_for_batch_sizes(w)
            if w.cut_short():
                movement = w.strategy.unfinished(w.state, local)
                if movement is not None:
                    w.replica.move(movement)
                break
            completed = yield from complete(w, local)
            if not completed:
                break
        yield from average(w, computed)
        yield from rebalance_test_and_transfer(w, computed)
        samples = w.current.lbs
        finish_step(w, computed)
        if w.epochs is not None:
            yield from w.epochs.advance(w, computed, samples)
        if w.checkpoints is not None:
            yield from w.checkpoints.advance(w)
    yield from leave(w)


def profile(w: Worker) -> Loop:
    """Time two batch sizes, so that the first step is already balanced.

    The sizes are small, because all workers wait for the timings of the slowest one. The replica stays as it is.
    """
    replica = w.replica.to_arrays()
    with w.timed(Phase.PROFILE):
        for size in (max(1, w.config.batch_size // 8), max(1, w.config.batch_size // 2)):
            for attempt in range(2):
                computed = yield Compute(w.batches.take(size), size, w.strategy.exchanges)
                assert computed is not None
                if attempt:  # the first of a size also pays for allocation
                    w.batch_sizes.fit.add(size, computed.seconds)
        w.replica.from_arrays(replica)
        yield from w.batch_sizes.first(w.step)


def compute(w: Worker) -> Generator[Compute, Computed | None, Computed]:
    """Compute the local update, or replace one that is not finite by zero (``--non-finite skip``)."""
    assert w.current is not None
    kind = "alone" if w.alone else w.strategy.exchanges
    computed = yield Compute(w.batches.take(w.current.lbs), w.current.lbs, kind)
    assert computed is not None
    w.current.compute_s, w.current.paced_s = computed.seconds, computed.paced_s
    if computed.samples is not None:
        w.current.use(computed.samples)
    now_s = w.now_s()
    w.recorder.span(Phase.COMPUTE, w.step, now_s - computed.seconds, now_s)
    if computed.finite:
        return computed
    if w.config.non_finite == "stop":
        raise RunError(
            f"rank {w.rank}, step {w.step}: the loss is {computed.loss:g} or its gradient is not finite; "
            "lower --learning-rate, or leave such gradients out with --non-finite skip"
        )
    zero = None if computed.vector is None else np.zeros_like(computed.vector)
    return replace(computed, vector=zero, finite=True)


def wait_for_peers(w: Worker) -> Generator[Until, None, None]:
    """Wait until the mode lets this step be completed, and then for the peers' gradients of this same step if they can
    be in time, as long as recent ones took and ``--patience`` allows."""
    patient_until_s = w.patient_until_s()

    def receive() -> None:
        w.collect()
        if not ready():
            post_weights(w, waiting=True)  # a link that was busy when the step began may be free now
            is_encoded(w)  # raises what failed there: it must not be waited for

    def ready() -> bool:
        return w.may_complete() and (w.cut_short() or w.is_fresh() or w.now_s() >= patient_until_s)

    with w.timed(Phase.WAIT), w.budget.idle():
        receive()
        if not ready():
            yield Until(ready, receive, patient_until_s)


def wait_for_batch_sizes(w: Worker) -> Generator[Until, None, None]:
    """Wait until the batch sizes for the next step have arrived, or a rank has left."""

    def receive() -> None:
        is_encoded(w)
        w.collect()

    def ready() -> bool:
        return w.cut_short() or w.members.epoch > 0 or not w.batch_sizes.awaits(w.step + 1)

    receive()
    if not ready():
        with w.timed(Phase.WAIT, span=Phase.AGREE), w.budget.idle():
            yield Until(ready, receive)


def complete(w: Worker, local: LocalUpdate) -> Generator[Until, None, bool]:
    """Update the replica with what has arrived. Returns False if that takes a sum and a worker has ended."""
    assert w.current is not None
    with w.timed(Phase.APPLY) as scope:
        with w.budget.charged():
            messages = w.inbox.take(w.step if w.config.mode.lockstep else math.inf)
            w.budget.received |= any(len(message.entries) for message in messages)
            effect = yield from effect_of(w, w.strategy.incoming(w.state, local, w.replica.weights, messages))
        if effect is None:
            return False
        _apply(w, effect)
        for header in (message.header for message in messages):
            age = scope.start_s - header.computed_at, w.step - header.step
            w.current.ages.setdefault(header.sender, []).append(age)
            w.recorder.applied(header, w.step, scope.start_s)
        with w.budget.charged():
            after = yield from effect_of(w, w.strategy.between(w.state, local, w.replica.weights))
        if after is None:
            return False
        _apply(w, after)
    w.current.skipped = effect.skipped
    w.step += effect.skipped
    return True


def _apply(w: Worker, effect: Effect) -> None:
    if effect.weights is not None:
        w.replica.set_weights(effect.weights)
    if effect.movement is not None:
        w.replica.move(effect.movement)
    if effect.gradient is not None:
        w.replica.apply(effect.gradient)


def average(w: Worker, computed: Computed) -> Generator[Until, None, None]:
    """Continue the round of averages, or start one that is due."""
    assert w.current is not None
    step, vector = w.step + 1, computed.vector
    if w.averages.awaits():
        yield from _agree(w, [Until(w.averages.settled)])

    def sample() -> Vector:
        assert vector is not None
        return sampled(vector, step)

    w.averages.advance(step, w.current.lbs, w.replica, sample, skipped=w.current.skipped)


def rebalance_test_and_transfer(w: Worker, computed: Computed) -> Generator[Until, None, None]:
    """Do what is not part of every step: share out the batch, test the weights, transfer knowledge."""
    assert w.current is not None
    step = w.step + 1  # schedules and periods count completed steps
    w.take_tests()
    if _evaluation_due(w, step):
        yield from finish_encoding(w)
        w.history.evaluated_s = w.now_s()
        w.evaluator.submit(step, w.now_s(), w.shared_knowledge())
    w.batch_sizes.observe(w.current.lbs, computed.seconds)
    w.knowledge.observe(computed.loss)
    yield from _agree(w, w.batch_sizes.advance(step, w.current.skipped))
    if w.batch_sizes.target_reached:
        w.end(f"target {w.config.target} reached")
    for event in w.knowledge.advance(step, w.replica.knowledge, w.replica.set_knowledge):
        if isinstance(event, Transfer):
            now_s = w.now_s()
            w.recorder.transfer(event, now_s)
            w.recorder.span(Phase.TRANSFER, event.started_step, event.started_s, now_s)
        else:
            yield from _agree(w, [event])


def _agree(w: Worker, waits: Iterable[Until]) -> Generator[Until, None, None]:
    """Wait, unless a worker has left before this step: with local steps in between, it may never take part."""

    def or_left(ready: Callable[[], bool]) -> bool:
        return ready() or w.stop_reason is not None or w.left_step <= w.step

    for until in waits:
        with w.timed(Phase.AGREE):
            yield Until(partial(or_left, until.ready), w.collect)


def _evaluation_due(w: Worker, step: int) -> bool:
    assert w.current is not None
    every = w.config.evaluate_every
    if not w.metrics:
        return False
    if every.steps is not None:
        return step % every.steps <= w.current.skipped and w.evaluator.pending() <= 1  # at most one snapshot waits
    # By the clock, a slow evaluation delays the next one.
    return not w.evaluator.pending() and w.now_s() - w.history.evaluated_s >= (every.seconds or math.inf)


def finish_step(w: Worker, computed: Computed) -> None:
    """Record the step, learn from its timings, count it."""
    assert w.current is not None
    step, w.current = w.current, None
    totals = w.links.totals()
    now_s = w.now_s()
    step_s = now_s - step.started_s
    w.pending = StepRecord(
        step=w.step,
        time_s=now_s,
        compute_s=step.compute_s,
        paced_s=step.paced_s,
        select_encode_s=step.select_encode_s,
        wait_s=step.wait_s,
        apply_s=step.apply_s,
        step_s=step_s,
        loss=computed.loss,
        lbs=step.lbs,
        gbs=step.gbs,
        mpi_cpu_s=w.links.cpu_s(),
        quality=step.quality,
        bytes_sent={peer: t.bytes_sent for peer, t in totals.items()},
        bytes_received={peer: t.bytes_received for peer, t in totals.items()},
        bytes_per_s={peer: t.bytes_per_s for peer, t in totals.items()},
        age_s={peer: sum(age for age, _ in a) / len(a) for peer, a in step.ages.items()},
        age_steps={peer: sum(age for _, age in a) / len(a) for peer, a in step.ages.items()},
    )
    w.history.totals.add(w.pending)
    if not encodes_in_background(w):
        w.write_record()
    # Without waiting: else large messages would make steps long, and long steps would allow large messages.
    w.history.step_s = _running_mean(w.history.step_s, step_s - step.wait_s)
    w.step += 1


def _running_mean(mean: float, value: float) -> float:
    return mean + SMOOTHING * (value - mean) if mean else value
