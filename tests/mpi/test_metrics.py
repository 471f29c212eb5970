"""Test metrics of the user's own models, in runs of all ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from mpi4py import MPI

from dlion_mpi.config.target import Target
from dlion_mpi.errors import UserError
from dlion_mpi.learner import backend
from dlion_mpi.learner.batch import Batch
from dlion_mpi.learner.shards import Shard
from dlion_mpi.learner.source import Table
from dlion_mpi.run import Result, run
from tests.options import config

MOST_RANKS = 3

APART: dict[str, Any] = {"strategy": "diloco", "h": 10_000}
"""Workers that never exchange anything."""


def regression() -> Any:
    """A line through the origin: compiled with a mean absolute error, and a metric of which more is better."""
    import keras

    backend.start(1)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    model.compile(keras.optimizers.SGD(0.05), "mse", metrics=["mae", keras.metrics.R2Score(name="r2_score")])
    return model


def rows(slope: float) -> Batch:
    x = np.linspace(-1, 1, 64, dtype=np.float32)[:, None]
    return Batch(x, np.float32(slope) * x)


def shard(train_slope: float, test_slope: float | None) -> Shard:
    test = None if test_slope is None else Table.of(rows(test_slope))
    return Shard(name="lines", source="memory", train=Table.of(rows(train_slope)), test=test)


def train(own: Shard, model: Any = None, *, report: bool = False, **options: Any) -> Result:
    given = {"steps": 40, "batch_size": 16, "model": "lines", "data": "lines", **options}
    return run(config(**given), model=model or regression(), own_data=lambda: own, report=report)


@pytest.mark.mpi
def test_all_metrics_are_in_files_and_result(world: MPI.Intracomm, shared_folder: Path) -> None:
    """Every rank trains another slope, so that their metrics differ."""
    rank, size = world.Get_rank(), world.Get_size()
    done = train(shard(1.0 + rank, 1.0), out=str(shared_folder), **(APART if size > 1 else {})).summary
    assert json.loads(json.dumps(done, allow_nan=False)) == done
    with h5py.File(shared_folder / f"metrics-{rank:05d}.h5") as file:
        own = {name: float(column[-1]) for name, column in file["evaluations"].items()}
    assert {"val_loss", "mae", "r2_score"} <= own.keys()
    for name in ("val_loss", "mae", "r2_score"):
        by_rank = [float(value) for value in world.allgather(own[name])]
        assert done[f"{name}_per_rank"] == pytest.approx(by_rank, rel=1e-5)
        assert done[f"{name}_mean"] == pytest.approx(np.mean(by_rank), rel=1e-5)
        assert done[f"{name}_std"] == pytest.approx(np.std(by_rank), rel=1e-4, abs=1e-7)
    assert own["val_loss"] != pytest.approx(own["mae"], rel=1e-3)
    assert not [key for key in done if key.startswith("accuracy")]


@pytest.mark.mpi
@pytest.mark.parametrize("target", ["mae<=0.3", "r2_score>=0.5"])
def test_any_metric_may_end_the_run(world: MPI.Intracomm, target: str) -> None:
    done = train(shard(1.0, 1.0), steps=5000, target=target, evaluate_every="10").summary
    assert done["stopped"] == f"target {target} reached"
    assert 0 < done["target_reached_s"] <= done["seconds"]
    assert done["steps"] < 5000
    wanted = Target.parse(target)
    assert wanted.reached(done[f"{wanted.metric}_mean"])


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "accuracy>=0.5"}, "--target accuracy>=0.5: the model has no metric accuracy; it has val_loss, mae"),
        ({"save_model": "a.keras", "best": "auc"}, "--best auc: the model has no metric auc; it has val_loss, mae"),
    ],
)
def test_an_unknown_name_is_refused_before_the_first_step(
    world: MPI.Intracomm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        train(shard(1.0, 1.0), **options)
    assert said in str(refused.value)


@pytest.mark.mpi
def test_without_validation_data_nothing_is_tested(world: MPI.Intracomm, shared_folder: Path) -> None:
    done = train(shard(1.0, None), out=str(shared_folder), evaluate_every="5").summary
    assert done["steps"] == 40
    assert not [key for key in done if key.endswith(("_mean", "_std", "_per_rank"))]
    with h5py.File(shared_folder / f"metrics-{world.Get_rank():05d}.h5") as file:
        assert set(file["evaluations"]) == {"step", "time_s"}
        assert len(file["evaluations/step"]) == 0
    with pytest.raises(UserError, match="nothing is tested without validation data"):
        train(shard(1.0, None), target="val_loss<=0.5")


@pytest.mark.mpi(min_size=2)
def test_ranks_of_which_one_has_no_validation_data_are_refused(world: MPI.Intracomm) -> None:
    with pytest.raises(UserError, match="rank 0 tests val_loss, mae, r2_score, rank 1 nothing"):
        train(shard(1.0, None if world.Get_rank() == 1 else 1.0))


@pytest.mark.mpi(min_size=2)
def test_different_test_sets_are_warned_about(world: MPI.Intracomm, capfd: pytest.CaptureFixture[str]) -> None:
    rank = world.Get_rank()
    train(shard(1.0, 1.0), report=True, progress_every=0)
    assert "another test set" not in capfd.readouterr().err
    train(shard(1.0, 1.0 if rank != 1 else 2.0), report=True, progress_every=0)
    said = capfd.readouterr().err
    assert ("rank 1: another test set than rank 0's" in said) == (rank == 0)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(("best", "whose"), [(None, 1), ("mae", 1), ("r2_score", 1)])
def test_the_best_worker_has_the_least_loss_or_the_greatest_score(
    world: MPI.Intracomm, shared_folder: Path, best: str | None, whose: int
) -> None:
    """All are tested with a slope of 1, which only rank 1 has trained."""
    import keras

    slope = 1.0 if world.Get_rank() == whose else 3.0
    file = shared_folder.with_suffix(".keras")
    done = train(shard(slope, 1.0), steps=200, save_model=str(file), best=best, **APART).summary
    assert int(np.argmin(done["val_loss_per_rank"])) == int(np.argmax(done["r2_score_per_rank"])) == whose
    world.Barrier()
    (kernel,) = keras.saving.load_model(file, compile=False).get_weights()
    assert kernel.item() == pytest.approx(1.0, abs=0.3)


@pytest.mark.mpi(min_size=2)
def test_without_validation_data_the_training_loss_tells_the_best(world: MPI.Intracomm, shared_folder: Path) -> None:
    import keras

    slope = 1.0 if world.Get_rank() == 1 else 30.0
    file = shared_folder.with_suffix(".keras")
    train(shard(slope, None), steps=20, save_model=str(file), **APART)
    world.Barrier()
    (kernel,) = keras.saving.load_model(file, compile=False).get_weights()
    assert 0 < kernel.item() < 1.1
