"""What a run writes can be read while it grows and after a kill, and is what was recorded."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from dlion_mpi.errors import RunError
from dlion_mpi.metrics import recorder as metrics
from dlion_mpi.metrics.recorder import FORMAT, NoRecorder, Recorder
from dlion_mpi.metrics.records import TABLES, Evaluation, StepRecord, Transfer, Waited

WORKERS = 3
RANK = 1
# Format 1, written down once more: files may have more columns, but these must not change.
STEP_FIELDS = dict.fromkeys(("compute_s", "paced_s", "select_encode_s", "wait_s", "apply_s", "step_s", "loss"), "f4")
STEP_FIELDS |= {"step": "u8", "time_s": "f8", "mpi_cpu_s": "f8", "lbs": "u4", "gbs": "u4"}
LINK_FIELDS = dict.fromkeys(("quality", "bytes_per_s", "age_s", "age_steps"), "f4")
LINK_FIELDS |= {"bytes_sent": "u8", "bytes_received": "u8"}
EVENT_FIELDS = {"evaluations": {"step": "u8", "time_s": "f8", "accuracy": "f4"}}
EVENT_FIELDS["transfers"] = {"step": "u8", "time_s": "f8", "started_step": "u8", "source": "u4", "merged": "u1"}
EVENT_FIELDS["transfers"]["payload_bytes"] = "u8"
EVENT_FIELDS["waits"] = {"step": "u8", "time_s": "f8", "seconds": "f8", "peer": "u4", "peer_step": "i8"}
ATTRIBUTES = {"config": '[run]\nstrategy = "dlion"\n', "versions": '{"numpy": "1"}', "host": "é", "samples": 15000}


def record(step: int) -> StepRecord:
    """Every number different, so that no two can be confused; one link carries nothing in odd steps."""
    peers = [0, 2] if step % 2 == 0 else [2]
    return StepRecord(
        step=step,
        time_s=step + 0.125,
        compute_s=step + 0.25,
        paced_s=step + 0.375,
        select_encode_s=step + 0.5,
        wait_s=step + 0.625,
        apply_s=step + 0.75,
        step_s=step + 0.875,
        loss=2.5 - step / 64,
        lbs=32 + step,
        gbs=96 + step,
        mpi_cpu_s=0.01 * step,
        quality={peer: 10.0 + peer for peer in peers},
        bytes_sent={peer: 2**40 + 1000 * step + peer for peer in (0, 2)},
        bytes_received={peer: 2**41 + 1000 * step + peer for peer in (0, 2)},
        bytes_per_s={peer: 1e6 + peer for peer in (0, 2)},
        age_s={peer: 0.5 + peer for peer in peers},
        age_steps={peer: 1.0 + peer for peer in peers},
    )


METRICS = ("accuracy",)
EVALUATIONS = [Evaluation(10, 1.5, {"accuracy": 0.25}), Evaluation(20, 3.5, {"accuracy": 0.75})]
WAITS = [Waited(3, 4.5, 5.0, 0, 2), Waited(3, 4.5, 5.0, 2, -1)]
TRANSFERS = [Transfer(12, 0, True, 10, 550_000), Transfer(22, 1, False, 20, 0)]


def write(recorder: Recorder, steps: int) -> None:
    for step in range(steps):
        recorder.step(record(step))
    for evaluation in EVALUATIONS:
        recorder.evaluation(evaluation)
    for n, transfer in enumerate(TRANSFERS):
        recorder.transfer(transfer, 2.5 + n)
    recorder.waited(WAITS)


def check(file: h5py.File, steps: int) -> None:
    """All data sets and attributes, value by value."""
    assert dict(file.attrs) == {"format": FORMAT, "rank": RANK, "workers": WORKERS, **ATTRIBUTES}
    for name in STEP_FIELDS:
        expected = [getattr(record(step), name) for step in range(steps)]
        np.testing.assert_array_equal(file[f"steps/{name}"][:], expected, err_msg=name)
    for name in LINK_FIELDS:
        dataset = file[f"links/{name}"]
        assert dataset.shape == (steps, WORKERS)
        missing = 0 if dataset.dtype.kind == "u" else np.nan
        expected = [
            [getattr(record(step), name).get(peer, missing) for peer in range(WORKERS)] for step in range(steps)
        ]
        np.testing.assert_array_equal(dataset[:], expected, err_msg=name)
    assert file["evaluations/step"][:].tolist() == [10, 20]
    assert file["evaluations/time_s"][:].tolist() == [1.5, 3.5]
    assert file["evaluations/accuracy"][:].tolist() == [0.25, 0.75]
    expected_transfers = {
        "step": [12, 22],
        "time_s": [2.5, 3.5],
        "started_step": [10, 20],
        "source": [0, 1],
        "merged": [1, 0],
        "payload_bytes": [550_000, 0],
    }
    assert {name: file[f"transfers/{name}"][:].tolist() for name in expected_transfers} == expected_transfers
    expected_waits = {"step": [3, 3], "time_s": [4.5, 4.5], "seconds": [5, 5], "peer": [0, 2], "peer_step": [2, -1]}
    assert {name: file[f"waits/{name}"][:].tolist() for name in expected_waits} == expected_waits
    for group, columns in {"steps": STEP_FIELDS, "links": LINK_FIELDS, **EVENT_FIELDS}.items():
        found = {name: dataset.dtype.str[1:] for name, dataset in file[group].items()}
        declared = {name: measure.dtype for name, measure in TABLES[group].items()}
        assert found == declared | ({"accuracy": "f4"} if group == "evaluations" else {})
        assert columns.items() <= found.items()


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path, RANK, WORKERS, ATTRIBUTES, metrics=METRICS)


def test_a_record_has_nothing_that_is_not_written() -> None:
    assert {f.name for f in fields(StepRecord)} == {*TABLES["steps"], *TABLES["links"]}


@pytest.mark.parametrize("complete", [True, False])
def test_what_was_recorded_is_in_the_file(recorder: Recorder, complete: bool) -> None:
    write(recorder, 40)
    recorder.close(complete=complete)
    assert recorder.path.name == "metrics-00001.h5"
    with h5py.File(recorder.path, "r") as file:
        check(file, 40)
        assert file["ended"][()] == complete


@pytest.mark.parametrize("flush_every", [13, 1000])
def test_how_often_it_is_flushed_does_not_matter(recorder: Recorder, flush_every: int) -> None:
    """Across chunk boundaries too: a chunk has 1024 steps."""
    for step in range(1100):
        recorder.step(record(step))
        if step % flush_every == 0:
            recorder.flush()
    for evaluation in EVALUATIONS:
        recorder.evaluation(evaluation)
        recorder.flush()
    for n, transfer in enumerate(TRANSFERS):
        recorder.transfer(transfer, 2.5 + n)
    recorder.waited(WAITS)
    recorder.close(complete=True)
    with h5py.File(recorder.path, "r") as file:
        check(file, 1100)


def test_a_long_wait_is_seen_at_once(recorder: Recorder) -> None:
    recorder.step(record(0))
    recorder.waited(WAITS)
    with h5py.File(recorder.path, "r", swmr=True) as file:
        assert file["waits/peer"][:].tolist() == [0, 2]
        assert len(file["steps/step"]) == 1


def test_it_flushes_by_itself_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now_s[0])
    recorder = Recorder(tmp_path, RANK, WORKERS, ATTRIBUTES, metrics=METRICS)
    for step in range(30):
        now_s[0] += 0.3
        recorder.step(record(step))
    code = "import h5py, sys; print(len(h5py.File(sys.argv[1], 'r', swmr=True)['steps/step']))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(recorder.path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert int(done.stdout) == 28  # after every fourth step
    recorder.close(complete=True)


def test_a_run_without_steps_has_empty_data_sets(recorder: Recorder) -> None:
    recorder.close(complete=False)
    with h5py.File(recorder.path, "r") as file:
        assert file["steps/loss"].shape == (0,)
        assert file["links/quality"].shape == (0, WORKERS)


def test_a_loss_that_is_not_finite_is_recorded_as_it_is(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0, 1, {})
    zero: dict[str, Any] = dict.fromkeys(
        ("time_s", "compute_s", "paced_s", "select_encode_s", "wait_s", "apply_s", "step_s"), 0.0
    )
    for step, loss in enumerate((np.nan, np.inf)):
        recorder.step(StepRecord(step=step, loss=loss, lbs=1, gbs=1, **zero))
    recorder.close(complete=True)
    with h5py.File(recorder.path, "r") as file:
        np.testing.assert_array_equal(file["steps/loss"][:], [np.nan, np.inf])


def test_many_workers_fit(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0, 5000, {})
    recorder.step(record(0))
    recorder.close(complete=True)
    with h5py.File(recorder.path, "r") as file:
        assert file["links/quality"].shape == (1, 5000)


def test_without_a_folder_nothing_is_kept() -> None:
    recorder = NoRecorder()
    recorder.step(record(0))
    recorder.evaluation(EVALUATIONS[0])
    recorder.transfer(TRANSFERS[0], 0.0)
    recorder.close(complete=True)


# ---- read while it is written


WRITER = """
import sys
from pathlib import Path
from tests.unit import test_recorder as t

recorder = t.Recorder(Path(sys.argv[1]), t.RANK, t.WORKERS, t.ATTRIBUTES, metrics=t.METRICS)
t.write(recorder, 50)
recorder.flush()
print("flushed", flush=True)
sys.stdin.readline()
for step in range(50, 60):
    recorder.step(t.record(step))
recorder.flush()
for step in range(60, 99):
    recorder.step(t.record(step))
print("more", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has recorded 50 steps, goes on when it is told, and never closes its file."""
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "flushed\n"
    yield process
    process.kill()
    process.communicate()


def test_a_reader_follows_a_file_that_grows(writer: subprocess.Popen[str], tmp_path: Path) -> None:
    assert writer.stdin is not None
    assert writer.stdout is not None
    with h5py.File(tmp_path / "metrics-00001.h5", "r", swmr=True) as file:
        check(file, 50)
        assert file["ended"][()] == 0
        writer.stdin.write("\n")
        writer.stdin.flush()
        assert writer.stdout.readline() == "more\n"
        for group in ("steps", "links"):
            for dataset in file[group].values():
                dataset.refresh()
        assert file["steps/step"][:].tolist() == list(range(60))  # the last 39 wait for their flush
        assert file["links/bytes_sent"].shape == (60, WORKERS)


def test_what_was_flushed_survives_a_kill(writer: subprocess.Popen[str], tmp_path: Path) -> None:
    writer.kill()
    assert writer.wait(30) == -signal.SIGKILL
    with h5py.File(tmp_path / "metrics-00001.h5", "r", swmr=True) as file:
        check(file, 50)
        assert file["ended"][()] == 0


# ---- where it cannot be written


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(OSError, match=r"metrics-00000\.h5"):
            Recorder(folder, 0, 1, {})


def test_a_run_that_does_not_begin_leaves_no_file(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0, 1, {})
    recorder.discard()
    assert not list(tmp_path.iterdir())


def test_what_a_disk_does_not_take_is_not_in_the_file(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder.step(record(0))
    recorder.flush()

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    recorder.step(record(1))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match="No space left on device; is the disk full"):
        recorder.flush()
    recorder.step(record(2))
    recorder.close(complete=True)
    with h5py.File(recorder.path, "r") as file:
        assert file["steps/step"][:].tolist() == [0]
        assert not file["ended"][()]


def test_a_closed_file_has_no_room_left(recorder: Recorder) -> None:
    write(recorder, 10)
    recorder.flush()
    open_bytes = recorder.path.stat().st_size
    recorder.close(complete=True)
    assert recorder.path.stat().st_size <= open_bytes - metrics.ROOM_BYTES // 2
    with h5py.File(recorder.path, "r") as file:
        check(file, 10)


FULL = """
import sys
from pathlib import Path
from tests.unit import test_recorder as t

recorder = t.Recorder(Path(sys.argv[1]), t.RANK, t.WORKERS, t.ATTRIBUTES, metrics=t.METRICS)
for step in range(100_000):
    recorder.step(t.record(step))
    if step % 100 == 0:
        recorder.flush()
"""


def test_a_full_disk_is_an_error_and_what_was_written_can_be_read(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk."""
    limit = 1 << 20
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": root},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1, "HDF5 has crashed"
    assert "File too large" in done.stderr
    with h5py.File(tmp_path / "metrics-00001.h5", "r", swmr=True) as file:
        steps = file["steps/step"][:]
        np.testing.assert_array_equal(steps, np.arange(len(steps)))
        assert len(steps) > 100
