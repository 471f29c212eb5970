"""`dlion emulate` for real: namespaces, shaped links, mpirun; and nothing left, whatever the end was."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from dlion_mpi.emulation import mpilaunch, netns
from dlion_mpi.errors import UserError
from dlion_mpi.metrics import reader as runs
from tests.system.launch import run
from tests.system.test_horovod import needs_horovod
from tests.system.test_train import SMALL, result_of

ROOT = Path(__file__).parents[2]
LIMIT_S = 60

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make network namespaces"),
    pytest.mark.skipif(
        any(shutil.which(tool) is None for tool in netns.TOOLS),
        reason=f"needs {', '.join(netns.TOOLS)}",
    ),
    pytest.mark.timeout(3 * LIMIT_S),
]

TWO = """
workers = 2
[[phases]]
cores = 24
link_mbit = [[0, 40], [12, 0]]
"""
CHANGING = """
workers = 2
[[phases]]
start_s = 0
cores = 24
uplink_mbit = 40
[[phases]]
start_s = 1
cores = 24
uplink_mbit = 7
"""
REPORT_PLACE = """
import json, os, socket
from mpi4py import MPI
comm = MPI.COMM_WORLD
routes = open("/proc/net/route").read().splitlines()[1:]
interfaces = [line.split(":")[0].strip() for line in open("/proc/net/dev").read().splitlines()[2:]]
mine = json.dumps({
    "host": socket.gethostname(),
    "cores": len(os.sched_getaffinity(0)),
    "environment": os.environ["DLION_ENVIRONMENT"],
    "default_route": any(line.split()[1] == "00000000" for line in routes),
    "interfaces": sorted(interfaces),
    "shared_memory": os.listdir("/dev/shm"),
}).encode()
buffer = bytearray(mine.ljust(2000))
everyone = bytearray(2000 * comm.size) if comm.rank == 0 else None
comm.Gather([buffer, MPI.BYTE], [everyone, MPI.BYTE] if comm.rank == 0 else None)
if comm.rank == 0:
    ranks = [json.loads(bytes(everyone[2000 * r : 2000 * (r + 1)])) for r in range(comm.size)]
    print(json.dumps({"ranks": ranks}), flush=True)
"""
REPORT_RATES = """
import subprocess, time
from dlion_mpi.microcloud import environments
from mpi4py import MPI
def rate():
    text = subprocess.run(["tc", "class", "show", "dev", "eth0"], capture_output=True, text=True).stdout
    return next(line.split(" rate ")[1].split()[0] for line in text.splitlines() if " 1:11 " in line)
if MPI.COMM_WORLD.rank == 0:
    first = rate()
    environments.start_clock(None)
    for _ in range(300):
        if rate() != first:
            break
        time.sleep(0.1)
    print(first, rate(), flush=True)
MPI.COMM_WORLD.Barrier()
"""


@dataclass(frozen=True)
class Place:
    """Where a test's emulations keep their records and temporary files, apart from everybody else's."""

    folder: Path
    mark: str  # in the command line of all its ranks
    links_before: frozenset[str]

    @property
    def environ(self) -> dict[str, str]:
        return {
            **os.environ,
            "DLION_RUNTIME_DIR": str(self.folder / "records"),
            "TMPDIR": str(self.folder),
            "PYTHONPATH": str(ROOT),
        }

    def environment(self, text: str = TWO) -> str:
        path = self.folder / f"{abs(hash(text))}.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    def line(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "dlion_mpi.commands.emulate", *words]

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.line(*words), env=self.environ, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(self.line(*words), env=self.environ, stdout=subprocess.PIPE, text=True)

    def run_words(self, *command: str, name: str | None = None, env: str | None = None) -> list[str]:
        named = ["--name", name] if name else []
        return ["run", "--env", env or self.environment(), *named, "--", *command]

    def sleeper(self) -> Sequence[str]:
        """A command whose ranks can be told from everybody else's."""
        return (sys.executable, "-c", f"import time; time.sleep({LIMIT_S}) # {self.mark}")

    def ranks(self) -> list[int]:
        return [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdecimal() and self.mark in _command_line(entry) and "emulate" not in _command_line(entry)
        ]

    def namespaces(self) -> list[str]:
        """Namespaces of this test: those of its records' names and those that hold its marked name."""
        return [path.name for path in netns.NAMESPACES.glob(f"dlion-{self.mark}*")]

    def left(self) -> list[str]:
        """Everything of this test's emulations that is still there."""
        found = [f"namespace {name}" for name in self.namespaces()]
        found += [f"process {pid}" for pid in self.ranks()]
        found += [f"file {path}" for path in self.folder.iterdir() if path.suffix != ".toml"]
        found += [f"link {name}" for name in _links() - self.links_before if name.startswith(("br", "w", "veth"))]
        return found


def _command_line(entry: Path) -> str:
    try:
        return (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _links() -> frozenset[str]:
    """Interfaces of the host's own network."""
    return frozenset(os.listdir("/sys/class/net"))


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {LIMIT_S} s for {what}"
        time.sleep(0.05)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    try:
        mpilaunch.find_launcher()
    except UserError as error:
        pytest.skip(f"needs an mpirun: {error}")
    folder = tmp_path / "p"
    folder.mkdir()
    here = Place(folder=folder, mark=f"t{secrets.token_hex(4)}", links_before=_links())
    yield here
    here.call("down", "--all")


def test_success_leaves_nothing_and_rank_is_worker(place: Place) -> None:
    done = place.call(*place.run_words(sys.executable, "-c", REPORT_PLACE, name=place.mark))
    assert done.returncode == 0, done.stderr
    ranks = json.loads(done.stdout.splitlines()[-1])["ranks"]
    assert [rank["host"] for rank in ranks] == ["w0", "w1"]
    for rank in ranks:
        assert rank["cores"] == len(os.sched_getaffinity(0))  # not all bound to one core
        assert rank["environment"] == place.environment()
        assert rank["interfaces"] == ["eth0", "lo"]
        assert not rank["default_route"]
        assert rank["shared_memory"] == []
    assert place.left() == []


def test_six_ranks_are_the_six_workers(place: Place) -> None:
    words = place.run_words(sys.executable, "-c", REPORT_PLACE, name=place.mark, env="hetero-sys-a")
    done = place.call(*words)
    ranks = json.loads(done.stdout.splitlines()[-1])["ranks"]
    assert [(rank["host"], rank["environment"]) for rank in ranks] == [(f"w{k}", "hetero-sys-a") for k in range(6)]


def test_failure_passes_its_exit_code_and_leaves_nothing(place: Place) -> None:
    done = place.call(*place.run_words("sh", "-c", "echo said; exit 7", name=place.mark))
    assert done.returncode == 7
    assert set(done.stdout.split()) == {"said"}
    assert place.left() == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_nothing(place: Place, signum: signal.Signals) -> None:
    process = place.start(*place.run_words(*place.sleeper(), name=place.mark))
    wait_until(lambda: len(place.ranks()) >= 2, "two ranks")
    process.send_signal(signum)
    assert process.wait(timeout=LIMIT_S) == 128 + signum
    assert place.left() == []


def test_ctrl_c_while_it_is_being_built(place: Place) -> None:
    process = place.start(*place.run_words(*place.sleeper(), name=place.mark))
    wait_until(place.namespaces, "a namespace")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=LIMIT_S) == 130
    assert place.left() == []


def test_ranks_that_will_not_end(place: Place) -> None:
    stubborn = f"trap '' TERM INT; : {place.mark}; while :; do sleep 0.1; done"
    process = place.start(*place.run_words("sh", "-c", stubborn, name=place.mark))
    wait_until(lambda: len(place.ranks()) >= 2, "two ranks")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=LIMIT_S) == 130
    assert place.left() == []


def killed_run(place: Place) -> None:
    """Start a run and kill it with SIGKILL while its ranks are at work."""
    process = place.start(*place.run_words(*place.sleeper(), name=place.mark))
    wait_until(lambda: len(place.ranks()) >= 2, "two ranks")
    process.kill()
    process.wait(timeout=LIMIT_S)
    assert place.namespaces()
    assert place.ranks()


def test_down_clears_what_a_killed_run_left(place: Place) -> None:
    killed_run(place)
    assert "left behind by a killed run" in place.call("status").stdout
    assert place.mark in place.call("down").stdout
    assert place.left() == []
    assert place.call("status").stdout == "no emulations\n"


@pytest.mark.parametrize("action", ["run", "up"])
def test_the_next_emulation_clears_what_a_killed_run_left(place: Place, action: str) -> None:
    killed_run(place)
    words = [action, "--env", place.environment(), "--name", f"{place.mark}-next"]
    done = place.call(*words, *(["--", "true"] if action == "run" else []))
    assert done.returncode == 0, done.stderr
    assert not place.ranks()
    assert not [name for name in place.namespaces() if "-next" not in name]
    place.call("down")
    assert place.left() == []


def test_a_command_that_ends_at_once_on_busy_cores(place: Place) -> None:
    """Open MPI's mpirun can miss the end of a rank that ends while others are being launched."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        for _ in range(8):
            done = place.call(*place.run_words("true"))
            assert done.returncode == 0, done.stderr
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_two_side_by_side(place: Place) -> None:
    first, second = f"{place.mark}-a", f"{place.mark}-b"
    process = place.start(*place.run_words(*place.sleeper(), name=first))
    wait_until(lambda: len(place.ranks()) >= 2, "two ranks")
    done = place.call(*place.run_words(sys.executable, "-c", REPORT_PLACE, name=second))
    assert done.returncode == 0, done.stderr
    assert [rank["host"] for rank in json.loads(done.stdout)["ranks"]] == ["w0", "w1"]
    assert process.poll() is None
    assert len(place.ranks()) >= 2  # the second took nothing of the first down
    taken = place.call(*place.run_words("true", name=first))
    assert taken.returncode == 2
    assert "exists already" in taken.stderr
    assert place.call("down", "--name", first).returncode == 0
    assert process.wait(timeout=LIMIT_S) == 143
    assert place.left() == []


def test_up_status_down_by_hand(place: Place) -> None:
    up = place.call("up", "--env", place.environment(), "--name", place.mark)
    assert up.returncode == 0, up.stderr
    assert f"ip netns exec dlion-{place.mark}-w1 COMMAND" in up.stdout
    assert f"{place.mark}  {place.environment()}  2 workers, 0 processes  created by up" in place.call("status").stdout
    for worker, mbit in ((0, 40), (1, 12)):
        shown = subprocess.run(
            ["tc", "-n", netns.of_worker(place.mark, worker), "class", "show", "dev", "eth0"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert f"rate {mbit}Mbit ceil {mbit}Mbit" in shown
    again = place.call("up", "--env", place.environment(), "--name", place.mark)
    assert (again.returncode, "exists already" in again.stderr) == (2, True)
    unknown = place.call("down", "--name", "no-such-one")
    assert (unknown.returncode, place.mark in unknown.stderr) == (2, True)
    down = place.call("down")
    assert (down.returncode, place.mark in down.stdout) == (0, True)
    assert place.left() == []
    assert place.call("down").stdout == "nothing to take down\n"


def test_down_must_know_which(place: Place) -> None:
    for suffix in "ab":
        place.call("up", "--env", place.environment(), "--name", f"{place.mark}-{suffix}")
    unclear = place.call("down")
    assert unclear.returncode == 2
    assert f"{place.mark}-a, {place.mark}-b" in unclear.stderr
    assert place.call("down", "--all").returncode == 0
    assert place.left() == []


def test_rates_change_while_the_run_goes_on(place: Place) -> None:
    words = place.run_words(sys.executable, "-c", REPORT_RATES, name=place.mark, env=place.environment(CHANGING))
    done = place.call(*words)
    assert done.stdout.split() == ["40Mbit", "7Mbit"], done.stderr


def test_latency_is_emulated_or_said_not_to_be(place: Place) -> None:
    env = place.environment("latency_s = 0.02\n" + TWO)
    up = place.call("up", "--env", env, "--name", place.mark)
    assert up.returncode == 0, up.stderr
    shown = subprocess.run(
        ["tc", "-n", netns.hub(place.mark), "qdisc", "show"], capture_output=True, text=True, check=True
    ).stdout
    assert ("no netem" in up.stderr) != ("netem" in shown)


def test_check_measures_each_direction_at_its_own_rate(place: Place) -> None:
    done = place.call("check", "--env", place.environment(), "--seconds", "3", "--json")
    report = json.loads(done.stdout)
    links = {(row["worker"], row["peer"]): row["measured"] for row in report["rows"] if row["what"] == "link"}
    assert abs(links[0, 1] - 40) < abs(links[0, 1] - 12)
    assert abs(links[1, 0] - 12) < abs(links[1, 0] - 40)
    assert done.returncode == (0 if report["ok"] else 1)
    assert place.left() == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--env", "homo-b", "--", "no-such-program"], "'no-such-program' not found"),
        (["run", "--env", "homo-b", "--"], "no command given"),
        (["run", "--env", "homo-z", "--", "true"], "unknown environment 'homo-z'"),
        (["run", "--env", "homo-b", "--seconds", "0", "--", "true"], "--seconds 0"),
        (["run", "--env", "homo-b", "--mpi-options", "'", "--", "true"], "--mpi-options"),
        (["up", "--env", "homo-b", "--name", "A/B"], "emulation name"),
        (["check", "--env", "homo-b", "--seconds", "1"], "--seconds 1"),
    ],
)
def test_bad_input_is_one_line_and_builds_nothing(place: Place, words: list[str], message: str) -> None:
    done = place.call(*words)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert message in line
    assert place.left() == []


def test_without_root_it_says_so(place: Place) -> None:
    as_nobody = "import os, sys; from dlion_mpi.commands import emulate; os.setuid(65534); sys.exit(emulate.program())"
    done = subprocess.run(
        [sys.executable, "-c", as_nobody, "run", "--env", "homo-b", "--", "true"],
        env=place.environ,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "needs root" in line
    assert "dlion simulate" in line
    assert place.left() == []


PACED = """
name = "two"
workers = 2
[[phases]]
cores = 24
uplink_mbit = 10
"""


@needs_horovod
def test_horovod_in_an_emulated_micro_cloud(place: Place, tmp_path: Path) -> None:
    """One rank per namespace, and computing is paced: a step of a model this small would take milliseconds."""
    out = tmp_path / "run"
    train = ["dlion", "train", *SMALL, "--strategy", "horovod", "--steps", "5", "--out", str(out)]
    words = ["emulate", "run", "--env", place.environment(PACED), "--name", place.mark, "--", *train]
    ended = run(None, "dlion", *words, env=place.environ)
    assert ended.code == 0, ended.err
    assert result_of(ended)["steps"] == 5
    (first, _) = runs.load(out).ranks
    assert np.all(first.steps["compute_s"] > 0.199)
    assert runs.load(out).emulated["name"] == "two"  # type: ignore[index]
    assert place.left() == []
