"""`dlion trace` of runs of every kind: whole, going on, killed, with ranks missing, of another version, or none."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from dlion_mpi.cli import main
from dlion_mpi.metrics.reader import load
from dlion_mpi.metrics.recorder import Recorder
from dlion_mpi.metrics.timeline import RECORDS, Phase
from tests import runfiles, traces
from tests.traces import Trace

Captured = pytest.CaptureFixture[str]
STEPS = 40
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return runfiles.make_run(tmp_path / "run", steps=STEPS, timeline=True)


@pytest.fixture
def trace_of(tmp_path: Path, capsys: Captured) -> Callable[..., tuple[Trace, list[str]]]:
    """Makes a trace; returns it and the lines on stderr without the last, which sums up."""

    def make(run: Path, *options: str, name: str = "trace.json") -> tuple[Trace, list[str]]:
        path = tmp_path / name
        assert main(["trace", str(run), "-o", str(path), *options]) == 0
        out, err = capsys.readouterr()
        assert out == f"{path}\n"
        lines = err.splitlines()
        assert "events" in lines[-1]
        return traces.read(path), lines[:-1]

    return make


TraceOf = Callable[..., tuple[Trace, list[str]]]


def test_everything_that_was_recorded_is_where_it_was(folder: Path, trace_of: TraceOf) -> None:
    trace, notes = trace_of(folder)
    assert [note for note in notes if "in flight" not in note] == []
    assert trace.processes == {rank: f"rank {rank} (edge)" for rank in range(3)}
    step = trace.named("step 7", rank=1)[0]
    assert (step.start, step.end) == (7_000_000, 8_000_000)
    assert step.args == {"loss": 0.25, "lbs": 16, "gbs": 96}
    parts = [("compute", 0.0, 0.5), ("select, encode", 0.5, 0.6), ("wait", 0.6, 0.85), ("apply", 0.85, 0.95)]
    wanted = [(name, 7_000_000 + round(a * 1e6), 7_000_000 + round(b * 1e6)) for name, a, b in parts]
    assert [(s.name, s.start, s.end) for s in step.inner] == wanted
    slept = step.inner[0].inner
    assert [(s.name, s.start, s.end) for s in slept] == [("sleep (paced)", 7_300_000, 7_500_000)]
    message = trace.sent(1, 2)[7]
    assert (message.name, message.start, message.end) == ("gradient", 7_600_000, 7_900_000)
    assert message.args == {"bytes": 1000, "step": 7, "sequence": 8, "N": 12}
    arrived = trace.received(1, 2)[7]
    assert arrived.into == message.out
    assert arrived.args["age_s"] == pytest.approx(0.4)
    assert (arrived.args["used_in_step"], arrived.args["age_steps"]) == (5, -2)
    move = trace.named("knowledge transfer", rank=1)[0]
    assert (move.start, move.end) == (9_000_000, 10_000_000)
    assert move.args == {"started_step": 8, "step": 10, "source": 0, "merged": 1, "payload_bytes": 4_000_000}
    assert [s.args["step"] for s in trace.named("evaluate", rank=2)] == list(range(3, STEPS, 4))


def test_sums_are_those_of_the_metrics(folder: Path, trace_of: TraceOf) -> None:
    trace, _ = trace_of(folder)
    run = load(folder)
    for rank in run.ranks:
        for name, column in (("compute", "compute_s"), ("wait", "wait_s"), ("apply", "apply_s")):
            seconds = sum(s.end - s.start for s in trace.named(name, rank.rank)) / 1e6
            assert seconds == pytest.approx(rank.steps[column].sum(), rel=1e-6)
        for peer in set(range(3)) - {rank.rank}:
            sent = trace.counters[rank.rank, f"MB/s to rank {peer}", "sent"]
            moved = sum(v * (b - a) for (a, v), (b, _) in itertools.pairwise(sent))
            assert moved == pytest.approx(rank.links()["bytes_sent"][-1, peer], rel=1e-4)
        assert trace.counters[rank.rank, "batch size", "lbs"] == [(0, 32 // (rank.rank + 1))]


def test_messages_under_way_at_the_end_are_marked(folder: Path, trace_of: TraceOf) -> None:
    """Rank 2 goes on for three times as long as rank 0, which has all of its later messages never arrive."""
    trace, notes = trace_of(folder)
    sent = trace.sent(2, 0)
    cut = [s for s in sent if "arrival" in s.args]
    assert len(sent) == STEPS
    assert cut
    assert all(s.args["arrival"] == "in flight at the end" and s.out is None for s in cut)
    assert {s.args["sequence"] for s in cut} == {s.args["sequence"] for s in sent} - {
        s.args["sequence"] for s in trace.received(2, 0)
    }
    every = sum("arrival" in s.args for s in trace.slices)
    assert notes == [f"dlion trace: {every} messages were in flight when the run or its files ended"]
    longest = max(s.end for s in trace.slices if s.track == "loop")
    assert max(s.end for s in cut) == longest


@pytest.mark.parametrize("name", ["trace.json.gz", "trace.json"])
def test_a_trace_that_is_made_again_replaces_the_old_one(folder: Path, trace_of: TraceOf, name: str) -> None:
    first, _ = trace_of(folder, name=name)
    again, _ = trace_of(folder, "--to", "5", name=name)
    assert 0 < len(again.slices) < len(first.slices)
    assert [path.name for path in folder.parent.iterdir() if path != folder] == [name]


def test_a_window_shows_what_lies_at_least_partly_in_it(folder: Path, trace_of: TraceOf) -> None:
    whole, _ = trace_of(folder)
    part, _ = trace_of(folder, "--from", "3.2", "--to", "4.4")
    key = [(s.rank, s.track.split(" (")[0], s.name, s.start, s.end) for s in part.slices]
    wanted = [s for s in whole.slices if s.end >= 3_200_000]
    # A message goes with the time until it is used.
    used = {s.into: s.end for s in whole.slices if s.into is not None}
    begun = {s.out: s.start for s in whole.slices if s.out is not None}
    shown = {
        (s.rank, s.track.split(" (")[0], s.name, s.start, s.end)
        for s in whole.slices
        if used.get(s.out or "", s.end) >= 3_200_000 and begun.get(s.into or "", s.start) <= 4_400_000
    }
    assert len(wanted) > len(key) > 20
    assert set(key) == shown
    assert len(key) == len(shown)


def test_stdout_takes_it_too(folder: Path) -> None:
    command = [sys.executable, "-m", "dlion_mpi", "trace", str(folder), "-o", "-"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    assert len(traces.parse(done.stdout).slices) > 100
    assert b"dlion trace: " in done.stderr


def test_who_reads_only_the_beginning_of_stdout_is_no_error(folder: Path) -> None:
    command = [sys.executable, "-m", "dlion_mpi", "trace", str(folder), "-o", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(10) == b'{"displayT'
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0


# ---- what is not all there


def test_a_killed_run_is_shown_as_far_as_it_was_written(tmp_path: Path, trace_of: TraceOf) -> None:
    run = runfiles.make_run(tmp_path / "run", timeline=True, ended=False)
    trace, notes = trace_of(run)
    assert len([s for s in trace.slices if s.name.startswith("step ")]) == 3 * STEPS
    assert "not ended" in notes[0]


KILLED = """
import os, signal, sys
from pathlib import Path
from tests import runfiles
recorder = runfiles.write(Path(sys.argv[1]), 1, 2, 40)
runfiles.write_timeline(recorder, 1, 2, 40)
recorder.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_file_that_nobody_closed_is_read(tmp_path: Path, trace_of: TraceOf) -> None:
    folder = tmp_path / "run"
    recorder = runfiles.write(folder, 0, 2, STEPS)
    runfiles.write_timeline(recorder, 0, 2, STEPS)
    recorder.close(complete=True)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], timeout=60, check=False, cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    trace, notes = trace_of(folder)
    assert "rank 1: not ended" in notes[0]
    assert len(trace.sent(1, 0)) == len(trace.sent(0, 1)) == STEPS
    assert trace.received(1, 0)


def test_a_run_that_ended_before_its_first_step(tmp_path: Path, trace_of: TraceOf) -> None:
    (tmp_path / "run").mkdir()
    recorder = Recorder(tmp_path / "run", 0, 1, {})
    recorder.span(Phase.PROFILE, 0, 0.0, 2.0)
    recorder.close(complete=False)
    trace, _ = trace_of(tmp_path / "run")
    assert [(s.name, s.start, s.end) for s in trace.slices] == [("time batch sizes", 0, 2_000_000)]


def test_a_rank_that_is_missing_is_named_on_both_sides(folder: Path, trace_of: TraceOf) -> None:
    (folder / "metrics-00001.h5").unlink()
    trace, notes = trace_of(folder)
    assert "rank 1: no metrics file" in notes[0]
    assert trace.processes[1] == "rank 1 (no metrics file)"
    assert {s.args["arrival"] for s in trace.sent(0, 1)} == {"unknown, no metrics of rank 1"}
    came = trace.received(1, 0)
    assert came
    assert {s.args["sender"] for s in came} == {"unknown, no metrics of rank 1"}
    assert trace.sent(0, 2)[0].out is not None


def test_a_run_of_a_version_that_recorded_no_timeline(tmp_path: Path, trace_of: TraceOf) -> None:
    run = runfiles.make_run(tmp_path / "run")
    for path in run.glob("*.h5"):
        with h5py.File(path, "r+") as file:
            del file["timeline"]
    trace, notes = trace_of(run)
    assert [note.split(" (")[0] for note in notes] == [
        f"dlion trace: ranks 0 to 2: timeline/{name} missing" for name in RECORDS
    ]
    assert {s.name.split(" ")[0] for s in trace.slices} == {"step", "evaluate", "knowledge"}
    assert all(s.start == s.end for s in trace.named("evaluate"))  # when it ended is not known
    assert len([s for s in trace.slices if s.name.startswith("step ")]) == 3 * STEPS


def test_damaged_times_do_not_make_a_trace_that_viewers_refuse(tmp_path: Path, trace_of: TraceOf) -> None:
    """Steps and spans that reach into each other, a clock that jumps back, times that are no numbers."""
    folder = tmp_path / "run"
    recorder = runfiles.write(folder, 0, 2, 20)
    for n in range(200):
        start_s = float(np.random.default_rng(n).uniform(0, 10))
        recorder.span(Phase(1 + n % 7), n, start_s, start_s + 3.0)
    recorder.span(Phase.COMPUTE, 0, 1.0, float("inf"))
    recorder.close(complete=True)
    with h5py.File(recorder.path, "r+") as file:
        times = file["steps/time_s"][:]
        times[5:8] -= 3.0
        file["steps/time_s"][:] = times
        file["steps/loss"][3] = np.nan
    trace, _ = trace_of(folder)
    assert trace.named("step 3")[0].args["loss"] == "nan"


def test_a_clock_that_is_off_moves_an_arrival_and_says_so(tmp_path: Path, trace_of: TraceOf) -> None:
    folder = tmp_path / "run"
    for rank in range(2):
        recorder = runfiles.write(folder, rank, 2, 10)
        if rank == 0:
            runfiles.write_timeline(recorder, 0, 2, 10)
        else:
            for step in range(10):
                recorder.arrived(0, step + 1, runfiles.posted_s(0, step) - 25e-6)
        recorder.close(complete=True)
    trace, notes = trace_of(folder)
    assert all(s.start == s.end for s in trace.sent(0, 1))
    assert any("10 messages arrived before they were posted, by at most 25 us" in note for note in notes)


def test_nothing_is_put_before_training_began(tmp_path: Path, trace_of: TraceOf) -> None:
    """Viewers drop what has a negative time, so a clock that is a little off would cost a rank its first step."""
    recorder = runfiles.write(tmp_path / "run", 0, 1, 3)
    recorder.close(complete=True)
    with h5py.File(recorder.path, "r+") as file:
        file["steps/step_s"][0] = file["steps/time_s"][0] + 1.5e-3
    trace, _ = trace_of(tmp_path / "run")
    first = trace.named("step 0")[0]
    assert first.start == 0 < first.end


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--from", "9", "--to", "3"], "--from 9 --to 3: the first must be less"),
        (["--from", "soon"], "--from soon: must be 0 or more seconds"),
        (["--to", "-1"], "--to -1: must be 0 or more seconds"),
        (["--from", "1000"], "--from 1000: the run ends after 60.000 s"),
        (["-o", "trace.html"], "-o trace.html: must end in .json or .gz, or be - for stdout"),
        (["-o", "/nowhere/trace.json"], "-o /nowhere/trace.json: cannot be written (No such file or directory)"),
    ],
)
def test_a_mistake_is_one_line(options: list[str], says: str, folder: Path, capsys: Captured) -> None:
    assert main(["trace", str(folder), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"dlion: error: {says}")
    assert len(err.splitlines()) == 1


def test_a_folder_without_a_run_is_one_line(tmp_path: Path, capsys: Captured) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        assert main(["trace", str(path), "-o", str(tmp_path / "trace.json")]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_fails_half_way_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    from dlion_mpi.trace import messages

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(messages, "draw", full)
    output = folder.parent / "trace.json"
    output.write_text("before")
    assert main(["trace", str(folder), "-o", str(output)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert output.read_text() == "before"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["run", "trace.json"]


# ---- what a recorder keeps


def test_records_come_back_in_their_order(tmp_path: Path) -> None:
    run = runfiles.make_run(tmp_path / "run", timeline=True)
    for rank in load(run).ranks:
        for name, dtype in RECORDS.items():
            records = rank.timeline(name)
            assert records is not None
            assert records.dtype == dtype
        sent = rank.timeline("sent")
        assert sent is not None
        assert len(sent) == 2 * STEPS
        assert (np.diff(sent["posted_s"]) >= 0).all()


def test_what_took_no_time_is_not_kept(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0, 1, {})
    recorder.span(Phase.WAIT, 0, 1.0, 1.0)
    recorder.span(Phase.WAIT, 1, 1.0, 1.5)
    recorder.close(complete=True)
    spans = load(tmp_path).ranks[0].timeline("spans")
    assert spans is not None
    assert spans["step"].tolist() == [1]


def test_a_data_set_that_is_something_else_is_none(folder: Path) -> None:
    path = folder / "metrics-00000.h5"
    with h5py.File(path, "r+") as file:
        del file["timeline/spans"], file["timeline/sent"]
        file["timeline/spans"] = np.zeros(3)
        file["timeline/sent"] = np.array([(1, b"x")], [("peer", "u4"), ("kind", "S1")])
    rank = load(folder).ranks[0]
    assert rank.timeline("spans") is None
    assert rank.timeline("sent") is None
    assert rank.timeline("arrived") is not None
