"""`dlion watch` sees a run as its metrics files show it, and says how it stands with it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlion_mpi.cli import main
from dlion_mpi.commands import watch
from dlion_mpi.config.options import Config
from dlion_mpi.errors import UserError
from dlion_mpi.metrics import reader as runs
from dlion_mpi.metrics.check import FileCheck
from dlion_mpi.metrics.recorder import Recorder
from dlion_mpi.view import from_files
from dlion_mpi.view.snapshot import Snapshot
from tests import runfiles

NOBODY = 2**22 + 1
"""A process number that the kernel does not give."""
Captured = pytest.CaptureFixture[str]


def read(folder: Path) -> dict[str, Any]:
    return from_files.read_state(str(folder), FileCheck())


def snapshot(folder: Path) -> Snapshot:
    return Snapshot.from_json(read(folder)["snapshot"])


def open_run(folder: Path, pid: int, *, steps: int = 40, host: str = platform.node(), ago_s: float = 0.0) -> Path:
    """A run of two ranks whose second has not ended, and was written so long ago."""
    runfiles.write(folder, 0, 2, steps).close(complete=True)
    recorder = runfiles.write(folder, 1, 2, steps, pid=pid, host=host)
    aside = folder / "aside"
    shutil.copy(recorder.path, aside)  # as a writer leaves it that does not come to close it
    recorder.close(complete=False)
    aside.replace(recorder.path)
    for file in folder.glob("metrics-*.h5"):
        os.utime(file, (0, file.stat().st_mtime - ago_s))
    return folder


def state(folder: Path) -> tuple[str, bool, int]:
    seen = read(folder)
    return seen["message"], seen["finished"], seen["exit_code"]


# ---- what is seen


def test_a_rank_is_its_last_step_and_the_means_of_its_last_moments(tmp_path: Path) -> None:
    seen = snapshot(runfiles.make_run(tmp_path / "run"))
    assert (seen.workers, [rank.rank for rank in seen.ranks], seen.elapsed_s) == (3, [0, 1, 2], 60.0)
    assert seen.goal.seconds == 60.0
    assert seen.title == f"dlion: dlion, 3 ranks, cipher, fashion-mnist, {tmp_path / 'run'}"
    rank = seen.ranks[1]
    recent = [runfiles.record(1, 3, step) for step in range(34, 40)]  # steps of a second, over 5 s
    assert (rank["step"], rank["time_s"], rank["lbs"], rank["gbs"]) == (40, 40.0, 16, 96)
    assert rank["loss"] == pytest.approx(np.mean([r.loss for r in recent]), rel=1e-6)
    assert (rank["step_s"], rank["waiting"], rank["samples_per_s"]) == pytest.approx((1.0, 0.25, 16.0), rel=1e-6)
    assert rank["test/accuracy"] == pytest.approx(0.01 * 40**0.5 + 0.2)
    links = {(link.source, link.target): link for link in seen.links()}
    assert links[1, 2]["bytes_sent"] == 1000 * 40 * 3
    assert tuple(links[1, 2][name] for name in ("quality", "bytes_per_s", "age_s")) == (12, 8000, 0.25)


def test_of_a_long_run_only_the_end_is_read_and_it_is_the_same(tmp_path: Path) -> None:
    folder = runfiles.make_run(tmp_path / "run")
    whole, end = runs.load(folder), runs.load(folder, last=7)
    for all_of_it, part in zip(whole.ranks, end.ranks, strict=True):
        for name, values in part.steps.items():
            np.testing.assert_array_equal(values, all_of_it.steps[name][-7:])
        for name, values in part.links().items():
            np.testing.assert_array_equal(values, all_of_it.links()[name][-7:])
    assert runs.load(folder, last=1000).ranks[0].steps["step"].tolist() == list(range(40))


def test_a_simulated_run_is_virtual(tmp_path: Path) -> None:
    folder = runfiles.make_run(tmp_path / "run", environment='{"name": "homo-b"}')
    (folder / "config.toml").write_text(Config().to_toml(), encoding="utf-8")
    newest_s = max(file.stat().st_mtime for file in folder.glob("*.h5"))
    os.utime(folder / "config.toml", (0, newest_s - 30.0))
    seen = snapshot(folder)
    assert seen.virtual
    assert seen.real_s_per_s == pytest.approx(0.5)  # 60 virtual seconds took 30
    assert "3 workers" in seen.title


def test_a_run_without_an_end_of_its_own_has_a_thousand_steps(tmp_path: Path) -> None:
    assert snapshot(runfiles.make_run(tmp_path / "run", config=Config().to_toml())).goal.steps == Config().last_step


# ---- how it stands with it


def test_a_run_that_has_ended(tmp_path: Path) -> None:
    assert state(runfiles.make_run(tmp_path / "run")) == ("ended", True, 0)


def test_a_run_that_was_stopped_or_failed(tmp_path: Path) -> None:
    assert state(runfiles.make_run(tmp_path / "run", ended=False)) == ("stopped or failed", True, 1)


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    assert state(open_run(tmp_path / "run", os.getpid(), ago_s=9.0)) == ("", False, 0)


def test_a_run_whose_process_is_gone_was_killed(tmp_path: Path) -> None:
    killed = "killed: the process of rank 1 is gone", True, 1
    assert state(open_run(tmp_path / "a", NOBODY, ago_s=9.0)) == killed
    assert state(open_run(tmp_path / "b", NOBODY)) == ("", False, 0)  # it may be closing its file
    assert state(open_run(tmp_path / "c", NOBODY, host="another", ago_s=9.0)) == ("", False, 0)  # a number over there


def test_a_run_of_which_nothing_is_heard(tmp_path: Path) -> None:
    message, *rest = state(open_run(tmp_path / "a", 1, host="another", ago_s=45.0))
    assert re.fullmatch(r"nothing was written for (4[5-9]|5\d) s: waiting, stuck or killed", message)
    assert rest == [False, 0]
    assert state(open_run(tmp_path / "b", 1, host="another", ago_s=660.0)) == (
        "probably killed: nothing was written for 11 minutes",
        True,
        1,
    )


def test_a_run_of_long_steps_is_given_time_for_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runfiles, "STEP_S", 10.0)  # of rank 1: 20 s
    assert state(open_run(tmp_path / "run", NOBODY, ago_s=90.0)) == ("", False, 0)


def test_ranks_that_are_missing_are_named(tmp_path: Path) -> None:
    folder = runfiles.make_run(tmp_path / "run")
    (folder / "metrics-00001.h5").unlink()
    seen = snapshot(folder)
    assert [rank.rank for rank in seen.ranks] == [0, 2]
    assert seen.notes == ["rank 1: no metrics file"]
    assert state(folder) == ("ended, as far as the files show", True, 0)


def test_a_file_that_was_cut_off_is_named_and_the_others_are_shown(tmp_path: Path) -> None:
    folder = runfiles.make_run(tmp_path / "run")
    file = folder / "metrics-00002.h5"
    file.write_bytes(file.read_bytes()[:2000])
    seen = snapshot(folder)
    assert [rank.rank for rank in seen.ranks] == [0, 1]
    assert any("metrics-00002.h5 cannot be read" in note for note in seen.notes)


def test_a_run_before_its_first_step(tmp_path: Path) -> None:
    Recorder(tmp_path, 0, 1, {"config": Config(steps=10).to_toml()}).flush()
    seen = snapshot(tmp_path)
    assert [(rank.rank, rank["step"]) for rank in seen.ranks] == [(0, 0.0)]
    assert seen.share() == 0.0


# ---- what has not begun, and what is no run


def test_what_has_not_begun_is_waited_for(tmp_path: Path) -> None:
    assert read(tmp_path / "run")["message"].startswith("not there yet")
    assert read(tmp_path)["message"] == "still empty"
    (tmp_path / "config.toml").write_text("", encoding="utf-8")
    assert read(tmp_path)["message"] == "not training yet"
    (tmp_path / "metrics-00000.h5").write_bytes(b"")  # this moment made
    assert read(tmp_path)["message"].startswith("just beginning")


@pytest.mark.parametrize("kind", ["file", "old and empty", "other things", "broken", "its parent"])
def test_what_is_no_run_is_said_in_one_line(kind: str, tmp_path: Path, capfd: Captured) -> None:
    target = tmp_path / "run"
    if kind == "file":
        target.write_text("x", encoding="utf-8")
    else:
        target.mkdir()
    if kind == "other things":
        (target / "notes.txt").write_text("x", encoding="utf-8")
    if kind == "broken":
        (target / "metrics-00000.h5").write_bytes(b"no HDF5")
        os.utime(target / "metrics-00000.h5", (0, 0))
    if kind == "its parent":
        runfiles.make_run(target / "inner", workers=1, steps=1)
    os.utime(target, (0, 0))
    assert main(["watch", str(target)]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith(f"dlion: error: {target}: ")


def test_once_does_not_wait_for_what_is_not_there(tmp_path: Path, capfd: Captured) -> None:
    assert main(["watch", str(tmp_path / "run"), "--once"]) == 2
    assert "not there yet" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["x", "0", "-1", "nan", "inf"])
def test_a_pause_must_be_one(text: str, tmp_path: Path, capfd: Captured) -> None:
    assert main(["watch", str(tmp_path), f"--every={text}"]) == 2
    assert capfd.readouterr().err.startswith(f"dlion: error: --every {text}: must be")


# ---- the program


def test_lines_where_nobody_can_draw(tmp_path: Path, capfd: Captured) -> None:
    folder = runfiles.make_run(tmp_path / "run")
    assert main(["watch", str(folder)]) == 0  # has ended, so it is shown once
    captured = capfd.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].endswith("(ended)")
    assert [line[:3] for line in lines[1:]] == ["[0]", "[1]", "[2]"]
    assert "\x1b" not in captured.out
    assert captured.err == ""


def test_a_run_that_was_killed_is_the_end_and_the_exit_code_tells(tmp_path: Path, capfd: Captured) -> None:
    folder = open_run(tmp_path / "run", NOBODY, ago_s=9.0)
    assert main(["watch", str(folder)]) == 1
    assert "(killed: the process of rank 1 is gone" in capfd.readouterr().out


def test_a_run_is_followed_from_before_it_is_there_to_its_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dlion_mpi", "watch", str(tmp_path / "run"), "--every", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "not there yet" in process.stdout.readline()
        recorder = runfiles.write(tmp_path / "run", 0, 1, 5, pid=os.getpid())
        while not (line := process.stdout.readline()).startswith("[0]"):
            assert line
        assert "step 5" in line
        recorder.step(runfiles.record(0, 1, 5))
        recorder.close(complete=True)
        rest = process.stdout.read()
        assert "(ended)" in rest
        assert "step 6" in rest
        assert process.wait(30) == 0


def test_ctrl_c_ends_it_quietly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dlion_mpi", "watch", str(tmp_path / "run"), "--every", "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (130, "", "")


def answers(code: str) -> Any:
    """In place of the process that reads: one that does something else."""

    def start(run: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    return start


@pytest.mark.parametrize(
    "code", ["import time; time.sleep(60)", "print('{', end='', flush=True); input(); input()", ""]
)
def test_a_file_that_is_read_for_ever_does_not_hold_us_up(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_start", answers(code))
    reader = watch.Reader("runs/a", limit_s=0.3)
    assert reader.read().message == "its metrics could not be read within 0.3 s"
    assert reader._process is None  # ended, not left behind
    monkeypatch.setattr(watch, "_start", answers('input(); print(\'{"error": "found"}\', flush=True); input()'))
    reader._limit_s = 30
    with pytest.raises(UserError, match="found"):
        reader.read()
    reader.close()


def test_the_reader_answers_every_line_and_ends_with_its_reader(tmp_path: Path) -> None:
    command: Sequence[str] = [sys.executable, "-m", "dlion_mpi.view.from_files", str(tmp_path / "run")]
    done = subprocess.run(command, input="\n\n", capture_output=True, text=True, timeout=60, check=True)
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr == ""
