"""Checkpoints over real MPI with a real model: in `sync` a resumed run is the same to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from dlion_mpi import UserError, fit
from dlion_mpi.checkpoint import folder
from dlion_mpi.checkpoint.start import NEW, Start, plan
from dlion_mpi.learner import backend
from dlion_mpi.learner.models import build
from dlion_mpi.metrics import reader as runs
from dlion_mpi.run import Result, run
from tests.options import config
from tests.shards import byte_shard

MODEL = "tests.nets:normalised"
"""With dropout and batch normalisation: generators and statistics count as well."""
DLION = {"strategy": "dlion", "sync": "sync", "batching": "fixed", "max_n": 20, "transfer_period": 10, "momentum": 0.9}

on_few = pytest.mark.most_ranks(3)


def train(out: Path, start: Start = NEW, **options: Any) -> tuple[Result, np.ndarray]:
    """A run, and the weights and statistics it leaves in its model."""
    backend.start(1)
    model = build(MODEL, byte_shard(), 0)
    options = {"data": "digits", "model": MODEL, "learning_rate": 0.02, "out": str(out), **options}
    outcome = run(config(**options), model=model, report=False, start=start)
    return outcome, np.concatenate([np.ravel(v.numpy()).astype(np.float64) for v in model.variables])


@pytest.mark.mpi
@pytest.mark.parametrize(
    "options",
    [
        DLION,
        pytest.param({"strategy": "baseline", "momentum": 0.9}, marks=on_few),
        pytest.param({"strategy": "allreduce", "optimizer": "adam", "learning_rate": 0.002}, marks=on_few),
        pytest.param({"strategy": "powersgd", "momentum": 0.9}, marks=on_few),
        {"strategy": "diloco", "h": 7, "optimizer": "adam", "learning_rate": 0.002},
    ],
    ids=["dlion", "baseline", "allreduce", "powersgd", "diloco"],
)
def test_a_resumed_run_is_the_same_to_the_last_bit(
    world: MPI.Intracomm, options: dict[str, Any], shared_folder: Path
) -> None:
    whole, expected = train(shared_folder, steps=40, checkpoint_every="20", **options)
    half, end = folder.complete(shared_folder)
    assert folder.read_manifest(half).steps == [20] * world.Get_size()
    world.Barrier()
    if world.Get_rank() == 0:
        folder.remove(end)  # as if the run had been killed before
    world.Barrier()
    config, start = plan({"resume": str(shared_folder)})
    world.Barrier()
    resumed, weights = train(shared_folder, start, steps=config.steps, checkpoint_every="20", **options)
    np.testing.assert_array_equal(weights, expected)
    assert resumed.summary["accuracy_per_rank"] == whole.summary["accuracy_per_rank"]
    assert resumed.summary["steps"] == 40


@on_few
@pytest.mark.mpi
def test_fit_goes_on_with_a_run_as_the_command_does(world: MPI.Intracomm, shared_folder: Path) -> None:
    """Also with a model that Keras has given another name."""
    generator = np.random.default_rng(world.Get_rank())
    x, y = generator.random((60, 8, 8, 1), dtype=np.float32), np.arange(60) % 10
    shared: dict[str, Any] = {"progress_every": 0}
    backend.start(1)
    models = [build(MODEL, byte_shard(), seed) for seed in (0, 1)]
    models[1].name = "another"
    first = fit(models[0], (x, y), (x, y), steps=20, out=str(shared_folder), checkpoint_every="20", **shared)
    world.Barrier()
    second = fit(models[1], (x, y), (x, y), steps=30, resume=str(shared_folder), **shared)
    assert (first["steps"], second["steps"]) == (20, 30)
    world.Barrier()
    whole = runs.load(shared_folder)
    assert whole.ended
    for rank in whole.ranks:
        np.testing.assert_array_equal(rank.steps["step"], np.arange(30))
    world.Barrier()
    with pytest.raises(UserError, match="--batch-size 50"):
        fit(models[1], (x, y), (x, y), batch_size=50, resume=str(shared_folder), **shared)


@pytest.mark.mpi
def test_a_loose_strategy_goes_on(world: MPI.Intracomm, shared_folder: Path) -> None:
    train(shared_folder, strategy="hop", steps=40, checkpoint_every="0.2s")
    config, start = plan({"resume": str(shared_folder), "steps": "60"})
    world.Barrier()
    resumed, _ = train(shared_folder, start, strategy="hop", steps=config.steps, checkpoint_every="20")
    assert resumed.exit_code == 0
    assert resumed.summary["steps"] >= 60
    world.Barrier()
    newest = folder.read_manifest(folder.complete(shared_folder)[-1])
    assert newest.step >= 60 - 10, "hop leaves steps out"
