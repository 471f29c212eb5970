"""The loop's side of the exchange: what goes to whom, made in the loop or in a thread beside it.

In `sync` everyone waits for everyone's message, so it is made at once. Else encoding goes on beside the loop
(``--exchange-thread``), and selecting too where the step at hand does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial

from dlion_mpi.loop.ports import BackgroundEncoder, Computed, EncodedBatch, Stamp, Until
from dlion_mpi.loop.worker import Timings, Worker, not_ready
from dlion_mpi.metrics.timeline import Phase
from dlion_mpi.strategies.contract import TELLING_BYTES, LinkView, LocalGradient, Outgoing, SelectsBeside, SendsFirst
from dlion_mpi.wire import Kind

MOST_STEPS_APART = 8
"""However little the exchange may cost, gradients are exchanged every so many steps."""
LEAST_SHARE = 0.01
"""Of a gradient's bytes: messages are not made smaller than that for the processor's sake. What is then left of their
cost is mostly that of looking at every entry."""
ADAPTED = (0.25, 1.25)
"""How fast messages get smaller, and larger again, from one exchange to the next."""

Messages = dict[int, Outgoing]


def send_first(w: Worker, timings: Timings, *, waiting: bool = False) -> dict[int, float]:
    """What a strategy that exchanges weights or updates sends before its gradient is there. Returns as `post`.

    ``waiting``: it has been asked in this step before; if it has nothing more, that was part of the waiting.
    """
    if w.alone or not isinstance(w.strategy, SendsFirst):
        return {}
    start_s, start_cpu_s = w.now_s(), w.cpu_s()
    links = w.link_views(w.step_s)
    w.state, messages = w.strategy.opening(w.state, w.step, w.replica.weights, links)
    if waiting and not messages:
        return {}
    _charge(w, EncodedBatch(start_s, w.now_s(), w.cpu_s() - start_cpu_s, {}), timings)
    return _hand_over(w, lambda: messages, w.stamp(start_s), timings)


def post(w: Worker, computed: Computed, timings: Timings) -> Generator[Until, None, dict[int, float]]:
    """Have a message made for every link that the strategy has one for, and queued.

    Returns the N of each message with entries that has been queued by now: of this step, or, made beside the loop,
    of the step before, which is waited for.
    """
    sent = yield from settle(w, timings)
    assert computed.gradient is not None
    local = local_gradient(w, computed)
    _account(w, computed)
    links = _affordable(w, w.link_views(w.step_s or computed.seconds))
    stamp = w.stamp(w.now_s())
    make = partial(_outgoing, w, local, links)
    if _thread(w) is not None and not (isinstance(w.strategy, SelectsBeside) and w.strategy.beside(w.config)):
        start_s, start_cpu_s = w.now_s(), w.cpu_s()
        messages = make()
        _charge(w, EncodedBatch(start_s, w.now_s(), w.cpu_s() - start_cpu_s, {}), timings)
        return sent | _hand_over(w, lambda: messages, stamp, timings)
    return sent | _hand_over(w, make, stamp, timings)


def local_gradient(w: Worker, computed: Computed) -> LocalGradient:
    """This step's own gradient, as strategies get it."""
    assert computed.gradient is not None
    return LocalGradient(vector=computed.gradient, step=w.step, lbs=w.status.lbs, gbs=w.status.gbs)


def is_quiet(w: Worker) -> bool:
    """Whether nothing is being made beside the loop. Raises what failed there."""
    beside = _thread(w)
    return beside is None or beside.done()


def quiet(w: Worker) -> Generator[Until, None, None]:
    """Wait until nothing is being made beside the loop."""
    if not is_quiet(w):
        yield Until(lambda: is_quiet(w))


def settle(w: Worker, timings: Timings) -> Generator[Until, None, dict[int, float]]:
    """Wait for what is being made beside the loop. Returns the N of each message with entries."""
    beside = _thread(w)
    if beside is None:
        return {}
    start_s = w.now_s()
    yield from quiet(w)
    _charge(w, EncodedBatch(start_s, w.now_s(), 0.0, {}), timings)
    quality: dict[int, float] = {}
    for made in beside.take():
        w.recorder.span(Phase.EXCHANGE, w.step, made.start_s, made.end_s)
        w.exchange_cpu_s += made.cpu_s
        quality |= made.quality
    return quality


def _thread(w: Worker) -> BackgroundEncoder | None:
    """What makes messages beside the loop, if anything does."""
    return w.beside if w.config.exchange_thread == "on" and not w.alone else None


def _outgoing(w: Worker, local: LocalGradient, links: dict[int, LinkView]) -> Messages:
    w.state, messages = w.strategy.outgoing(w.state, local, links)
    return messages


def _hand_over(w: Worker, make: Callable[[], Messages], stamp: Stamp, timings: Timings) -> dict[int, float]:
    """Make, encode and queue messages: beside the loop if that may be, else at once; then returns each one's N."""
    beside = _thread(w)
    if beside is not None:
        beside.begin(partial(_make, w, make, stamp))
        return {}
    made = _make(w, make, stamp)
    _charge(w, made, timings)
    return made.quality


def _make(w: Worker, make: Callable[[], Messages], stamp: Stamp) -> EncodedBatch:
    """Messages, made and queued: what is announced after its announcement."""
    start_s, start_cpu_s = w.now_s(), w.cpu_s()
    messages = make()
    announced = {
        peer: Outgoing(entries=message.entries, kind=Kind.INDICES)
        for peer, message in messages.items()
        if message.announced
    }
    if announced:
        w.post(announced, stamp)
    w.post(messages, stamp)
    quality = {peer: message.quality for peer, message in messages.items() if message.entries is not None}
    return EncodedBatch(start_s, w.now_s(), w.cpu_s() - start_cpu_s, quality)


def _charge(w: Worker, made: EncodedBatch, timings: Timings) -> None:
    """What the loop itself has spent on messages."""
    w.recorder.span(Phase.SELECT, w.step, made.start_s, made.end_s)
    timings.select_encode_s += made.end_s - made.start_s
    w.exchange_cpu_s += made.cpu_s


def _account(w: Worker, computed: Computed) -> None:
    """Grant the exchange its share of the processor time in which this gradient was computed, and charge what it has
    cost since the one before, MPI's thread included."""
    moved_cpu_s = w.links.cpu_s()
    granted_s = (w.config.exchange_share or 0.0) * computed.seconds * w.processors
    cost_s = w.exchange_cpu_s + moved_cpu_s - w.moved_cpu_s
    w.exchange_cpu_s, w.moved_cpu_s = 0.0, moved_cpu_s
    if w.exchanged_step == w.step - 1 and cost_s > 0:
        least, most = ADAPTED
        wanted_bytes = w.message_bytes * min(max(granted_s / cost_s, least), most)
        w.message_bytes = min(max(wanted_bytes, _least_bytes(w)), w.whole_bytes)
    # Unused credit lapses after a step: a lull must not be followed by a burst. Nor is more owed than can be put off.
    credit_s = max(w.exchange_credit_s + granted_s - cost_s, -MOST_STEPS_APART * granted_s)
    w.exchange_credit_s = min(credit_s, granted_s)


def _affordable(w: Worker, links: dict[int, LinkView]) -> dict[int, LinkView]:
    """The links, with messages no larger than the exchange's share of computing (``--exchange-share``) pays for.

    On a fast network the processor, not the link, is what a gradient costs. Where the smallest messages still cost too
    much, no link is ready until the exchange has taken no more than its share: gradients are then exchanged every few
    steps, and what was not sent is dealt with as on a link that has not drained; but at least every MOST_STEPS_APART
    steps, since looking for messages alone may cost more than the share of a tiny model. `sync` has no such share:
    there everyone waits for everyone's message of every step.
    """
    if not w.config.exchange_share:
        return links
    overdue = w.step - w.exchanged_step >= MOST_STEPS_APART
    if w.exchange_credit_s < 0 and w.message_bytes <= _least_bytes(w) and not overdue:
        return not_ready(links)
    w.exchanged_step = w.step
    return {peer: replace(link, affordable_bytes=w.message_bytes) for peer, link in links.items()}


def _least_bytes(w: Worker) -> float:
    """What a message may have whatever it costs. Of smaller ones bandwidth could not be told either."""
    return max(LEAST_SHARE * w.whole_bytes, TELLING_BYTES)
