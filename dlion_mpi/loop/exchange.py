"""The sending part of a step: select for each link, encode, queue.

In lockstep all workers wait for the messages of all peers, so the loop encodes at once. Otherwise a thread encodes in
the background while the next gradient is computed. It also selects, if the current step does not depend on that.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial

from dlion_mpi.loop.ports import BackgroundEncoder, Computed, EncodedBatch, Stamp, Until
from dlion_mpi.loop.worker import Worker
from dlion_mpi.metrics.timeline import Phase
from dlion_mpi.strategies.types import LocalUpdate, Outgoing
from dlion_mpi.wire import Kind

Messages = dict[int, Outgoing]


def post_weights(w: Worker, *, waiting: bool = False) -> None:
    """Post what a strategy sends before its gradient is computed: weights or updates.

    ``waiting``: the strategy was asked in this step before, and is asked again since a link may be free now.
    """
    if w.alone or not w.strategy.sends_first():
        return
    with w.timed(Phase.SELECT, charged=True) as scope:
        links = w.link_views(w.history.step_s)
        messages = w.strategy.before_compute(w.state, w.step, w.replica.weights, links)
        scope.discarded = waiting and not messages
    if not scope.discarded:
        _encode_and_queue(w, lambda: messages, w.stamp(scope.start_s))


def post(w: Worker, local: LocalUpdate, computed: Computed) -> Generator[Until, None, None]:
    """Select what every link gets of this step's gradient, encode it and queue it."""
    yield from finish_encoding(w)
    w.budget.settle(w.step, max(computed.seconds, w.history.step_s))
    links = w.budget.limit(w.step, w.link_views(w.history.step_s or computed.seconds))
    stamp = w.stamp(w.now_s())
    select = partial(w.strategy.outgoing, w.state, local, links)
    if _encoder(w) is None or w.strategy.selects_in_background(w.state.plan):
        _encode_and_queue(w, select, stamp)
    else:
        with w.timed(Phase.SELECT, charged=True):
            messages = select()
        _encode_and_queue(w, lambda: messages, stamp)


def is_encoded(w: Worker) -> bool:
    """Whether the background encoder has nothing left to do. Raises what failed there."""
    encoder = _encoder(w)
    return encoder is None or encoder.done()


def finish_encoding(w: Worker) -> Generator[Until, None, None]:
    """Wait for the background encoder. The previous step's record is then complete, and written."""
    encoder = _encoder(w)
    if encoder is not None:
        with w.timed(Phase.SELECT):
            if not is_encoded(w):
                yield Until(partial(is_encoded, w))
        for batch in encoder.take():
            w.recorder.span(Phase.EXCHANGE, w.step, batch.start_s, batch.end_s)
            w.budget.charge(batch.cpu_s)
            _note_quality(w, batch)
    w.write_record()


def encodes_in_background(w: Worker) -> bool:
    """Whether a step may end before its messages are encoded."""
    return _encoder(w) is not None


def _encoder(w: Worker) -> BackgroundEncoder | None:
    return None if w.config.mode.lockstep or w.alone else w.encoder


def _encode_and_queue(w: Worker, select: Callable[[], Messages], stamp: Stamp) -> None:
    """Have messages selected, encoded and queued: in the background if possible, else at once."""
    encoder = _encoder(w)
    if encoder is not None:
        encoder.begin(partial(_encode, w, select, stamp))
        return
    with w.timed(Phase.SELECT):
        batch = _encode(w, select, stamp)
    w.budget.charge(batch.cpu_s)
    _note_quality(w, batch)


def _encode(w: Worker, select: Callable[[], Messages], stamp: Stamp) -> EncodedBatch:
    """Select, encode and queue messages. An announcement goes before what it announces."""
    start_s, start_cpu_s = w.now_s(), w.clock.cpu_s()
    messages = select()
    announced = {
        peer: Outgoing(entries=message.entries, kind=Kind.INDICES)
        for peer, message in messages.items()
        if message.announced
    }
    if announced:
        w.links.post(announced, stamp)
    w.links.post(messages, stamp)
    quality = {peer: message.quality for peer, message in messages.items() if message.entries is not None}
    return EncodedBatch(stamp.step, start_s, w.now_s(), w.clock.cpu_s() - start_cpu_s, quality)


def _note_quality(w: Worker, batch: EncodedBatch) -> None:
    """Keep the N of each message with the step that sent it."""
    if w.pending is not None and batch.step <= w.pending.step:  # a step's number grows by what it skips
        w.pending = replace(w.pending, quality={**w.pending.quality, **batch.quality})
    elif w.current is not None:
        w.current.quality |= batch.quality
