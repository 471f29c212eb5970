"""A mistake that is seen only on a rank, with its model and data: an error on all, which one of them says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import dlion_mpi
from dlion_mpi.errors import UserError
from dlion_mpi.learner import backend
from dlion_mpi.run import run
from tests import nets
from tests.options import config
from tests.shards import write_shard


def refused(world: MPI.Intracomm, **options: Any) -> str:
    """What the one rank says that speaks for all."""
    settings = config(**{"data": "digits", "model": "tests.nets:dense", "steps": 5, **options})
    with pytest.raises(UserError) as caught:
        run(settings, report=False)
    said = world.allgather((str(caught.value), caught.value.quiet))
    assert len({text for text, _ in said}) == 1
    assert sum(not quiet for _, quiet in said) == 1
    return said[0][0]


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"model": "nowhere.nets:build"}, "nowhere"),
        ({"model": "tests.nets:missing"}, "missing"),
        ({"model": "tests.nets:failing"}, r"fails: ValueError: no such width (/"),
        ({"data": "missing.h5"}, "missing.h5"),
        ({"data": "shard-{rank}.h5"}, "shard-"),
        ({"out": "/proc/run"}, "/proc/run"),
        ({"out": str(Path(__file__).parent)}, "exists already"),
    ],
)
def test_a_mistake_in_the_options(world: MPI.Intracomm, options: dict[str, Any], names: str) -> None:
    assert names in refused(world, **options)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"x_train": np.full((60, 8, 8, 1), np.nan, np.float32)}, "NaN"),
        ({"y_train": np.full(60, -1)}, "label"),
        ({"x_train": np.zeros((60, 7, 7, 1), np.float32), "x_test": np.zeros((30, 7, 7, 1), np.float32)}, "alike"),
        ({"y_train": np.zeros(59, np.int64)}, "59"),
    ],
)
def test_a_bad_shard_on_one_rank(
    world: MPI.Intracomm, shared_folder: Path, changes: dict[str, Any], names: str
) -> None:
    rank = world.Get_rank()
    shards = shared_folder.parent
    write_shard(shards / f"shard-{rank}.h5", **(changes if rank == 1 else {}))
    assert names in refused(world, data=str(shards / "shard-{rank}.h5"))


@pytest.mark.mpi(min_size=2)
def test_fewer_samples_than_ranks(world: MPI.Intracomm, shared_folder: Path) -> None:
    file, ranks = shared_folder.parent / "all.h5", world.Get_size()
    if world.Get_rank() == 0:
        write_shard(file, rows=ranks - 1)
    world.Barrier()
    assert f"{ranks - 1} training samples for {ranks} ranks" in refused(world, data=str(file))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("options", "compiled", "names"),
    [
        ({"steps": "many"}, False, "must be a whole number"),
        ({"steps": "40"}, False, "steps '40': must be a whole number"),
        ({"momentum": 0.1}, True, "compiled model"),
        ({"resume": "/nowhere/run"}, False, "holds no run"),
    ],
)
def test_a_mistake_in_what_one_rank_gives_fit(
    world: MPI.Intracomm, options: dict[str, Any], compiled: bool, names: str
) -> None:
    backend.start(1)
    is_wrong = world.Get_rank() == 1
    model = nets.dense((8,), 2)
    if compiled and is_wrong:
        model.compile("sgd", "mse")
    rows = np.zeros((8, 8), np.float32), np.zeros(8, np.int64)
    given = {"steps": 5, "progress_every": 0, **(options if is_wrong else {})}
    with pytest.raises(UserError, match=f"^rank 1: .*{names}") as caught:
        dlion_mpi.fit(model, rows, **given)
    assert caught.value.quiet is not is_wrong


@pytest.mark.mpi(min_size=2)
def test_a_mistake_in_what_one_rank_gives_exchange(world: MPI.Intracomm) -> None:
    backend.start(1)
    exchange = dlion_mpi.Exchange(nets.dense((8,), 2), steps=-1 if world.Get_rank() == 1 else 5, progress_every=0)
    with pytest.raises(UserError, match=r"^rank 1: .*steps"), exchange:
        pass
