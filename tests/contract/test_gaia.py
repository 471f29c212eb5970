"""What makes Gaia Gaia: a threshold that falls, a barrier that holds, updates whatever the optimizer makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion_mpi.config.options import Config
from dlion_mpi.errors import UserError
from dlion_mpi.strategies import gaia
from dlion_mpi.strategies.contract import Strategy
from dlion_mpi.strategies.registry import resolve
from dlion_mpi.strategies.types import Inbox, LinkView, Outgoing, Plan
from dlion_mpi.vector.gradient import Gradient
from dlion_mpi.vector.layout import Vector
from dlion_mpi.wire import Kind
from tests import inmemory
from tests.contract.problem import (
    LAYOUT,
    OPTIMUM,
    SIZE,
    arrival,
    config,
    effect_of,
    gradients,
    local,
    rows,
    specialists,
    trained,
)
from tests.inmemory import Weather, run
from tests.options import config as options_config

FREE, BUSY = LinkView(True, 1e9), LinkView(False, 1e9)


class Gaia:
    """The strategy on rank 0 of 4 with its replica. ``update``: the movement by its optimizer, given a gradient."""

    def __init__(self, weights: Vector, update: Callable[[Vector], Vector], ranks: int = 4, **options: Any) -> None:
        self.strategy, resolved = resolve(options_config(strategy="gaia", **options))
        self.state: Any = self.strategy.start(Plan(config=resolved, rank=0, ranks=tuple(range(ranks)), layout=LAYOUT))
        self.w, self.update, self.step = weights.copy(), update, 0
        self.computed = np.zeros(SIZE, np.float64)
        """The sum of the movements over n."""

    def before_compute(self, links: dict[int, LinkView]) -> dict[int, Outgoing]:
        return self.strategy.before_compute(self.state, self.step, self.w.copy, links)

    def finish(self, gradient: Vector, *arrived: Any) -> None:
        own = local(self.update(gradient).astype(np.float32), step=self.step)
        self.strategy.outgoing(self.state, own, {})
        effect = effect_of(self.strategy.incoming(self.state, own, self.w.copy, list(arrived)))
        assert effect.movement is not None
        assert effect.weights is None
        assert effect.gradient is None, "the optimizer has done its step already"
        self.w += effect.movement
        self.computed += own.vector / 4
        self.step += 1

    def done(self, update: Any) -> None:
        """As if this update had been accumulated."""
        self.state.accumulated[:] = update


def values_of(message: Outgoing) -> Vector:
    vector = np.zeros(SIZE, np.float32)
    assert message.entries is not None
    message.entries.add_to(vector, 1.0)
    return vector


# ---- significance


def test_the_threshold_falls_with_the_root_of_the_step() -> None:
    assert gaia.threshold(0.01, 0) == 0.01
    for step in range(200):
        assert gaia.threshold(0.01, step) == pytest.approx(0.01 / math.sqrt(step + 1), rel=1e-12)
    assert gaia.threshold(0.01, 4 * 25 - 1) == pytest.approx(gaia.threshold(0.01, 25 - 1) / 2)


@given(seed=st.integers(0, 500), first=st.sampled_from([0.0, 0.003, 0.1, 2.0]), steps=st.integers(1, 12))
def test_an_entry_is_sent_when_its_sum_is_significant_and_not_before(seed: int, first: float, steps: int) -> None:
    """By definition, an entry at a time: |acc| > S_0 / sqrt(t) |w|; where w is 0, any update."""
    generator = np.random.default_rng(seed)
    weights = generator.choice([0.0, 1.0, -3.0, 100.0], SIZE).astype(np.float32)
    worker = Gaia(weights, lambda g: generator.normal(size=SIZE, scale=0.08).astype(np.float32), threshold=first)
    owed = np.zeros(SIZE, np.float32)
    for step in range(steps):
        messages = worker.before_compute({1: FREE, 2: FREE})
        level = np.float32(first / math.sqrt(step + 1))
        expected = np.array([abs(u) > level * abs(w) for u, w in zip(owed, worker.w, strict=True)])
        if not expected.any():
            assert all(message.entries is None for message in messages.values())
        elif not expected.all():
            for message in messages.values():
                assert message.entries is not None
                sent = np.flatnonzero(expected)
                if message.entries.indices is not None:  # else all entries, as that is no larger
                    np.testing.assert_array_equal(message.entries.indices, sent)
                assert values_of(message)[sent].tobytes() == owed[sent].tobytes()
        if any(message.entries is not None and message.entries.indices is None for message in messages.values()):
            expected[:] = True
        owed[expected] = 0
        before = worker.computed.copy()
        worker.finish(OPTIMUM)
        owed += (worker.computed - before).astype(np.float32)


def test_the_same_update_becomes_significant_as_the_threshold_falls() -> None:
    """0.0499 of a weight, with S_0 = 0.5: when 0.5 / sqrt(t) falls below it, after t = 100."""
    worker = Gaia(np.ones(SIZE, np.float32), lambda g: np.zeros(SIZE, np.float32), threshold=0.5)
    worker.done(np.where(np.arange(SIZE) == 7, 0.0499, 0))
    first_sent = None
    for step in range(150):
        messages = worker.before_compute({1: FREE})
        if messages[1].entries is not None and first_sent is None:
            first_sent = step + 1
            assert list(np.flatnonzero(values_of(messages[1]))) == [7]
        worker.finish(OPTIMUM)
    assert first_sent == 101


# ---- updates


@pytest.mark.parametrize("threshold", [0.0, 0.05, 3.0])
def test_what_travels_is_what_the_optimizer_did(threshold: float) -> None:
    """However it works; here, as momentum does, it remembers. Sent + accumulated == done, exactly."""
    velocity = np.zeros(SIZE, np.float32)

    def update(gradient: Vector) -> Vector:
        velocity[:] = np.rint(velocity / 2 - gradient)
        return velocity * 4

    worker = Gaia(np.full(SIZE, 64, np.float32), update, threshold=threshold)
    sent = np.zeros(SIZE, np.float64)
    for gradient in gradients(1, 20, whole=True):
        for message in worker.before_compute({1: FREE}).values():
            sent += values_of(message) if message.entries is not None else 0
        worker.finish(3 * np.sign(gradient), arrival(2, np.rint(OPTIMUM), lbs=8))
    worker.before_compute({1: BUSY})
    kept = worker.state.accumulated + worker.state.missed.vectors.get(1, np.float32(0))
    assert np.abs(worker.computed).max() > 5
    np.testing.assert_array_equal(sent + kept, worker.computed)
    assert (np.abs(kept).max() > 20) == (threshold == 3.0)


def test_others_updates_are_added_and_the_own_movement_counts_one_in_n() -> None:
    a, b, c = gradients(2, 3, whole=True)
    worker = Gaia(OPTIMUM, lambda g: -g)
    worker.finish(a, arrival(1, b, lbs=8), arrival(2, c, lbs=8))
    np.testing.assert_allclose(worker.w, OPTIMUM + b + c - a / 4, rtol=1e-5, atol=1e-2)


def test_weight_decay_acts_once_whatever_the_number_of_workers() -> None:
    """Six workers whose movement is AdamW's decay alone: 10 steps of 1 % leave 0.905 of the weights, not 0.551."""

    class Decaying(inmemory.Quadratic):
        def movement(self, batch: Any) -> Gradient:
            return Gradient(0.0, np.float32(-0.01) * self.w)

    replicas = [Decaying(LAYOUT, np.zeros(SIZE, np.float32), 0.0) for _ in range(6)]
    for replica in replicas:
        replica.w[:] = 1
    result = run(config("gaia", "bounded", steps=10, staleness=0, threshold=0.0), replicas, rows(6))
    np.testing.assert_allclose(result.weights, 0.905, atol=0.02)


def test_all_entries_go_when_sparse_is_no_smaller() -> None:
    worker = Gaia(np.ones(SIZE, np.float32), lambda g: g, threshold=0.5)
    worker.done(np.where(np.arange(SIZE) == 3, 0.125, 1))  # one is insignificant
    message = worker.before_compute({1: FREE})[1]
    assert message.entries is not None
    assert message.entries.indices is None
    assert values_of(message)[3] == 0.125
    assert not worker.state.accumulated.any()


@given(seed=st.integers(0, 300), ready=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=15))
def test_a_busy_link_gets_later_what_was_significant_and_nothing_is_lost(
    seed: int, ready: list[tuple[bool, bool]]
) -> None:
    generator = np.random.default_rng(seed)
    worker = Gaia(np.ones(SIZE, np.float32), lambda g: np.rint(generator.normal(size=SIZE, scale=3)).astype(np.float32))
    sent = {peer: np.zeros(SIZE, np.float64) for peer in (1, 2)}
    for free in ready:
        messages = worker.before_compute({peer: FREE if f else BUSY for peer, f in zip((1, 2), free, strict=True)})
        for peer, message in messages.items():
            assert message.entries is None or free[peer - 1]
            sent[peer] += values_of(message) if message.entries is not None else 0
        worker.finish(OPTIMUM)
    messages = worker.before_compute({1: FREE, 2: FREE})
    for peer in (1, 2):
        sent[peer] += values_of(messages[peer]) if messages[peer].entries is not None else 0
        np.testing.assert_array_equal(sent[peer] + worker.state.accumulated, worker.computed)
    assert not worker.state.missed.vectors


# ---- the barrier and the clock


def test_what_a_link_missed_goes_while_the_worker_waits() -> None:
    """Asked again in the same step: nothing is significant twice, and nobody is told twice."""
    worker = Gaia(np.ones(SIZE, np.float32), lambda g: g)
    worker.done(np.where(np.arange(SIZE) == 7, 1, 0))
    messages = worker.before_compute({1: FREE, 2: BUSY})
    assert [messages[peer].entries is None for peer in (1, 2)] == [False, True]
    assert worker.before_compute({1: FREE, 2: BUSY}) == {}
    messages = worker.before_compute({1: FREE, 2: FREE})
    assert messages.keys() == {2}
    assert list(np.flatnonzero(values_of(messages[2]))) == [7]
    assert worker.before_compute({1: FREE, 2: FREE}) == {}


@pytest.mark.parametrize(
    ("budget", "barrier", "announced"), [(1e6, "selective", False), (50.0, "selective", True), (50.0, "none", False)]
)
def test_what_outruns_its_link_is_announced(budget: float, barrier: str, announced: bool) -> None:
    worker = Gaia(np.ones(SIZE, np.float32), lambda g: g, barrier=barrier)
    worker.done(np.where(np.arange(SIZE) // 10 == 1, 1, 0))
    assert worker.before_compute({1: LinkView(True, budget)})[1].announced == announced


def test_nobody_goes_on_between_the_indices_and_their_values() -> None:
    strategy, resolved = resolve(Config(strategy="gaia"))
    state = strategy.start(Plan(config=resolved, rank=0, ranks=(0, 1, 2), layout=LAYOUT))
    inbox = Inbox({1: 9, 2: 9})
    assert strategy.may_advance(state, 9, inbox)
    inbox.put(arrival(1, OPTIMUM, lbs=8, step=9, kind=Kind.INDICES))
    assert not strategy.may_advance(state, 9, inbox)
    inbox.put(arrival(2, OPTIMUM, lbs=8, step=9))
    assert not strategy.may_advance(state, 9, inbox), "another's values do not open it"
    inbox.put(arrival(1, OPTIMUM, lbs=8, step=10, kind=Kind.PROGRESS))
    assert not strategy.may_advance(state, 9, inbox), "nor does a header"
    inbox.put(arrival(1, OPTIMUM, lbs=8, step=9))
    assert strategy.may_advance(state, 9, inbox)
    assert [m.header.kind for m in inbox.take(math.inf)] == [Kind.GRADIENT] * 2


class Polls:
    """Watches what every worker is told: the steps it has done when indices come, and when their values do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.workers: list[Any] = []
        self.pairs: list[tuple[int, int]] = []
        open_: dict[tuple[int, int], tuple[int, Any]] = {}
        poll = inmemory.MemoryLinks.poll

        def spy(links: Any) -> Any:
            messages = poll(links)
            rank = links.rank
            step = next((w.step for w in self.workers if w.rank == rank), 0)
            for message in messages:
                key = (message.header.sender, rank)
                if message.header.kind is Kind.INDICES:
                    assert key not in open_
                    open_[key] = (step, message.entries.indices)
                elif message.header.kind is Kind.GRADIENT and key in open_:
                    told_at, indices = open_.pop(key)
                    np.testing.assert_array_equal(indices, message.entries.indices)
                    self.pairs.append((told_at, step))
            return messages

        monkeypatch.setattr(inmemory.MemoryLinks, "poll", spy)

    def __call__(self, worker: Any, network: Any) -> None:
        if worker not in self.workers:
            self.workers.append(worker)


@pytest.mark.parametrize("holds", [True, False])
def test_in_a_run_the_barrier_holds_the_worker_at_its_step(monkeypatch: pytest.MonkeyPatch, holds: bool) -> None:
    """Everything outruns its link here. Without the barrier workers read on, so it is the barrier that holds them."""
    if not holds:
        monkeypatch.setattr(gaia.Gaia, "may_advance", Strategy.may_advance)
    polls = Polls(monkeypatch)
    trained(config("gaia", "bounded", steps=60), weather=Weather(seed=4, delay=80, budget=(90, 92)), on_step=polls)
    assert len(polls.pairs) > 50
    read_on = [values - told for told, values in polls.pairs]
    assert (max(read_on) == 0) == holds


def test_no_barrier_no_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    polls = Polls(monkeypatch)
    settings = config("gaia", "bounded", steps=60, barrier="none")
    trained(settings, weather=Weather(seed=4, delay=80, budget=(90, 92)), on_step=polls)
    assert polls.pairs == []


@pytest.mark.parametrize("clock", [0, 3])
def test_the_mirror_clock_bounds_how_far_ahead_anyone_gets(clock: int) -> None:
    leads = []

    def watch(worker: Any, network: Any) -> None:
        leads.append(worker.step - 1 - min(step for rank, step in enumerate(network.posted) if rank != worker.rank))

    weather = Weather(seed=1, slow=2, slowness=60, blocked=0.3)
    trained(config("gaia", "bounded", steps=60, staleness=clock), weather=weather, on_step=watch)
    assert max(leads) == clock


def test_with_a_smaller_threshold_more_is_sent() -> None:
    def sent(first: float) -> int:
        result = run(config("gaia", "async", steps=60, threshold=first), specialists(3), rows(3))
        return sum(entries or 0 for own in result.sent for step in own for _, entries in step.values())

    assert sent(0.001) > 1.5 * sent(0.3) > 0


def test_it_says_which_modes_and_options_it_has() -> None:
    with pytest.raises(UserError, match="gaia does not support --sync sync: it supports bounded, async"):
        resolve(Config(strategy="gaia", sync="sync"))
    with pytest.raises(UserError, match="--backup is not used by --strategy gaia"):
        resolve(Config(strategy="gaia", backup=1))
    with pytest.raises(UserError, match=r"--gaia\.barrier on: must be one of selective, none"):
        gaia.Gaia(barrier="on")
    with pytest.raises(UserError, match=r"--gaia\.threshold -1: must be at least 0"):
        gaia.Gaia(threshold=-1.0)
