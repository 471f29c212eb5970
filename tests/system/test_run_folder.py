"""The folder of a run: full disks, two jobs, and a resume that is refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from dlion_mpi.checkpoint import folder
from dlion_mpi.checkpoint.lock import FolderLock
from tests.system.launch import LIGHT, Ended, complaints, end, run, start

pytestmark = pytest.mark.timeout(240)
TRAIN = ("dlion", "train", "--data", "digits", "--model", "tests.nets:dense", "--progress-every", "0")


@pytest.fixture
def disk_of(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk of a size."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        place = tmp_path / size
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


def own_lines(ended: Ended) -> list[str]:
    return [line for line in ended.err.splitlines() if line.startswith("dlion: ")]


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_disk_that_fills_up_ends_the_run_and_leaves_no_row_of_zeros(
    ranks: int | None, disk_of: Callable[[str], Path]
) -> None:
    out = disk_of("1200k" if ranks is None else "2200k") / "run"
    ended = end(start(ranks, *TRAIN, "--steps", "1000000", "--out", str(out)), 150)
    assert ended.code == 1, ended.err
    (line,) = complaints(ended)
    assert "No space left on device; is the disk full?" in line
    for path in sorted(out.glob("metrics-*.h5")):
        with h5py.File(path, "r") as file:
            steps = file["steps/step"][:]
            assert len(steps) > 0
            np.testing.assert_array_equal(steps, np.arange(len(steps)))
            assert np.all(np.diff(file["steps/time_s"][:]) > 0)


def test_a_disk_without_room_for_metrics_is_a_mistake_before_the_start(disk_of: Callable[[str], Path]) -> None:
    out = disk_of("24k") / "run"
    ended = run(None, *TRAIN, "--steps", "10", "--out", str(out))
    assert ended.code == 2, ended.err
    (line,) = complaints(ended)
    assert "No space left on device" in line
    assert not list(out.glob("metrics-*")), "something there looks like data"


FIT = (
    LIGHT
    + """
import sys
import numpy as np
import keras
import dlion_mpi

g = np.random.default_rng(5)
x = g.normal(size=(1600, 16)).astype("float32")
y = (x @ g.normal(size=(16, 4))).argmax(1)
units = int(sys.argv[1])
model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(units, activation="relu"), keras.layers.Dense(4)])
options = dict(part.split("=") for part in sys.argv[2:])
options["steps"] = int(options["steps"])
if "learning_rate" in options:
    options["learning_rate"] = float(options["learning_rate"])
result = dlion_mpi.fit(model, (x[:1200], y[:1200]), (x[1200:], y[1200:]), progress_every=0, **options)
print(result["stopped"])
"""
)


def fit(tmp_path: Path, units: int, **options: object) -> Ended:
    script = tmp_path / "fit.py"
    script.write_text(FIT, encoding="utf-8")
    return run(None, "python", str(script), str(units), *(f"{name}={value}" for name, value in options.items()))


def test_each_lost_checkpoint_is_a_line_and_a_run_without_any_says_so(
    disk_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Also in a script that shows no progress."""
    out = disk_of("1100k") / "run"
    ended = fit(tmp_path, 400, steps=400, out=out, checkpoint_every="100")
    assert ended.code == 0, ended.err
    lines = own_lines(ended)
    lost = [line for line in lines if "could not be written (No space left on device)" in line]
    assert len(lost) >= 2, ended.err
    assert lines[-1] == f"dlion: {out} has no checkpoint: none could be written"
    assert not folder.complete(out)
    assert not [path for path in (out / "checkpoints").rglob("*") if path.is_file()]


def test_a_disk_that_takes_neither_checkpoints_nor_metrics_ends_the_run(
    disk_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """The metrics are flushed before a snapshot, in the middle of a checkpoint round."""
    ended = fit(tmp_path, 400, steps=400, out=disk_of("300k") / "run", checkpoint_every="100")
    assert ended.code == 1, ended.err
    assert len([line for line in own_lines(ended) if "is the disk full?" in line]) == 1, ended.err


def content(place: Path) -> dict[str, str]:
    """A digest of every file."""
    files = sorted(path for path in place.rglob("*") if path.is_file())
    return {str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_refused_resume_changes_nothing_and_so_does_a_second_job(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert fit(tmp_path, 16, steps=100, out=out, checkpoint_every="50").code == 0
    before = content(out)
    refused = fit(tmp_path, 17, steps=999, learning_rate=0.7, resume=out)
    assert refused.code == 1
    assert any("is of another model" in line for line in own_lines(refused)), refused.err
    assert content(out) == before
    with FolderLock() as held:
        held.take(out)
        ended = fit(tmp_path, 16, steps=200, resume=out)
        assert ended.code == 1
        assert f"{out}: process {os.getpid()} on " in ended.err
        assert "Traceback" not in ended.err
    assert content(out) == before
    assert fit(tmp_path, 16, steps=120, resume=out).code == 0
    assert content(out).keys() - before.keys(), "the run did not resume"
