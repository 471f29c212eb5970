"""One Slurm cluster for all tests here: its own namespaces, daemons, folder and records."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlion_mpi.emulation import netns
from tests.slurm.cluster import Cluster


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """Short, since Slurm's sockets lie in it, and their paths may have 107 characters."""
    path = Path(tempfile.mkdtemp(prefix="dlion-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster(folder: Path) -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.skip("needs root, to make network namespaces and run Slurm's daemons")
    if missing := [tool for tool in netns.TOOLS if netns.which(tool) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    made = Cluster(folder, f"t{os.getpid()}")
    made.prepare()
    done = made.up()
    assert done.returncode == 0, done.stderr
    yield made
    done = made.down()
    assert done.returncode == 0, done.stderr
