"""What makes Hop Hop: a graph, tokens that bound the gap, backup workers, staleness with its weights, skipping."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dlion_mpi.config.options import Config
from dlion_mpi.config.target import Target
from dlion_mpi.errors import UserError
from dlion_mpi.strategies.hop import Hop
from dlion_mpi.strategies.registry import resolve
from dlion_mpi.strategies.types import Effect, Inbox, LinkView, Plan
from dlion_mpi.vector.layout import Vector
from dlion_mpi.wire import Kind, Message
from tests.contract.problem import (
    LAYOUT,
    LEARNING_RATE,
    OPTIMUM,
    SIZE,
    arrival,
    config,
    local,
    trained,
)
from tests.inmemory import Network, Quadratic, Weather, run
from tests.options import config as options_config

FREE, BUSY = LinkView(True, 1e9, True), LinkView(False, 0.0, False)


def start(ranks: int = 4, rank: int = 0, **options: Any) -> tuple[Any, Any]:
    strategy, resolved = resolve(options_config(strategy="hop", **options))
    return strategy, strategy.start(Plan(config=resolved, rank=rank, ranks=tuple(range(ranks)), layout=LAYOUT))


def parameters(sender: int, step: int, values: Vector) -> Message:
    return arrival(sender, values, lbs=8, step=step, kind=Kind.WEIGHTS)


def filled(value: float) -> Vector:
    return np.full(SIZE, value, np.float32)


def mean_of(effect: Effect) -> Vector:
    assert effect.weights is not None
    return effect.weights


def completed(step: int, own: float, *messages: Message, **options: Any) -> Effect:
    """The effect of step ``step`` on a worker whose parameters are all ``own``."""
    strategy, state = start(**options)
    gradient = local(OPTIMUM, step=step)
    nothing = strategy.outgoing(state, gradient, {1: FREE})
    assert nothing == {}
    arrived = sorted(messages, key=lambda m: m.header.step)
    effect: Effect = strategy.incoming(state, gradient, lambda: filled(own), arrived)
    return effect


# ---- the graph


@pytest.mark.parametrize(
    ("graph", "rank", "ranks", "expected"),
    [
        ("all", 1, 4, {0, 2, 3}),
        ("all", 0, 1, set()),
        ("ring", 0, 1, set()),
        ("ring", 0, 2, {1}),
        ("ring", 0, 5, {1, 4}),
        ("ring", 4, 5, {3, 0}),
        ("ring", 2, 5, {1, 3}),
    ],
)
def test_the_neighbours_are_those_of_the_graph(graph: str, rank: int, ranks: int, expected: set[int]) -> None:
    strategy, state = start(ranks, rank, graph=graph)
    assert state.neighbours == expected
    links = {peer: FREE for peer in range(ranks) if peer != rank}
    messages = strategy.before_compute(state, 0, OPTIMUM.copy, links)
    assert messages.keys() == expected
    for message in messages.values():
        assert message.kind is Kind.WEIGHTS
        np.testing.assert_array_equal(message.entries.values, OPTIMUM)


@pytest.mark.parametrize("graph", ["all", "ring"])
@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_in_sync_it_is_decentralised_sgd_over_the_graph(graph: str, workers: int) -> None:
    """``x_{k+1} = mean over the neighbourhood of x_k - eta g(x_k)``, whichever rank is late."""
    generator = np.random.default_rng(4)
    curvature = generator.uniform(0.5, 2, SIZE).astype(np.float32)
    data = [generator.normal(size=(8 * 25, SIZE)).astype(np.float32) for _ in range(workers)]
    near = [[k] + [(k + d) % workers for d in (-1, 1) if graph == "ring"] for k in range(workers)]
    near = [sorted(set(group)) if graph == "ring" else list(range(workers)) for group in near]
    expected = np.zeros((workers, SIZE))
    for step in range(25):
        batches = [x[8 * step : 8 * step + 8].astype(np.float64).mean(axis=0) for x in data]
        slopes = [curvature * (x - batch) for x, batch in zip(expected, batches, strict=True)]
        means = [expected[group].mean(axis=0) for group in near]
        expected = np.array([mean - LEARNING_RATE * slope for mean, slope in zip(means, slopes, strict=True)])
    settings = config("hop", "sync", steps=25, graph=graph)
    replicas = [Quadratic(LAYOUT, curvature, LEARNING_RATE) for _ in range(workers)]
    result = run(settings, replicas, data, weather=Weather(seed=1, delay=40, slow=0, slowness=9))
    np.testing.assert_allclose(result.weights, expected, rtol=1e-5, atol=1e-6)


# ---- tokens


class Gaps:
    """Watches a run: how far ahead of its neighbours a worker is when it enters an iteration."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.largest = -math.inf

    def __call__(self, worker: Any, network: Network) -> None:
        entered = worker.step
        if entered < self.steps:
            for peer in worker.state.neighbours:
                self.largest = max(self.largest, entered - network.posted[peer])


ADVERSE = [
    Weather(seed=1, slow=2, slowness=60, blocked=0.5),
    Weather(seed=2, delay=500, blocked=0.2),
    Weather(seed=3, delay=100, slow=0, slowness=30, blocked=0.9),
    Weather(seed=4, delay=30, slow=1, slowness=200),
]


@pytest.mark.parametrize("weather", ADVERSE, ids=lambda weather: f"seed{weather.seed}")
@pytest.mark.parametrize("graph", ["all", "ring"])
@pytest.mark.parametrize("max_gap", [1, 4])
@pytest.mark.parametrize(("backup", "skip"), [(0, 0), (2, 0), (3, 10)])
def test_no_delay_makes_the_gap_exceed_its_bound(
    weather: Weather, graph: str, max_gap: int, backup: int, skip: int
) -> None:
    """With staleness and backup workers that would let them run away."""
    gaps = Gaps(30)
    settings = config("hop", "bounded", steps=30, staleness=20, backup=backup, graph=graph, max_gap=max_gap, skip=skip)
    result = trained(settings, workers=4, weather=weather, on_step=gaps)
    assert gaps.largest == max_gap, "and they go as far as they may, or no rank would need the bound"
    assert {worker.step for worker in result.workers} == {30}


def test_a_header_is_a_token_too() -> None:
    """A rank that cannot send its parameters does not delay its neighbours by that alone."""
    strategy, state = start(ranks=2, staleness=9, backup=0, max_gap=3)
    for reached, may in ((1, True), (0, False)):
        inbox = Inbox({1: -1})
        inbox.put(arrival(1, OPTIMUM, lbs=8, step=reached, kind=Kind.PROGRESS))
        assert strategy.may_advance(state, 3, inbox) == may


# ---- backup workers


def test_no_rank_waits_for_backup_workers_except_for_tokens() -> None:
    strategy, state = start(ranks=5, staleness=0, backup=2, max_gap=4)

    def may(step: int, *reached: int) -> bool:
        inbox = Inbox(dict.fromkeys(range(1, 5), -1))
        for sender, newest in enumerate(reached, start=1):
            inbox.put(parameters(sender, newest, OPTIMUM))
        return strategy.may_advance(state, step, inbox)

    assert may(6, 6, 6, 3, 3)
    assert not may(6, 6, 5, 3, 3), "two of four must be there"
    assert not may(6, 6, 6, 3, 2), "tokens are wanted of the slowest too"


# ---- staleness


def test_parameters_count_by_their_age() -> None:
    """k = 10, s = 4: weights 5 (own), 5 (k), 3 (k - 2), 1 (k - 4), and 7 for one that is two ahead."""
    messages = [
        parameters(1, 10, filled(1)),
        parameters(2, 8, filled(20)),
        parameters(3, 6, filled(300)),
        parameters(4, 12, filled(4000)),
    ]
    effect = completed(10, 50_000, *messages, ranks=5, staleness=4, skip=0)
    np.testing.assert_allclose(mean_of(effect), (5 * 50_000 + 5 * 1 + 3 * 20 + 1 * 300 + 7 * 4000) / 21, rtol=1e-5)
    np.testing.assert_array_equal(effect.movement, OPTIMUM)
    assert effect.skipped == 0


def test_of_a_neighbour_the_newest_counts_and_what_is_too_old_does_not() -> None:
    messages = [parameters(1, 7, filled(9e9)), parameters(1, 9, filled(100)), parameters(2, 5, filled(9e9))]
    effect = completed(10, 1000, *messages, staleness=4, skip=0)
    np.testing.assert_allclose(mean_of(effect), (5 * 1000 + 4 * 100) / 9, rtol=1e-5)


def test_without_anything_new_only_the_own_movement_acts() -> None:
    assert completed(10, 1000, parameters(2, 5, filled(1)), staleness=4, skip=0).weights is None


@pytest.mark.parametrize("staleness", [0, 3])
def test_no_rank_continues_with_parameters_that_are_too_old(staleness: int) -> None:
    """Once used they still count as known: what may not be older than s is the newest that has arrived."""
    strategy, state = start(ranks=2, staleness=staleness, backup=0, max_gap=99)
    inbox = Inbox({1: -1})
    inbox.put(parameters(1, 4, OPTIMUM))
    assert strategy.may_advance(state, 4 + staleness, inbox)
    assert not strategy.may_advance(state, 5 + staleness, inbox)
    strategy.outgoing(state, local(OPTIMUM, step=4), {1: FREE})
    strategy.incoming(state, local(OPTIMUM, step=4), OPTIMUM.copy, inbox.take(math.inf))
    assert strategy.may_advance(state, 4 + staleness, inbox)
    assert not strategy.may_advance(state, 5 + staleness, inbox)


# ---- what is sent when links are busy


def test_a_link_gets_the_newest_parameters_when_it_is_free_and_a_token_meanwhile() -> None:
    strategy, state = start(ranks=3, staleness=5)
    strategy.before_compute(state, 0, lambda: filled(0), {1: FREE, 2: FREE})
    messages = strategy.before_compute(state, 1, lambda: filled(1), {1: BUSY, 2: LinkView(True, 1e9, False)})
    assert [messages[peer].entries for peer in (1, 2)] == [None, None]
    messages = strategy.before_compute(state, 2, lambda: filled(2), {1: FREE, 2: BUSY})
    assert messages[1].entries.values[0] == 2
    assert messages[2].entries is None


def test_a_worker_that_waits_sends_as_soon_as_a_link_is_free() -> None:
    """Asked again in the same iteration: its parameters once to all, and no token twice."""
    strategy, state = start(ranks=3)
    messages = strategy.before_compute(state, 4, lambda: filled(4), {1: FREE, 2: BUSY})
    assert [messages[peer].entries is None for peer in (1, 2)] == [False, True]
    for links, expected in (({1: FREE, 2: BUSY}, set()), ({1: FREE, 2: FREE}, {2}), ({1: FREE, 2: FREE}, set())):
        messages = strategy.before_compute(state, 4, lambda: filled(4), links)
        assert messages.keys() == expected
    messages = strategy.before_compute(state, 5, lambda: filled(5), {1: FREE, 2: FREE})
    assert messages[1].entries.values[0] == 5


def test_in_sync_no_rank_waits_for_an_acknowledgement() -> None:
    strategy, state = start(ranks=2, sync="sync")
    for step in range(3):
        messages = strategy.before_compute(state, step, OPTIMUM.copy, {1: BUSY})
        assert messages[1].kind is Kind.WEIGHTS


@pytest.mark.parametrize("graph", ["all", "ring"])
@pytest.mark.parametrize("staleness", [0, 1, 5])
def test_links_that_are_hardly_ever_free_do_not_end_in_a_deadlock(graph: str, staleness: int) -> None:
    for seed in range(2):
        settings = config("hop", "bounded", steps=25, staleness=staleness, graph=graph, max_gap=3)
        result = trained(settings, workers=4, weather=Weather(seed=seed, delay=90, blocked=0.97))
        assert {worker.step for worker in result.workers} == {25}


# ---- skipping


@pytest.mark.parametrize(
    ("foremost", "slowest", "skip", "max_gap", "skipped"),
    [
        (15, 12, 10, 8, 0),  # 4 behind after this step: no rank is about to wait
        (16, 12, 10, 8, 5),  # to where the foremost is
        (30, 28, 10, 99, 10),  # no further than asked for
        (30, 12, 99, 8, 9),  # no further than the slowest neighbour's tokens go: 12 + 8 = 11 + 9
        (30, 28, 0, 99, 0),
    ],
)
def test_a_laggard_skips_as_far_as_it_may(foremost: int, slowest: int, skip: int, max_gap: int, skipped: int) -> None:
    messages = [
        parameters(1, foremost, filled(1)),
        parameters(2, slowest, filled(1)),
        parameters(3, slowest, filled(1)),
    ]
    effect = completed(10, 1, *messages, staleness=5, skip=skip, max_gap=max_gap)
    assert effect.skipped == skipped


def test_after_a_skip_parameters_count_as_at_the_iteration_it_leads_to() -> None:
    """From 10 on to 31, so that 30 is the last one: s = 3 leaves its own out, and weighs 30 with 4, 28 with 2."""
    messages = [parameters(1, 31, filled(5)), parameters(2, 30, filled(10)), parameters(3, 28, filled(100))]
    effect = completed(10, 1e6, *messages, staleness=3, skip=99, max_gap=99)
    assert effect.skipped == 20
    np.testing.assert_allclose(mean_of(effect), (5 * 5 + 4 * 10 + 2 * 100) / 11, rtol=1e-5)


def test_in_a_run_skipping_lets_the_others_go_on() -> None:
    """One worker moves 60 times less often. Without skipping all keep its pace; with it, it leaves steps out."""
    ticks, computed = {}, {}
    for skip in (0, 10):
        last: dict[str, Network] = {}

        def watch(worker: Any, network: Network, last: dict[str, Network] = last) -> None:
            last["network"] = network

        settings = config("hop", "bounded", steps=100, staleness=4, max_gap=12, skip=skip)
        weather = Weather(seed=1, slow=2, slowness=60)
        result = trained(settings, weather=weather, on_step=watch)
        ticks[skip], computed[skip] = last["network"].tick, [len(records) for records in result.records]
        assert {worker.step for worker in result.workers} == {100}
    assert computed[0] == [100, 100, 100]
    assert computed[10][2] < 40
    assert min(computed[10][:2]) > 80
    assert ticks[10] < ticks[0] / 2


def test_what_is_due_in_a_step_that_is_left_out_is_done_after_it() -> None:
    """Evaluations and rounds by steps."""
    snapshots: list[list[int]] = []

    class Spy:
        def __init__(self) -> None:
            self.steps: list[int] = []
            snapshots.append(self.steps)

        def pending(self) -> int:
            return 0

        def submit(self, step: int, time_s: float, knowledge: Vector) -> None:
            self.steps.append(step)

        def poll(self, *, wait: bool = False) -> list[Any]:
            return []

    def install(worker: Any, network: Network) -> None:
        if not isinstance(worker.evaluator, Spy):
            worker.evaluator = Spy()

    settings = config(
        "hop",
        "bounded",
        steps=100,
        staleness=4,
        max_gap=12,
        skip=10,
        target=Target("accuracy", ">=", 0.99),
    )
    weather = Weather(seed=1, slow=2, slowness=60)
    result = trained(
        Config(**(vars(settings) | {"evaluate_every": type(settings.evaluate_every)(steps=20)})),
        weather=weather,
        on_step=install,
    )
    assert all(len(steps) == 5 for steps in snapshots), snapshots
    assert {worker.batch_sizes.started for worker in result.workers} == {result.workers[0].batch_sizes.started}


def test_it_says_which_modes_and_options_it_has() -> None:
    with pytest.raises(UserError, match="hop does not support --sync async: it supports bounded, sync"):
        resolve(Config(strategy="hop", sync="async"))
    with pytest.raises(UserError, match=r"--hop\.max-gap has no effect with --sync sync"):
        resolve(options_config(strategy="hop", sync="sync", max_gap=3))
    with pytest.raises(UserError, match=r"--hop\.max-gap 0: must be at least 1"):
        Hop(max_gap=0)
    with pytest.raises(UserError, match=r"--hop\.graph star: must be one of all, ring"):
        Hop(graph="star")
    with pytest.raises(UserError, match=r"--hop\.graph belongs to --strategy hop, not to --strategy baseline"):
        resolve(Config.of({"strategy": "baseline", "hop.graph": "ring"}))
