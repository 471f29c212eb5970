"""What every strategy owes: it learns what all workers know, keeps to its synchronisation mode, ends in order.

The loop is the real one; machines and links are in memory (`tests/inmemory.py`), so delays can be as adverse as
a schedule can make them, and a run can be repeated.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from dlion_mpi.config.options import Config
from dlion_mpi.errors import RunError, UserError
from dlion_mpi.loop import batch_sizes
from dlion_mpi.loop.worker import Worker
from dlion_mpi.metrics.records import StepRecord
from dlion_mpi.strategies.registry import STRATEGIES, resolve
from dlion_mpi.strategies.types import Inbox, Plan
from dlion_mpi.wire import Kind
from tests.contract.problem import (
    EVERY_MODE,
    LAYOUT,
    LEARNING_RATE,
    OPTIMUM,
    ROUGH,
    SIZE,
    SUMS,
    arrival,
    config,
    effect_of,
    every_mode,
    has_option,
    local,
    rows,
    specialists,
    trained,
)
from tests.inmemory import Network, Quadratic, Weather, run

ADD_THEIR_OWN = {"hop", "choco-sgd", "local-sgd", "diloco", "streaming-diloco", "sparseloco"}
"""The strategies whose workers add their own movements to common weights, so that the weights differ in between."""
in_mode = {mode: [name for name, own in EVERY_MODE if own == mode] for mode in ("sync", "bounded", "async")}


@pytest.fixture(autouse=True)
def shares_every_seven_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_sizes, "PERIOD", 7)


@every_mode
def test_every_worker_reaches_the_optimum_that_only_all_together_know(name: str, mode: str) -> None:
    """By the exchange alone: knowledge transfer, which would help, is off."""
    result = trained(config(name, mode, transfer="none"), weather=ROUGH)
    nearest = LEARNING_RATE if name == "demo" else 0.02  # each step of demo is as long as the learning rate
    np.testing.assert_allclose(result.weights, np.tile(OPTIMUM, (3, 1)), atol=nearest)
    assert [len(records) for records in result.records] == [250] * 3


@every_mode
def test_the_same_seed_gives_the_same_weights(name: str, mode: str) -> None:
    first, second = (trained(config(name, mode, steps=60), weather=ROUGH) for _ in range(2))
    assert first.weights.tobytes() == second.weights.tobytes()


@pytest.mark.parametrize("name", in_mode["sync"])
def test_in_sync_the_result_does_not_depend_on_who_is_late(name: str) -> None:
    weathers = [Weather(seed=1), Weather(seed=2, delay=300), Weather(seed=3, delay=5, slow=1)]
    results = [trained(config(name, "sync", steps=90), weather=weather) for weather in weathers]
    assert len({result.weights.tobytes() for result in results}) == 1
    lbs = [[[record.lbs for record in records] for records in result.records] for result in results]
    assert lbs[0] == lbs[1] == lbs[2]


@every_mode
def test_one_worker_alone_descends_as_plain_sgd(name: str, mode: str) -> None:
    result = trained(config(name, mode, steps=50), workers=1)
    expected = np.zeros(SIZE, np.float32)
    for _ in range(50):
        expected -= np.float32(LEARNING_RATE) * (expected - OPTIMUM)
    np.testing.assert_allclose(result.weights[0], expected, rtol=1e-5)


@every_mode
def test_a_strategy_of_one_rank_sends_nothing_and_applies_its_own_update(name: str, mode: str) -> None:
    strategy, resolved = resolve(config(name, mode, value_type="float32"))
    state = strategy.start(Plan(config=resolved, rank=0, ranks=(0,), layout=LAYOUT))
    own = local(OPTIMUM, lbs=8, gbs=8)
    outgoing = strategy.outgoing(state, own, {})
    assert outgoing == {}
    assert strategy.may_advance(state, 0, Inbox({}))
    effect = effect_of(strategy.incoming(state, own, lambda: np.zeros(SIZE, np.float32), []))
    expected, none = (effect.gradient, effect.movement)[:: 1 if strategy.exchanges == "gradients" else -1]
    if expected is not None:
        np.testing.assert_array_equal(expected, OPTIMUM)
    assert none is None


@every_mode
def test_options_resolve_once_and_for_all(name: str, mode: str) -> None:
    """A resolved Config is legal, complete, and resolves to itself: it can be written and read back."""
    strategy, resolved = resolve(config(name, mode))
    assert resolve(resolved)[1] == resolved
    assert strategy.name == name
    assert resolved.sync == mode
    bounded_only = {"staleness", "backup", "patience"} if mode != "bounded" else set()
    needless = {"exchange_share"} if mode == "sync" else set()
    not_in_sync = needless & set(strategy.uses)
    unlimited = {"batch_size_max"} if strategy.uses.get("batch_size_max", 0) is None else set()
    chosen_later = {"value_type"} if name == "dlion" else set()
    unset = {option for option in strategy.uses if getattr(resolved, option) is None}
    assert not_in_sync <= unset
    assert unset <= {*bounded_only, *not_in_sync, *unlimited, "transfer_period", "transfer_merge", *chosen_later}


# ---- synchronisation modes


class Leads:
    """Watches a run: how far ahead of the slowest peers a worker is after each of its steps."""

    def __init__(self, backup: int = 0) -> None:
        self.backup = backup
        self.largest = -math.inf
        self.largest_of_slowest = -math.inf

    def __call__(self, worker: Worker, network: Network) -> None:
        others = sorted(step for rank, step in enumerate(network.posted) if rank != worker.rank)
        self.largest = max(self.largest, worker.step - 1 - others[self.backup])
        self.largest_of_slowest = max(self.largest_of_slowest, worker.step - 1 - others[0])


ADVERSE = [
    Weather(seed=1, slow=2, slowness=60, budget=(100, 330), blocked=0.5),
    Weather(seed=2, delay=500, budget=(100, 330), blocked=0.2),
    Weather(seed=3, delay=100, slow=0, slowness=30),
]
adverse = pytest.mark.parametrize("weather", ADVERSE, ids=lambda weather: f"seed{weather.seed}")
bounded = pytest.mark.parametrize("name", in_mode["bounded"])


@bounded
@adverse
@pytest.mark.parametrize("staleness", [0, 1, 4])
def test_bounded_never_gets_further_ahead_than_it_may(name: str, weather: Weather, staleness: int) -> None:
    leads = Leads()
    trained(config(name, "bounded", steps=40, staleness=staleness), weather=weather, on_step=leads)
    assert leads.largest == staleness  # and it goes as far as it may, or nobody would need the bound


@pytest.mark.parametrize("name", [name for name in in_mode["bounded"] if has_option(name, "backup")])
def test_backup_workers_are_left_behind_but_no_one_else(name: str) -> None:
    leads = Leads(backup=1)
    weather = Weather(seed=1, slow=2, slowness=60, blocked=0.5)
    settings = config(name, "bounded", steps=60, staleness=2, backup=1)
    trained(settings, workers=4, weather=weather, on_step=leads)
    assert leads.largest == 2
    assert leads.largest_of_slowest > 10


@pytest.mark.parametrize("name", in_mode["async"])
def test_async_waits_for_nobody(name: str) -> None:
    leads = Leads()
    trained(config(name, "async", steps=60), weather=ADVERSE[0], on_step=leads)
    assert leads.largest > 20


def test_messages_are_taken_in_a_fixed_order_and_later_ones_stay() -> None:
    """A sum of float32 must not depend on who came first."""
    inbox = Inbox({1: -1, 2: -1})
    for sender, step in ((2, 4), (1, 5), (2, 5), (1, 4), (1, 6)):
        inbox.put(arrival(sender, OPTIMUM, lbs=1, step=step))
    assert inbox.newest == {1: 6, 2: 5}
    assert [(m.header.sender, m.header.step) for m in inbox.take(5)] == [(1, 4), (1, 5), (2, 4), (2, 5)]
    assert [(m.header.sender, m.header.step) for m in inbox.take(math.inf)] == [(1, 6)]
    assert inbox.take(math.inf) == []


@pytest.mark.parametrize("name", [name for name in in_mode["sync"] if name not in SUMS | {"streaming-diloco"}])
@adverse
def test_sync_applies_exactly_the_gradients_of_the_step(name: str, weather: Weather) -> None:
    result = trained(config(name, "sync", steps=40, h=1), weather=dataclasses.replace(weather, blocked=0.0))
    for rank, records in enumerate(result.records):
        for record in records:
            assert dict(record.age_steps) == {peer: 0 for peer in range(3) if peer != rank}


@pytest.mark.parametrize("mode", ["sync", "bounded", "async"])
@pytest.mark.parametrize("name", sorted(STRATEGIES.keys() - SUMS))
def test_may_advance_by_the_newest_step_of_everyone(name: str, mode: str) -> None:
    if mode not in STRATEGIES[name].modes:
        with pytest.raises(UserError, match=f"does not support --sync {mode}"):
            resolve(Config(strategy=name, sync=mode))
        return
    options = {"staleness": 2, "backup": 1} if mode == "bounded" else {}
    strategy, resolved = resolve(config(name, mode, h=1, **options))
    state = strategy.start(Plan(config=resolved, rank=0, ranks=(0, 1, 2, 3), layout=LAYOUT))

    def may(step: int, *newest: int) -> bool:
        inbox = Inbox(dict.fromkeys(range(1, len(newest) + 1), -1))
        for sender, reached in enumerate(newest, start=1):
            if reached >= 0:
                inbox.put(arrival(sender, OPTIMUM, lbs=8, step=reached, kind=Kind.WEIGHTS))
        return strategy.may_advance(state, step, inbox)

    if mode == "sync":
        assert may(4, 4, 5, 4)
        assert not may(4, 4, 4, 3)
    elif mode == "bounded":
        assert may(6, 4, 4, 4)
        assert may(6, 4, 4, -1) == has_option(name, "backup"), "the slowest is the backup worker"
        assert not may(6, 3, 3, 9)
        assert not may(2, -1, -1, 9)
        assert may(6, 3) == has_option(name, "backup"), "with the only one left out there is nobody to wait for"
    else:
        assert may(99, -1, -1, -1)
    assert may(7), "everyone else has left"


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_dlion_with_nothing_left_out_is_sgd_on_the_joint_batch(workers: int) -> None:
    """N = 100, sync, equal batches, no transfer: single-process SGD, to float32 accuracy; so are the others."""
    generator = np.random.default_rng(4)
    curvature = generator.uniform(0.5, 2, SIZE).astype(np.float32)
    data = [generator.normal(size=(8 * 30, SIZE)).astype(np.float32) for _ in range(workers)]
    settings = config(
        "dlion",
        "sync",
        steps=30,
        max_n=100,
        batching="fixed",
        global_batch="fixed",
        transfer="none",
        value_type="float32",
    )
    expected = np.zeros(SIZE)
    for step in range(30):
        batch = np.concatenate([x[8 * step : 8 * step + 8] for x in data]).astype(np.float64)
        expected -= LEARNING_RATE * curvature * (expected - batch.mean(axis=0))
    others = [Config(strategy=name, steps=30, batch_size=8) for name in ("baseline", "allreduce")]
    for chosen in (settings, *others):
        replicas = [Quadratic(LAYOUT, curvature, LEARNING_RATE) for _ in range(workers)]
        result = run(chosen, replicas, data, weather=Weather(seed=1, delay=20))
        np.testing.assert_allclose(result.weights, np.tile(expected, (workers, 1)), rtol=1e-5, atol=1e-6)


# ---- batch sizes and knowledge, in the loop


@pytest.mark.parametrize("mode", STRATEGIES["dlion"].modes)
def test_batches_follow_the_machines_and_sum_to_the_global_batch(mode: str) -> None:
    def seconds(rank: int, samples: int) -> float:
        return (0.01 + 0.001 * samples) * (3 if rank == 1 else 1)

    settings = config("dlion", mode, steps=60, batch_size=40, batching="auto")
    result = trained(settings, weather=Weather(seed=2, delay=10), seconds=seconds)
    last = [records[-1] for records in result.records]
    assert [record.gbs for record in last] == [120] * 3
    assert sum(record.lbs for record in last) == 120
    finish_s = [seconds(rank, record.lbs) for rank, record in enumerate(last)]
    assert max(finish_s) - min(finish_s) <= 0.0031  # one sample of the slowest
    first = [records[0].lbs for records in result.records]
    assert first == [record.lbs for record in last], "profiled before the first step"


@pytest.mark.parametrize("mode", STRATEGIES["dlion"].modes)
def test_a_machine_that_slows_down_in_mid_run_gets_smaller_batches(mode: str) -> None:
    computed = [0, 0, 0]

    def seconds(rank: int, samples: int) -> float:
        computed[rank] += 1
        return 0.001 * samples * (4 if rank == 0 and computed[0] > 30 else 1)

    result = trained(config("dlion", mode, steps=90, batch_size=40), seconds=seconds)
    assert result.records[0][5].lbs == 40
    # 13 1/3, 53 1/3, 53 1/3: which of the three gets the sample that is left is not said
    assert result.records[0][-1].lbs in (13, 14)
    # Where nobody waits, the last steps of two workers may be of two rounds, each of which gives it to someone else.
    assert abs(sum(records[-1].lbs for records in result.records) - 120) <= (0 if mode == "sync" else 1)


@pytest.mark.parametrize("mode", STRATEGIES["dlion"].modes)
def test_the_best_worker_s_knowledge_comes_to_the_worst(mode: str) -> None:
    """The others hardly learn by themselves and are sent next to nothing: only a transfer can help them."""
    replicas = [Quadratic(LAYOUT, np.full(SIZE, 0.003, np.float32), LEARNING_RATE) for _ in range(3)]
    replicas[0].w[:] = OPTIMUM
    settings = config(
        "dlion", mode, steps=90, max_n=0.01, unsent="drop", transfer="all", transfer_period=20, transfer_merge=0.75
    )
    result = run(settings, replicas, rows(3), weather=Weather(seed=1, delay=5))
    transfers = [worker.recorder.transfers for worker in result.workers]  # type: ignore[attr-defined]
    assert all(own for own in transfers)
    assert all(transfer.source == 0 for own in transfers for transfer in own)
    assert not any(transfer.merged for transfer in transfers[0])
    assert all(transfer.merged for own in transfers[1:] for transfer in own)
    away = np.abs(result.weights - OPTIMUM).max(axis=1) / np.abs(OPTIMUM).max()
    assert away[0] < 0.02
    for own, rest in zip(transfers[1:], away[1:], strict=True):
        assert rest <= 0.25 ** len(own) + 0.02


# ---- a gradient that is not finite, a worker that leaves


@every_mode
def test_a_gradient_that_is_not_finite_stops_everyone_and_reaches_nobody(name: str, mode: str) -> None:
    data = [np.tile(OPTIMUM, (16, 1)) for _ in range(3)]
    data[1][5] = np.nan
    replicas = specialists(3)
    options = {"batching": "fixed"} if has_option(name, "batching") else {}
    settings = config(name, mode, batch_size=2, steps=100_000, **options)
    with pytest.raises(RunError, match=r"rank 1, step 2: .*--learning-rate.*--non-finite skip"):
        run(settings, replicas, data, weather=Weather(seed=1, delay=30))
    assert all(np.isfinite(replica.w).all() for replica in replicas)


def test_a_gradient_that_is_not_finite_can_be_left_out() -> None:
    data = [np.tile(OPTIMUM, (16, 1)) for _ in range(2)]
    data[1][5] = np.nan
    result = run(config("baseline", "sync", batch_size=2, steps=200, non_finite="skip"), specialists(2), data)
    np.testing.assert_allclose(result.weights, np.tile(OPTIMUM, (2, 1)), atol=0.02)


@every_mode
def test_a_worker_that_must_stop_ends_the_run_for_all(name: str, mode: str) -> None:
    def stop(worker: Worker, network: Network) -> None:
        if worker.rank == 1 and worker.step == 10:
            worker.stop_reason = "SIGTERM"

    weather = Weather(seed=3, delay=30)
    result = trained(config(name, mode, steps=100_000), weather=weather, on_step=stop)
    assert [worker.stop_reason for worker in result.workers] == ["", "SIGTERM", ""]


@every_mode
@pytest.mark.parametrize("last", [10, 39])
def test_a_worker_that_fails_when_its_step_is_done_holds_nobody(name: str, mode: str, last: int) -> None:
    """As when its disk is full; also at the last of 40 steps, which the others complete without it."""

    def fail(record: StepRecord) -> None:
        if record.step == last:
            raise RunError("planted")

    def prepare(worker: Worker) -> None:
        if worker.rank == 1:
            worker.on_step = fail

    with pytest.raises(RunError, match="planted"):
        trained(config(name, mode, steps=40), weather=Weather(seed=3, delay=30), prepare=prepare)


@pytest.mark.parametrize(("name", "mode"), [pair for pair in EVERY_MODE if pair[1] != "sync"])
def test_workers_that_end_at_different_times_hold_nobody(name: str, mode: str) -> None:
    """By the clock the fast ones are done long before the slow one; transfers and rounds are then half-way."""
    for seed in range(4):
        weather = Weather(seed=seed, delay=60, slow=seed % 3, slowness=15)
        settings = config(name, mode, steps=None, seconds=0.5, transfer_period=3)
        result = trained(settings, weather=weather)
        assert all(records for records in result.records)


@pytest.mark.parametrize(("name", "mode"), [pair for pair in EVERY_MODE if pair[1] != "sync"])
def test_who_has_left_is_neither_waited_for_nor_sent_anything(name: str, mode: str) -> None:
    def end_early(worker: Worker, network: Network) -> None:
        if worker.rank == 1 and worker.step == 10:
            worker.end_step = 10

    settings = config(name, mode, steps=120, transfer="none")
    result = trained(settings, weather=Weather(seed=2, delay=10), on_step=end_early)
    assert [len(records) for records in result.records] == [120, 10, 120]
    for rank in (0, 2):
        assert 1 in result.sent[rank][0]
        assert all(1 not in links for links in result.sent[rank][-30:])
        assert 1 not in result.workers[rank].members


@pytest.mark.parametrize("name", in_mode["sync"])
def test_in_sync_time_ends_for_everyone_after_the_same_step(name: str) -> None:
    """Who sees the end first has not taken the step that others are in, so that nobody can complete it.

    Workers that make local steps are at the same step after an outer step, so here each step has one.
    """
    for seed in range(5):
        exact = {"value_type": "float32"} if has_option(name, "value_type") else {}
        settings = config(name, "sync", steps=None, seconds=0.4, transfer="none", h=1, **exact)
        result = trained(settings, weather=Weather(seed=seed, delay=40, slow=seed % 3, slowness=4))
        assert len({len(records) for records in result.records}) == 1
        if name not in ADD_THEIR_OWN:
            np.testing.assert_allclose(result.weights[1:], result.weights[[0, 0]], rtol=1e-4, atol=1e-6)
