"""The exchange after the last step: all end with equal weights, and with every movement that has been sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dlion_mpi.loop.worker import Worker
from dlion_mpi.simulation import driver
from dlion_mpi.simulation.simulate import simulate
from dlion_mpi.strategies.dlion import Dlion, DlionState
from dlion_mpi.strategies.types import LinkViews, LocalUpdate, Outbox
from dlion_mpi.vector.layout import Vector
from tests.contract.test_simulated_runs import cloud, config


class Observed:
    """The movements that the workers of a run computed, those lacking at the end, and the first and last weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.workers: list[Worker] = []
        self.first: list[Vector] = []
        self.computed: list[npt.NDArray[np.float64]] = []
        self.lacked: list[Vector] = []
        outgoing, lacking = Dlion.outgoing, Dlion.lacking

        def noted_outgoing(strategy: Dlion, state: DlionState, local: LocalUpdate, links: LinkViews) -> Outbox:
            self.computed.append(local.vector.astype(np.float64) * local.lbs / local.gbs)
            return outgoing(strategy, state, local, links)

        def noted_lacking(strategy: Dlion, state: DlionState) -> Vector | None:
            found = lacking(strategy, state)
            self.lacked += [] if found is None else [found.copy()]
            return found

        def noted_worker(**parts: Any) -> Worker:
            self.first.append(parts["replica"].weights())
            self.workers.append(Worker(**parts))
            return self.workers[-1]

        monkeypatch.setattr(Dlion, "outgoing", noted_outgoing)
        monkeypatch.setattr(Dlion, "lacking", noted_lacking)
        monkeypatch.setattr(driver, "Worker", noted_worker)

    @property
    def last(self) -> list[Vector]:
        """The weights of every worker after the run."""
        return [worker.replica.weights() for worker in self.workers]


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 25, "value_type": "bfloat16", "link_share": 0.05},
        {"steps": 25, "value_type": "int4", "patience": 0.0},
        {"seconds": 6.0, "value_type": "sign"},
        {"steps": 25, "value_type": "int2"},
        {"steps": 25, "value_type": "sign", "max_n": 100},
        {"seconds": 6.0, "sync": "async", "value_type": "int2"},
        {"steps": 20, "sync": "sync", "value_type": "int4"},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
)
def test_all_end_with_every_movement_that_was_sent(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal weights: the first ones plus LBS / GBS u of all steps of all workers, without the common residuals."""
    seen = Observed(monkeypatch)
    simulate(config(**options), cloud((24.0, 12.0, 4.0), mbit=2.0), report=False)
    first, *others = seen.last
    assert all(weights.tobytes() == first.tobytes() for weights in others)
    common = np.sum([worker.state.residuals.common for worker in seen.workers], axis=0, dtype=np.float64)
    assert np.abs(common).max() > 1e-4, "everything was sent"
    wanted = np.sum(seen.computed, axis=0) - common
    np.testing.assert_allclose(first - seen.first[0], wanted, atol=2e-5)


def test_what_was_dropped_is_not_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Observed(monkeypatch)
    simulate(config(steps=20, unsent="drop", transfer="none"), cloud((24.0, 12.0, 4.0), mbit=2.0), report=False)
    assert not seen.lacked
    assert len({weights.tobytes() for weights in seen.last}) == 3


def test_a_weight_that_the_receiver_gives_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Observed(monkeypatch)
    simulate(config(steps=20, weighting="paper"), cloud((24.0, 12.0, 4.0), mbit=2.0), report=False)
    assert not seen.lacked
