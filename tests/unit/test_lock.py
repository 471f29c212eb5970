"""The lock of a run's folder: one job at a time, for as long as its process lives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dlion_mpi.checkpoint import lock
from dlion_mpi.checkpoint.lock import FolderLock
from dlion_mpi.errors import UserError

HOLDER = """
import sys
from pathlib import Path
from dlion_mpi.checkpoint.lock import FolderLock

with FolderLock() as held:
    held.take(Path(sys.argv[1]))
    print("taken", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WAIT_S", 0.3)


def holder(run: Path) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    return process


def test_a_second_job_is_refused_and_names_the_first(tmp_path: Path) -> None:
    with holder(tmp_path) as process, FolderLock() as mine:
        with pytest.raises(UserError, match=rf"{tmp_path}: process {process.pid} on .* is writing a run there"):
            mine.take(tmp_path)
        process.communicate("")
        mine.take(tmp_path)
        assert str(os.getpid()) in (tmp_path / lock.NAME).read_text(encoding="utf-8")
    assert not list(tmp_path.iterdir()), "a run that has ended needs no lock"


def test_a_job_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.kill()
        process.wait(30)
    assert (tmp_path / lock.NAME).exists()
    with FolderLock() as mine:
        mine.take(tmp_path)


def test_a_job_that_waits_gets_the_folder_when_the_other_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first job removes the file of its lock: the second must not hold what is gone."""
    with FolderLock() as first:
        first.take(tmp_path)

        def ends(seconds: float) -> None:
            first.__exit__(None, None, None)

        monkeypatch.setattr(lock.time, "sleep", ends)
        with FolderLock() as second:
            second.take(tmp_path)
            monkeypatch.undo()
            monkeypatch.setattr(lock, "WAIT_S", 0.3)
            with FolderLock() as third, pytest.raises(UserError, match="is writing a run there"):
                third.take(tmp_path)


def test_without_locks_or_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FolderLock() as mine, pytest.raises(UserError, match="cannot be written"):
        mine.take(tmp_path / "missing")

    def unknown(*_: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", unknown)
    with FolderLock() as mine:
        mine.take(tmp_path)
