"""What was recorded is what is read, of runs that ended, go on, were killed, or lack something."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from dlion_mpi.config.options import Config
from dlion_mpi.errors import UserError
from dlion_mpi.metrics.reader import labels, load, load_all
from dlion_mpi.metrics.recorder import Recorder
from dlion_mpi.metrics.records import LINKS, STEPS
from tests import runfiles

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return runfiles.make_run(tmp_path / "run")


def change(folder: Path, rank: int, how: Callable[[h5py.File], None]) -> None:
    with h5py.File(folder / f"metrics-{rank:05d}.h5", "r+") as file:
        how(file)


# ---- what is there


def test_all_values_come_back(folder: Path) -> None:
    run = load(folder)
    assert run.notes == ()
    assert run.ended
    assert (run.workers, [rank.rank for rank in run.ranks]) == (3, [0, 1, 2])
    for rank in run.ranks:
        expected = [runfiles.record(rank.rank, 3, step) for step in range(40)]
        for name in STEPS:
            np.testing.assert_allclose(rank.steps[name], [getattr(r, name) for r in expected], rtol=1e-6)
        links = rank.links()
        assert set(links) == set(LINKS)
        for name, values in links.items():
            assert values.shape == (40, 3)
            for peer in set(range(3)) - {rank.rank}:
                wanted = [getattr(r, name).get(peer, np.nan) for r in expected]
                np.testing.assert_allclose(values[:, peer], wanted, rtol=1e-6)
        assert rank.evaluations["step"].tolist() == list(range(3, 40, 4))
        assert rank.transfers["merged"].tolist() == [int(rank.rank != 0)] * 4


def test_differences_of_whole_numbers_do_not_wrap(folder: Path) -> None:
    rank = load(folder).ranks[0]
    for values in (rank.steps["step"], rank.steps["lbs"], rank.transfers["source"], rank.links()["bytes_sent"]):
        assert values.dtype == np.int64


def test_configuration_versions_and_attributes(tmp_path: Path) -> None:
    config = Config(strategy="baseline", seconds=12.5, seed=3)
    run = load(runfiles.make_run(tmp_path / "run", config=config.to_toml(), environment='{"name": "homo-b"}'))
    assert run.strategy == "baseline"
    assert (run.config["run.seconds"], run.config["run.seed"]) == (12.5, 3)
    assert run.versions == {"numpy": "2.0"}
    assert run.environment == {"name": "homo-b"}
    assert run.attribute("host") == "edge"  # three ranks, said once
    assert run.seconds == 40 * 3 * runfiles.STEP_S


# ---- what is not


def writer(folder: Path, *, then: str) -> subprocess.Popen[str]:
    """A process that has flushed 30 steps of rank 1 of 3 and then goes on, or is killed."""
    code = f"""
import os, signal, sys
from pathlib import Path
from tests import runfiles
recorder = runfiles.write(Path(sys.argv[1]), 1, 3, 30)
recorder.step(runfiles.record(1, 3, 30))
print("flushed", flush=True)
{then}
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "flushed\n"
    return process


def test_a_run_that_is_still_going(folder: Path) -> None:
    (folder / "metrics-00001.h5").unlink()
    with writer(folder, then="sys.stdin.readline()") as process:
        run = load(folder)
        assert len(run.ranks[1].steps["step"]) == 30  # the last waits for its flush
        assert run.ranks[1].links()["quality"].shape == (30, 3)
        assert not run.ended
        assert len(run.notes) == 1
        assert run.notes[0].startswith("rank 1: not ended: still running (last written ")
        process.kill()


def test_a_run_that_was_killed(folder: Path) -> None:
    (folder / "metrics-00001.h5").unlink()
    with writer(folder, then="os.kill(os.getpid(), signal.SIGKILL)") as process:
        assert process.wait(30) == -signal.SIGKILL
    run = load(folder)
    assert len(run.ranks[1].steps["step"]) == 30
    assert [len(rank.steps["step"]) for rank in run.ranks] == [40, 30, 40]
    assert not run.ended
    assert run.notes[0].startswith("rank 1: not ended")


def test_a_run_that_failed_is_not_one_that_ended(tmp_path: Path) -> None:
    run = load(runfiles.make_run(tmp_path / "run", ended=False))
    assert not run.ended
    assert run.notes[0].startswith("ranks 0 to 2: not ended")


def test_columns_that_were_caught_at_different_lengths_are_cut_to_the_shortest(folder: Path) -> None:
    change(folder, 2, lambda file: file["steps/loss"].resize((33,)))
    change(folder, 2, lambda file: file["links/quality"].resize((31, 3)))
    rank = load(folder).ranks[2]
    assert {len(values) for values in rank.steps.values()} == {33}
    links = rank.links()
    assert {len(values) for values in links.values()} == {33}
    assert np.isnan(links["quality"][31:]).all()
    assert np.isfinite(links["quality"][30, 0])


def test_missing_ranks_are_named(folder: Path) -> None:
    for rank in (0, 1):
        (folder / f"metrics-{rank:05d}.h5").unlink()
    run = load(folder)
    assert (run.workers, [rank.rank for rank in run.ranks], run.ended) == (3, [2], False)
    assert run.notes == ("ranks 0, 1: no metrics file",)


def test_another_version_gives_what_both_know(folder: Path) -> None:
    def newer(file: h5py.File) -> None:
        file.attrs["format"] = 9
        del file["steps/wait_s"]
        del file["links/quality"]
        file["steps/joules"] = np.zeros(40)
        del file["steps/loss"]
        file["steps/loss"] = np.zeros((40, 2))  # of another shape, so something else

    change(folder, 1, newer)
    run = load(folder)
    assert run.notes == (
        "rank 1: file format 9, this version reads format 1: only common columns are shown",
        "rank 1: links/quality, steps/wait_s, steps/loss missing: left empty",
    )
    rank = run.ranks[1]
    assert np.isnan(rank.steps["wait_s"]).all()
    assert np.isnan(rank.steps["loss"]).all()
    assert np.isnan(rank.links()["quality"]).all()
    assert len(rank.steps["lbs"]) == 40


def test_without_times_nothing_of_a_rank_can_be_placed(folder: Path) -> None:
    def no_times(file: h5py.File) -> None:
        file["steps/time_s"][5] = np.nan

    change(folder, 0, no_times)
    run = load(folder)
    assert [rank.rank for rank in run.ranks] == [1, 2]
    assert run.notes == ("rank 0: metrics-00000.h5 has no valid steps/time_s, so the rank is left out",)


def read_apart(folder: Path) -> tuple[list[int], list[str]]:
    """The ranks that could be read, and the notes, by another process: a call that hangs in HDF5 must be killed."""
    code = "import json, sys; from dlion_mpi.metrics.reader import load; run = load(sys.argv[1])\n"
    code += "print(json.dumps([[rank.rank for rank in run.ranks], list(run.notes)]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    ranks, notes = json.loads(done.stdout)
    return ranks, notes


@pytest.mark.parametrize("size", [0, 7, 36, 3000, 30_000])
def test_a_file_that_was_cut_off_is_left_out_and_does_not_hang(folder: Path, size: int) -> None:
    """HDF5 would try again and again to read what is not there."""
    os.truncate(folder / "metrics-00001.h5", size)
    said = "rank 1: metrics-00001.h5 cannot be read: it is not an HDF5 file, or is truncated"
    assert read_apart(folder) == ([0, 2], [said])


def test_a_copy_of_a_killed_run_that_was_cut_off_does_not_hang(folder: Path) -> None:
    (folder / "metrics-00001.h5").unlink()
    with writer(folder, then="os.kill(os.getpid(), signal.SIGKILL)") as process:
        process.wait(30)
    os.truncate(folder / "metrics-00001.h5", 20_000)
    assert read_apart(folder)[0] == [0, 2]


def test_a_file_with_a_hole_in_it_does_not_hang(folder: Path) -> None:
    path = folder / "metrics-00001.h5"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000] + bytes(len(whole) - 2000) + whole[-1000:])
    ranks, notes = read_apart(folder)
    assert ranks == [0, 2]
    assert notes[0].startswith("rank 1: ")


def test_a_file_that_vanishes_between_steps_and_links_leaves_them_empty(folder: Path) -> None:
    rank = load(folder).ranks[0]
    (folder / "metrics-00000.h5").unlink()
    assert all(np.isnan(values).all() and values.shape == (40, 3) for values in rank.links().values())


@pytest.mark.parametrize(
    "attributes", [{"config": "[run"}, {"versions": "{", "config": "[run]\n"}, {"versions": "[1]"}]
)
def test_attributes_that_are_not_what_they_should_be(tmp_path: Path, attributes: dict[str, Any]) -> None:
    run = load(runfiles.make_run(tmp_path / "run", **attributes))
    assert run.notes == (("the configuration cannot be read",) if attributes.get("config") == "[run" else ())
    assert run.strategy == ("dlion" if "config" not in attributes else "unknown")


@pytest.mark.parametrize("workers", [0, -4, 10**12, "many"])
def test_an_absurd_number_of_workers_is_not_believed(folder: Path, workers: object) -> None:
    change(folder, 1, lambda file: file.attrs.__setitem__("workers", workers))
    assert load(folder).workers == 3


def test_a_run_without_a_step_yet(tmp_path: Path) -> None:
    Recorder(tmp_path, 0, 2, {}).close(complete=False)
    run = load(tmp_path)
    assert run.seconds == 0
    assert {len(values) for values in run.ranks[0].links().values()} == {0}


# ---- what is no run


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        load(path)
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no") == f"{tmp_path / 'no'}: no such folder; {GIVE}"


def test_a_file(folder: Path) -> None:
    assert refusal(folder / "metrics-00000.h5") == f"{folder / 'metrics-00000.h5'}: is a file; {GIVE}"


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.h5").write_text("")
    assert refusal(tmp_path) == f"{tmp_path}: holds no run (no metrics-00000.h5), {GIVE}"


def test_a_folder_of_runs_names_one(folder: Path) -> None:
    assert refusal(folder.parent).endswith(f"holds no run (no metrics-00000.h5), but there is one in {folder}")


def test_files_of_which_none_is_one(tmp_path: Path) -> None:
    (tmp_path / "metrics-00000.h5").write_text("hello")
    said = refusal(tmp_path)
    assert said.startswith(f"{tmp_path}: its metrics cannot be read: rank 0: metrics-00000.h5 cannot be read: ")


GIVE = "give the --out folder of a run"


# ---- several


def test_each_run_is_read_once_in_the_order_given(tmp_path: Path) -> None:
    for name in ("b", "a"):
        runfiles.make_run(tmp_path / name, workers=1, steps=2)
    again = tmp_path / "a" / ".." / "a"
    runs = load_all([tmp_path / "b", tmp_path / "a", again])
    assert [run.path.name for run in runs] == ["b", "a"]


def test_labels_are_the_shortest_that_tell_runs_apart(tmp_path: Path) -> None:
    baseline = Config(strategy="baseline").to_toml()
    made = {
        "x/a": runfiles.make_run(tmp_path / "x" / "a", workers=1, steps=1),
        "x/b": runfiles.make_run(tmp_path / "x" / "b", workers=1, steps=1, config=baseline),
        "y/a": runfiles.make_run(tmp_path / "y" / "a", workers=1, steps=1),
    }
    runs = {name: load(path) for name, path in made.items()}
    assert labels([runs["x/a"], runs["x/b"]]) == ["dlion", "baseline"]
    assert labels([runs["x/b"], runs["y/a"], runs["x/a"]]) == [str(made[name]) for name in ("x/b", "y/a", "x/a")]
    shutil.copytree(made["x/a"], tmp_path / "c")
    assert labels([runs["x/a"], load(tmp_path / "c")]) == ["a", "c"]


# ---- long ones

LONG = """
import re, sys
from pathlib import Path
from dlion_mpi.metrics.reader import load
run = load(sys.argv[1])
links = [rank.links() for rank in run.ranks]
assert all(values.shape == (100_000, 6) for columns in links for values in columns.values())
assert links[5]["bytes_sent"][-1, 0] == 99_999
print(int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def test_a_long_run_fits_into_a_gigabyte(tmp_path: Path) -> None:
    """6 ranks x 100,000 steps, in the files that the recorder lays out. VmHWM is the process's own: what getrusage says
    begins with what its parent had."""
    for rank in range(6):
        Recorder(tmp_path, rank, 6, {}).close(complete=True)
        with h5py.File(tmp_path / f"metrics-{rank:05d}.h5", "r+") as file:
            for group in ("steps", "links"):
                for dataset in file[group].values():
                    dataset.resize(100_000, axis=0)
                    numbers = np.arange(100_000)
                    dataset[...] = numbers if dataset.ndim == 1 else numbers[:, None]
    done = subprocess.run(
        [sys.executable, "-c", LONG, str(tmp_path)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1000
