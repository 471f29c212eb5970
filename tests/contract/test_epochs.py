"""Epochs in the loop: equal logs everywhere, under any delays, with every strategy; nobody hangs when one leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dlion_mpi.errors import RunError
from dlion_mpi.loop.epochs import EPOCHS, Epochs
from dlion_mpi.loop.worker import Worker
from dlion_mpi.vector.gradient import Gradient
from tests.contract.problem import LAYOUT, ROUGH, config, every_mode, rows, specialists, trained
from tests.inmemory import Network, Quadratic, Run, Weather, run

WORKERS = 3


class Watcher:
    """Keeps what it is told. ``act``: called at the end of an epoch."""

    def __init__(self, act: Callable[[Watcher, int], None] = lambda watcher, epoch: None) -> None:
        self.calls: list[tuple[str, int]] = []
        self.logs: list[dict[str, float]] = []
        self.act, self.stopping, self.rate = act, False, 1.0

    def epoch_begin(self, epoch: int) -> None:
        self.calls.append(("begin", epoch))

    def batch_begin(self, batch: int) -> None:
        self.calls.append(("batch", batch))

    def batch_end(self, batch: int, logs: dict[str, float]) -> None: ...

    def epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        self.calls.append(("end", epoch))
        self.logs.append(logs)
        self.act(self, epoch)

    def stops(self) -> bool:
        return self.stopping

    def rates(self) -> list[float]:
        return [self.rate]

    def set_rates(self, rates: Sequence[float]) -> None:
        (self.rate,) = rates


def watched(
    name: str, mode: str, watchers: Sequence[Watcher], epoch: int | None = 10, **options: Any
) -> tuple[Run, Sequence[Watcher]]:
    def prepare(worker: Worker) -> None:
        worker.epochs = Epochs(watchers[worker.rank], epoch, 48, worker.collectives)

    weather = options.pop("weather", ROUGH)
    settings = config(name, mode, **{"steps": 35, **options})
    return trained(settings, weather=weather, prepare=prepare), watchers


@every_mode
@pytest.mark.parametrize("weather", [ROUGH, Weather(seed=2, delay=300, slow=1, slowness=30, blocked=0.8)])
def test_all_workers_get_equal_logs_at_the_end_of_every_epoch(name: str, mode: str, weather: Weather) -> None:
    result, watchers = watched(name, mode, [Watcher() for _ in range(WORKERS)], weather=weather)
    assert [len(watcher.logs) for watcher in watchers] == [3] * WORKERS
    assert watchers[0].logs == watchers[1].logs == watchers[2].logs
    losses = [[record.loss for record in records[:10]] for records in result.records]
    if mode != "bounded" or name != "hop":  # whose workers may leave steps out
        assert watchers[0].logs[0]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    for watcher in watchers:
        marks = [call for call in watcher.calls if call[0] != "batch"]
        assert marks == [("end", 0), ("begin", 1), ("end", 1), ("begin", 2), ("end", 2), ("begin", 3)]


def test_batches_count_within_their_epoch() -> None:
    _, watchers = watched("baseline", "sync", [Watcher() for _ in range(WORKERS)])
    batches = [number for kind, number in watchers[0].calls if kind == "batch"]
    assert batches == [*range(10), *range(10), *range(10), *range(5)]


def test_logs_count_by_samples() -> None:
    """A worker whose loss is 1 has 24 samples of 32 in its epoch, the others none of it."""

    class Lossy(Quadratic):
        loss = 0.0

        def gradient(self, batch: npt.NDArray[Any]) -> Gradient:
            return Gradient(self.loss, super().gradient(batch).vector)

    replicas = [Lossy(own.layout, own.curvature, 0.05) for own in specialists(2)]
    replicas[0].loss = 1.0
    watchers = [Watcher(), Watcher()]

    def prepare(worker: Worker) -> None:
        worker.epochs = Epochs(watchers[worker.rank], 20, 0, worker.collectives)

    def seconds(rank: int, samples: int) -> float:
        return 0.001 * samples * (1 if rank == 0 else 3)

    settings = config("dlion", "sync", steps=20, batch_size=16, batching="auto")
    result = run(settings, replicas, rows(2), prepare=prepare, seconds=seconds)
    assert result.records[0][-1].lbs == 24
    assert watchers[0].logs[0]["loss"] == pytest.approx(0.75, rel=1e-5)


@every_mode
def test_one_that_stops_stops_all_after_the_same_step(name: str, mode: str) -> None:
    def act(watcher: Watcher, epoch: int) -> None:
        watcher.stopping = watcher is watchers[1] and epoch == 1

    watchers = [Watcher(act) for _ in range(WORKERS)]
    result, _ = watched(name, mode, watchers)
    assert {worker.step for worker in result.workers} == {20}
    assert all(worker.stop_reason for worker in result.workers)


@every_mode
def test_rank_0_s_learning_rate_counts_everywhere(name: str, mode: str) -> None:
    def act(watcher: Watcher, epoch: int) -> None:
        watcher.rate = epoch + 10 * watchers.index(watcher)

    watchers = [Watcher(act) for _ in range(WORKERS)]
    watched(name, mode, watchers)
    assert [watcher.rate for watcher in watchers] == [2.0] * WORKERS


@every_mode
@pytest.mark.parametrize("last", [9, 10, 11, 20])
def test_a_worker_that_fails_near_the_end_of_an_epoch_holds_no_other(name: str, mode: str, last: int) -> None:
    def fail(worker: Worker, network: Network) -> None:
        if worker.rank == 1 and worker.step >= last:
            raise RunError("planted")

    def prepare(worker: Worker) -> None:
        worker.epochs = Epochs(Watcher(), 10, 48, worker.collectives)

    with pytest.raises(RunError, match="planted"):
        trained(config(name, mode, steps=60), weather=ROUGH, prepare=prepare, on_step=fail)


@every_mode
@pytest.mark.parametrize("seed", range(3))
def test_by_the_clock_all_end_and_agree_on_their_epochs(name: str, mode: str, seed: int) -> None:
    weather = Weather(seed=seed, delay=60, slow=seed % 3, slowness=15)
    watchers = [Watcher() for _ in range(WORKERS)]
    result, _ = watched(name, mode, watchers, steps=None, seconds=0.6, weather=weather)
    assert watchers[0].logs == watchers[1].logs == watchers[2].logs
    assert all(len(call.parts) == WORKERS for call in result.collectives.calls.get(EPOCHS, []))


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_a_step_that_was_left_out_does_not_count_in_the_logs(policy: str) -> None:
    class Lossy(Quadratic):
        steps = 0

        def gradient(self, batch: npt.NDArray[Any]) -> Gradient:
            self.steps += 1
            return Gradient(float("nan") if self.steps == 3 else 2.0, super().gradient(batch).vector)

    watcher = Watcher()

    def prepare(worker: Worker) -> None:
        worker.epochs = Epochs(watcher, 10, 0, worker.collectives)

    replica = Lossy(LAYOUT, np.ones(LAYOUT.size, np.float32), 0.05)
    settings = config("baseline", "sync", steps=10, non_finite=policy)
    if policy == "skip":
        run(settings, [replica], rows(1), prepare=prepare)
        assert watcher.logs == [{"loss": 2.0}]
    else:
        with pytest.raises(RunError, match="the loss is nan"):
            run(settings, [replica], rows(1), prepare=prepare)


def test_a_worker_that_leaves_out_a_whole_epoch_has_the_logs_of_the_others() -> None:
    class Lossy(Quadratic):
        loss = 2.0

        def gradient(self, batch: npt.NDArray[Any]) -> Gradient:
            return Gradient(self.loss, super().gradient(batch).vector)

    replicas = [Lossy(own.layout, own.curvature, 0.05) for own in specialists(2)]
    replicas[1].loss = float("nan")
    watchers = [Watcher(), Watcher()]

    def prepare(worker: Worker) -> None:
        worker.epochs = Epochs(watchers[worker.rank], 10, 0, worker.collectives)

    run(config("baseline", "sync", steps=10, non_finite="skip"), replicas, rows(2), prepare=prepare)
    assert [watcher.logs for watcher in watchers] == [[{"loss": 2.0}]] * 2


def test_a_resumed_worker_has_its_epoch_and_its_learning_rate() -> None:
    whole = Epochs(Watcher(), 10, 0, collectives=None)  # type: ignore[arg-type]
    whole.epoch, whole._end, whole._watcher.rate = 4, 50, 0.125  # type: ignore[attr-defined]
    for resume_rates, rate in ((True, 0.125), (False, 1.0)):
        resumed = Epochs(Watcher(), 10, 0, collectives=None, resume_rates=resume_rates)  # type: ignore[arg-type]
        resumed.from_arrays(whole.to_arrays())
        assert (resumed.epoch, resumed._end, resumed._watcher.rates()) == (4, 50, [rate])
    fresh = Epochs(Watcher(), 10, 0, collectives=None)  # type: ignore[arg-type]
    fresh.from_arrays({})
    assert fresh.epoch == 0


def test_an_epoch_is_the_training_set_once_unless_its_steps_are_given() -> None:
    """48 rows, 24 of them in a step."""
    _, watchers = watched("baseline", "sync", [Watcher() for _ in range(WORKERS)], epoch=None)
    assert len(watchers[0].logs) == 17


def test_one_worker_alone_has_epochs_too() -> None:
    watcher = Watcher()

    def prepare(worker: Worker) -> None:
        worker.epochs = Epochs(watcher, 10, 48, worker.collectives)

    trained(config("dlion", "bounded", steps=25), workers=1, prepare=prepare)
    assert [logs.keys() for logs in watcher.logs] == [{"loss"}, {"loss"}]
