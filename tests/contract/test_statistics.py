"""Statistics of all workers are brought together while they train, and are equal after the last step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dlion_mpi.errors import RunError
from dlion_mpi.loop import averages
from dlion_mpi.loop.statistics import average, mean, weighted
from dlion_mpi.loop.worker import Worker
from dlion_mpi.vector.gradient import Gradient
from dlion_mpi.vector.layout import Vector
from dlion_mpi.vector.named_arrays import Array, Arrays, vector
from tests.contract.problem import LAYOUT, config, every_mode, rows
from tests.inmemory import Network, Quadratic, Run, Weather, run

MOMENTUM = np.float32(0.9)
MODES = [("dlion", "bounded"), ("dlion", "async"), ("dlion", "sync"), ("hop", "bounded"), ("diloco", "sync")]
some_modes = pytest.mark.parametrize(("name", "mode"), MODES)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averages, "PERIOD", 5)


class Normalised(Quadratic):
    """Two moving averages: of its level, which differs by worker, and of 1, as a count of its steps."""

    def __init__(self, level: float) -> None:
        super().__init__(LAYOUT, np.ones(LAYOUT.size, np.float32), 0.05)
        self.level = np.float32(level)
        self.s = np.zeros(2, np.float32)

    def gradient(self, batch: npt.NDArray[Any]) -> Gradient:
        self.s = MOMENTUM * self.s + (1 - MOMENTUM) * np.array([self.level, 1], np.float32)
        return super().gradient(batch)

    def statistics(self) -> Vector:
        return self.s.copy()

    def set_statistics(self, statistics: Vector) -> None:
        self.s = statistics.copy()

    def to_arrays(self) -> Arrays:
        return {"w": self.w.copy(), "s": self.s.copy()}

    def from_arrays(self, arrays: Mapping[str, Array], *, generators: bool = True) -> None:
        self.w, self.s = vector(arrays, "w", LAYOUT.size), vector(arrays, "s", 2)


def trained(name: str, mode: str, **options: Any) -> tuple[list[Normalised], Run]:
    weather = options.pop("weather", Weather(seed=2, delay=20))
    on_step = options.pop("on_step", lambda worker, network: None)
    replicas = [Normalised(level) for level in (0, 3, 6)]
    settings = config(name, mode, **{"steps": 200, "batching": "fixed", **options})
    return replicas, run(settings, replicas, rows(3), weather=weather, on_step=on_step)


@some_modes
def test_they_stay_near_the_mean_while_workers_train(name: str, mode: str) -> None:
    """By themselves they would be 0, 3 and 6; a worker that moves between two rounds leaves the mean by 5 steps."""
    replicas, result = trained(name, mode)
    levels = [replica.s[0] for replica in replicas]
    assert len(result.collectives.calls["averages"]) >= 30
    np.testing.assert_allclose(np.mean(levels), 3, atol=0.4)
    assert max(levels) - min(levels) < 4.5
    np.testing.assert_allclose([replica.s[1] for replica in replicas], 1, atol=0.01), "and count every step once"


@every_mode
def test_after_the_run_all_rounds_are_complete(name: str, mode: str) -> None:
    """Also where a worker is much slower, and steps are left out."""
    _, result = trained(name, mode, weather=Weather(seed=3, delay=60, slow=1, slowness=15), steps=60)
    calls = result.collectives.calls["averages"]
    assert calls
    assert all(len(call.parts) == 3 for call in calls)


def test_in_lockstep_a_round_takes_effect_at_one_step_everywhere() -> None:
    results = [
        trained("dlion", "sync", steps=47, weather=weather)[0]
        for weather in (Weather(seed=1), Weather(seed=2, delay=300), Weather(seed=3, delay=5, slow=1))
    ]
    kept = {tuple(replica.s.tobytes() for replica in replicas) for replicas in results}
    assert len(kept) == 1


@every_mode
@pytest.mark.parametrize("last", [9, 10, 11])
def test_a_worker_that_fails_near_a_round_holds_no_other(name: str, mode: str, last: int) -> None:
    def fail(worker: Worker, network: Network) -> None:
        if worker.rank == 1 and worker.step == last:
            raise RunError("planted")

    with pytest.raises(RunError, match="planted"):
        trained(name, mode, steps=40, on_step=fail)


@every_mode
def test_a_signal_near_a_round_ends_all(name: str, mode: str) -> None:
    def stop(worker: Worker, network: Network) -> None:
        if worker.rank == 1 and worker.step == 10:
            worker.stop_reason = "SIGTERM"

    _, result = trained(name, mode, steps=100_000, on_step=stop)
    assert result.workers[1].stop_reason == "SIGTERM"


def test_without_statistics_nothing_is_sent() -> None:
    replicas = [Quadratic(LAYOUT, np.ones(LAYOUT.size, np.float32), 0.05) for _ in range(2)]
    result = run(config("dlion", "bounded", steps=60), replicas, rows(2))
    assert "averages" not in result.collectives.calls
    alone = run(config("dlion", "bounded", steps=60), [Normalised(1)], rows(1))
    assert "averages" not in alone.collectives.calls


def test_statistics_that_are_not_finite_stay_with_nobody() -> None:
    """They count nothing in the sum, and the mean replaces them."""
    total = weighted(np.array([np.nan, 1], np.float32), 8) + weighted(np.array([2, 4], np.float32), 8)
    np.testing.assert_array_equal(mean(total), [2, 4])
    assert mean(weighted(np.array([np.inf], np.float32), 8)) is None
    replicas = [Normalised(0), Normalised(0)]
    replicas[0].s[:] = np.nan
    replicas[1].s[:] = 7
    run(config("dlion", "sync", steps=7, batching="fixed"), replicas, rows(2))
    assert all(np.isfinite(replica.s).all() for replica in replicas)


def test_a_worker_counts_with_its_samples() -> None:
    """93 samples against 1: what one row says of a distribution is next to nothing."""
    replicas = [Normalised(0), Normalised(0)]
    replicas[0].s[:], replicas[1].s[:] = 1, 95
    average(replicas, [93, 1])
    for replica in replicas:
        np.testing.assert_allclose(replica.s, 2, rtol=1e-6)
    alone = Normalised(0)
    average([alone], [5])
    np.testing.assert_array_equal(alone.s, 0)
