"""The strategies that sum gradients over all ranks: the same weights, whole metrics, an end for all."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from mpi4py import MPI

from dlion_mpi.algorithms.ring import ring_bytes
from dlion_mpi.errors import RunError
from dlion_mpi.learner import backend
from dlion_mpi.learner.models import build
from dlion_mpi.run import Result, run
from dlion_mpi.strategies.contract import Strategy
from dlion_mpi.strategies.registry import STRATEGIES
from tests.mpi.test_training import PLAIN
from tests.options import config
from tests.shards import byte_shard

MODEL = "tests.nets:dense"
PARAMETERS = 2410


def _built() -> bool:
    return any(d.metadata["Name"] == "horovod" for d in metadata.distributions())


needs_horovod = pytest.mark.skipif(not _built(), reason="Horovod is not installed: bash env/horovod/build.sh")
both = pytest.mark.parametrize("strategy", ["allreduce", pytest.param("horovod", marks=needs_horovod)])


def train(model: Any = None, **options: Any) -> Result:
    return run(config(**{"data": "digits", "model": MODEL, **options}), model=model, report=False)


@pytest.mark.mpi(min_size=2)
@needs_horovod
def test_with_equal_batches_all_give_the_same_weights_after_50_steps(world: MPI.Intracomm) -> None:
    runs: list[tuple[str, dict[str, Any]]] = [("dlion", PLAIN), ("baseline", {}), ("allreduce", {})]
    backend.start(1)
    weights = []
    for strategy, options in [*runs, ("horovod", {}), ("horovod", {})]:
        model = build(MODEL, byte_shard(), 0)
        start = np.concatenate([w.ravel() for w in model.get_weights()])
        assert train(model, strategy=strategy, steps=50, learning_rate=0.1, **options).exit_code == 0
        weights.append(np.concatenate([w.ravel() for w in model.get_weights()]))
    assert np.abs(weights[0] - start).max() > 0.05
    for own in weights[1:]:
        np.testing.assert_allclose(own, weights[0], rtol=0, atol=2e-6)


@pytest.mark.mpi
@both
def test_a_run_has_whole_metrics_and_a_ring_s_bytes(world: MPI.Intracomm, strategy: str, shared_folder: Path) -> None:
    result = train(strategy=strategy, steps=20, out=str(shared_folder)).summary
    rank, size = world.Get_rank(), world.Get_size()
    assert (result["strategy"], result["ranks"], result["steps"]) == (strategy, size, 20)
    with h5py.File(shared_folder / f"metrics-{rank:05d}.h5", "r", swmr=True) as file:
        assert file["ended"][()] == 1
        sent = file["links/bytes_sent"][:].astype(np.int64)
    assert sent.shape == (20, size)
    expected = np.zeros_like(sent)
    expected[:, (rank + 1) % size] = ring_bytes(PARAMETERS, rank, size)[0] * np.arange(1, 21)
    # At the last step another rank may have said already that it leaves, and been answered.
    np.testing.assert_array_equal(sent[:-1], expected[:-1])


OPTIONS: dict[str, dict[str, Any]] = {"powersgd": {"rank": 1}, "local-sgd": {"h": 5}, "diloco": {"h": 5}}
summing = pytest.mark.parametrize("strategy", ["allreduce", "powersgd", "local-sgd", "diloco"])


@pytest.mark.mpi
@summing
def test_a_run_learns_and_all_replicas_are_equal_after_the_last_sum(world: MPI.Intracomm, strategy: str) -> None:
    backend.start(1)
    model = build(MODEL, byte_shard(), 0)
    settings = {"steps": 200, "learning_rate": 0.1, **OPTIONS.get(strategy, {})}
    result = train(model, strategy=strategy, **settings)
    assert result.exit_code == 0
    assert result.summary["accuracy_mean"] > 0.8
    weights = np.concatenate([np.ravel(w) for w in model.get_weights()])
    for other in world.allgather(weights):
        np.testing.assert_allclose(weights, other, rtol=0, atol=1e-6)


@pytest.mark.mpi(min_size=2)
@summing
def test_by_the_clock_all_end_in_good_order(world: MPI.Intracomm, strategy: str) -> None:
    outcome = train(strategy=strategy, seconds=1.0, **OPTIONS.get(strategy, {}))
    assert outcome.exit_code == 0
    assert outcome.summary["steps"] > 5


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("strategy", ["allreduce", "powersgd", "diloco", pytest.param("horovod", marks=needs_horovod)])
def test_a_rank_that_fails_and_can_say_why_ends_all_in_good_order(
    world: MPI.Intracomm, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outgoing(self: Strategy, state: Any, local: Any, links: Any) -> Any:
        if local.step == 7 and world.Get_rank() == 1:
            raise RunError("planted")
        return {}

    monkeypatch.setattr(STRATEGIES[strategy], "outgoing", outgoing)
    outcome = train(strategy=strategy, seconds=60.0, **({"h": 1} if strategy == "diloco" else {}))
    assert outcome.exit_code == 1
    assert outcome.summary["stopped"] == "rank 1: planted"
    assert outcome.summary["steps"] == 7
