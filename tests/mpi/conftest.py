"""MPI tests run as ``mpirun -n N python -m pytest --with-mpi tests/mpi``; every one has a time limit.

A rank that fails alone would leave the others waiting inside an MPI call, so a test's time limit ends the whole
process, and with it the job.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from mpi4py import MPI


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "most_ranks(n): the test, or this case of it, runs on up to n ranks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test without a limit of its own gets one that ends the process, not the test.

    Files that build a model for each test say on how many ranks they run at most: more would take minutes. So do cases
    of a test of which another case runs on more.
    """
    ranks = MPI.COMM_WORLD.Get_size()
    for item in items:
        if "mpi" not in item.path.parts:
            continue
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(100, method="thread"))
        most = getattr(getattr(item, "module", None), "MOST_RANKS", ranks)
        if mark := item.get_closest_marker("most_ranks"):
            (most,) = mark.args
        if ranks > most:
            item.add_marker(pytest.mark.skip(reason=f"builds many models: runs on up to {most} ranks"))


@pytest.fixture
def world() -> MPI.Intracomm:
    """All ranks, in step: what one test left behind cannot meet the next."""
    MPI.COMM_WORLD.Barrier()
    return MPI.COMM_WORLD


@pytest.fixture
def shared_folder(world: MPI.Intracomm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run of all ranks can keep what it writes; not there yet."""
    own = str(tmp_path_factory.mktemp("shared")) if world.Get_rank() == 0 else ""
    return Path(world.bcast(own, root=0)) / "run"
