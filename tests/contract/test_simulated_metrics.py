"""Test metrics of the user's own models, in virtual time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlion_mpi.config.fields import Every
from dlion_mpi.config.target import Target
from dlion_mpi.errors import UserError
from dlion_mpi.learner.batch import Batch
from dlion_mpi.learner.shards import Shard
from dlion_mpi.learner.source import Table
from dlion_mpi.metrics.reader import load
from dlion_mpi.metrics.series import curve
from dlion_mpi.microcloud.environments import Environment, Phase
from dlion_mpi.simulation.simulate import simulate
from tests.options import config

WORKERS = 3
STRATEGIES = ["dlion", "allreduce", "free-network"]


def cloud() -> Environment:
    phase = Phase(cores=(24.0,) * WORKERS, uplink_mbit=(1000.0,) * WORKERS)
    return Environment(name="test", workers=WORKERS, phases=(phase,))


def line() -> Any:
    """A regression that is compiled with two metrics."""
    import keras

    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae", keras.metrics.R2Score(name="r2_score")])
    return model


def shards(*, tests: bool = True) -> list[Shard]:
    x = np.linspace(-1, 1, 64, dtype=np.float32)[:, None]
    rows = Table.of(Batch(x, 2 * x))
    return [Shard(name="lines", source="memory", train=rows, test=rows if tests else None) for _ in range(WORKERS)]


def run(strategy: str, *, tests: bool = True, **options: Any) -> dict[str, Any]:
    given = {"strategy": strategy, "model": "line", "data": "lines", "evaluate_every": Every(steps=5), **options}
    return simulate(config(**given), cloud(), model=line(), shards=shards(tests=tests), report=False).summary


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("target", ["val_loss<=0.1", "mae<=0.3", "r2_score>=0.9"])
def test_a_target_of_any_metric_ends_the_run_when_it_is_reached(strategy: str, target: str, tmp_path: Path) -> None:
    wanted = Target.parse(target)
    found = run(strategy, target=wanted, out=str(tmp_path / "run"))
    assert found["stopped"] == f"target {target} reached"
    assert wanted.reached(found[f"{wanted.metric}_mean"])
    assert not wanted.reached({"val_loss": 4 / 3, "mae": 1.0, "r2_score": 0.0}[wanted.metric]), "as before the run"
    means = curve(load(tmp_path / "run"), wanted.metric)
    assert means.reached_s(wanted) == found["target_reached_s"]
    assert not any(wanted.reached(mean) for mean in means.mean[means.time_s < found["target_reached_s"]].tolist())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_test_rows_nothing_is_tested(strategy: str, tmp_path: Path) -> None:
    found = run(strategy, tests=False, steps=12, out=str(tmp_path / "run"))
    assert found["steps"] == 12
    assert not [key for key in found if key.endswith(("_mean", "_std", "_per_rank"))]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    whole = load(tmp_path / "run")
    assert whole.metrics == []
    assert all(len(rank.evaluations["time_s"]) == 0 for rank in whole.ranks)
    with pytest.raises(UserError, match="nothing is tested without validation data"):
        run(strategy, tests=False, target=Target("mae", "<=", 0.3))


def test_an_unknown_metric_is_refused_before_the_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the model has no metric accuracy; it has val_loss, mae, r2_score"):
        run("dlion", target=Target("accuracy", ">=", 0.5), out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
