"""A worker that leaves holds no other, whatever round the others are in; see also `test_strategies.py`."""

from __future__ import annotations

import pytest

from dlion_mpi.loop import batch_sizes
from dlion_mpi.loop.worker import Worker
from tests.contract.problem import config, trained
from tests.inmemory import Network, Weather


@pytest.mark.parametrize(
    ("name", "mode"),
    [("diloco", "sync"), ("dlion", "sync"), ("dlion", "bounded"), ("allreduce", "sync")],
)
@pytest.mark.parametrize("last", [6, 7, 8, 13, 14, 15])
@pytest.mark.parametrize("seed", range(3))
def test_a_worker_leaves_near_a_round_of_batch_sizes(
    name: str, mode: str, last: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DiLoCo's workers exchange nothing between two outer steps: one may be ahead of the one that has left."""
    monkeypatch.setattr(batch_sizes, "PERIOD", 7)

    def stop(worker: Worker, network: Network) -> None:
        if worker.rank == 1 and worker.step == last:
            worker.stop_reason = "SIGTERM"

    settings = config(name, mode, steps=100_000, batching="auto", h=16)
    result = trained(settings, weather=Weather(seed=seed, delay=30, slow=2, slowness=10), on_step=stop)
    assert result.workers[1].stop_reason == "SIGTERM"


@pytest.mark.parametrize("last", [6, 7, 8])
def test_a_worker_leaves_near_a_transfer(last: int) -> None:
    def stop(worker: Worker, network: Network) -> None:
        if worker.rank == 1 and worker.step == last:
            worker.stop_reason = "SIGTERM"

    settings = config("dlion", "sync", steps=100_000, transfer="all", transfer_period=7)
    result = trained(settings, weather=Weather(seed=1, delay=30, slow=2, slowness=10), on_step=stop)
    assert result.workers[1].stop_reason == "SIGTERM"
