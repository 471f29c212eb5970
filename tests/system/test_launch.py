"""`dlion launch` with the MPI that is here: start, exit codes, signals, and an end that leaves no rank behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest

from tests.screen import Screen, running
from tests.system.launch import BIN, ROOT, Ended, complaints, end, processes_with, run, start

pytestmark = pytest.mark.timeout(200)
SMALL = ("--data", "digits", "--model", "tests.nets:dense")
LISTENING = """
import os, pathlib, signal, sys, time
heard = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: heard.append(number))
folder, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
(folder / f"ready-{os.getpid()}").touch()
while not heard and seconds:
    time.sleep(0.01)
time.sleep(seconds or 600)
line = f"heard {' '.join(map(str, sorted(set(heard))))}"
os.write(1, line.encode() + bytes([10]))  # as one write: the ranks share the output
(folder / f"over-{os.getpid()}").touch()
while len(list(folder.glob("over-*"))) < 2:  # the first rank that ends with another code than 0 ends all
    time.sleep(0.01)
sys.exit(75 if heard[0] == signal.SIGUSR1 else 128 + heard[0])
"""


def launch(*words: str) -> Ended:
    return run(None, "dlion", "launch", *words)


def dlion_lines(ended: Ended) -> list[str]:
    return [line for line in ended.err.splitlines() if line.startswith("dlion launch: ")]


def listening(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """Two ranks that heed signals, and end so many seconds later; 0: that never heed one."""
    (folder / "rank.py").write_text(LISTENING, encoding="utf-8")
    process = start(None, "dlion", "launch", "-n", "2", str(folder / "rank.py"), str(folder), str(seconds))
    deadline_s = time.monotonic() + 60
    while len(list(folder.glob("ready-*"))) < 2:
        assert time.monotonic() < deadline_s
        assert process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("where", [["-n", "2"], ["--hosts", "localhost:2"]], ids=["ranks", "hosts"])
def test_a_run_is_started_and_its_command_is_printed_in_one_line(where: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    ended = launch(*where, "train", *SMALL, "--steps", "20", "--progress-every", "0", "--out", str(out))
    assert ended.code == 0, ended.err
    (line,) = dlion_lines(ended)
    assert "mpirun" in line
    assert f"train --data digits --model tests.nets:dense --steps 20 --progress-every 0 --out {out}" in line
    (result,) = [json.loads(line) for line in ended.out.splitlines()]
    assert (result["ranks"], result["steps"]) == (2, 20)
    assert sorted(path.name for path in out.glob("*.h5")) == ["metrics-00000.h5", "metrics-00001.h5"]


def test_a_dry_run_runs_nothing() -> None:
    ended = launch("-n", "3", "--dry-run", "train", "--steps", "0")
    assert (ended.code, ended.err) == (0, "")
    assert len(ended.out.splitlines()) == 1
    assert "mpirun" in ended.out
    assert ended.out.rstrip().endswith("-n 3 " + " ".join([str(BIN / "dlion"), "train", "--steps", "0"]))


@pytest.mark.parametrize("ranks", ["1", "3"])
@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_the_exit_code_is_that_of_the_ranks(code: int, ranks: str) -> None:
    ended = launch("-n", ranks, "--", "python", "-c", f"print('a rank', flush=True); raise SystemExit({code})")
    assert ended.code == code
    if not code:
        assert ended.out.count("a rank") == int(ranks)


def test_a_mistake_in_the_launched_command_is_one_line_and_code_2() -> None:
    ended = launch("-n", "2", "train", *SMALL, "--steps", "minus")
    assert ended.code == 2
    assert len(set(complaints(ended))) == 1


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 75)],
    ids=lambda value: str(value),
)
def test_a_signal_reaches_every_rank_which_ends_by_itself(number: signal.Signals, code: int, tmp_path: Path) -> None:
    process = listening(tmp_path, seconds=1)
    process.send_signal(number)
    ended = end(process, 30)
    assert ended.out.count(f"heard {number.value}\n") == 2, ended.err
    assert ended.code == code


def test_sigterm_that_is_repeated_until_the_end_costs_nothing(tmp_path: Path) -> None:
    process = listening(tmp_path, seconds=0.5)
    while process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        time.sleep(0.005)
    ended = end(process)
    assert ended.out.count("heard 15\n") == 2, ended.err
    assert ended.code == 143


def test_ctrl_c_three_times_ends_ranks_that_do_not_heed_it(tmp_path: Path) -> None:
    process = listening(tmp_path, seconds=0)
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert end(process, 15).code == 130
    assert not processes_with(str(tmp_path))


def test_no_rank_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    process = listening(tmp_path, seconds=0)
    process.kill()
    process.wait()
    deadline_s = time.monotonic() + 10
    while processes_with(str(tmp_path / "rank.py")):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_ctrl_c_in_a_terminal_ends_a_run_in_order(tmp_path: Path) -> None:
    screen, out = Screen(100, 30), tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    words = [str(BIN / "dlion"), "launch", "-n", "2", "train", *SMALL, "--seconds", "600", "--out", str(out)]
    with running(screen, words, ROOT, environment) as process:
        screen.read_until(lambda: screen.shows("samples/s") and screen.shows("of 10:00"))
        screen.press(b"\x03")
        screen.read_to_end()
        assert process.wait(30) == 128 + signal.SIGINT
    assert screen.shows("stopped early: SIGINT")
    result = screen.result()
    assert (result["ranks"], result["stopped"]) == (2, "SIGINT")
    for rank in range(2):
        with h5py.File(out / f"metrics-{rank:05d}.h5", "r") as file:
            assert len({file[f"steps/{name}"].shape[0] for name in file["steps"]}) == 1


def test_it_needs_no_activated_environment(tmp_path: Path) -> None:
    script = tmp_path / "which.py"
    script.write_text("import sys; print(sys.executable)", encoding="utf-8")
    ended = run(None, "dlion", "launch", "-n", "1", "--", "python", str(script), env={"PATH": "/usr/bin:/bin"})
    assert (ended.code, ended.out) == (0, f"{sys.executable}\n"), ended.err
