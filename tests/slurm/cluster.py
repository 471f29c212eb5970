"""A Slurm cluster for the tests, made and taken down as a user does it, and what they ask of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from dlion_mpi.emulation import netns

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
LIMIT_S = 90.0
FOUR = """
workers = 4
[[phases]]
cores = [24, 24, 4, 4]
uplink_mbit = [400, 400, 100, 100]
"""
DENSE = ("--data", "digits", "--model", "tests.nets:dense")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")


@dataclass(frozen=True)
class Job:
    """How a job ended. ``code``: of its script, 128 + the signal if one ended it."""

    number: str
    state: str
    code: int
    log: str


@dataclass
class Cluster:
    """``folder``: everything of it, and a checkout to submit from, of links to the real one."""

    folder: Path
    name: str
    submitted: list[str] = field(default_factory=list)

    @property
    def checkout(self) -> Path:
        return self.folder / "checkout"

    @property
    def environ(self) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return {
            **own,
            "DLION_RUNTIME_DIR": str(self.folder / "records"),
            "TMPDIR": str(self.folder),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "DLION_MACHINE": "active",
            "OMPI_MCA_btl": "^ofi",  # no search for fabrics that are not there
        }

    def prepare(self) -> None:
        self.checkout.mkdir()
        for name in ("jobs", "env", "tests", "dlion_mpi"):
            (self.checkout / name).symlink_to(ROOT / name)
        (self.folder / "four.toml").write_text(FOUR, encoding="utf-8")

    def script(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """A script of env/slurm, for this cluster."""
        line = ["bash", str(ROOT / "env" / "slurm" / f"{name}.sh"), "--name", self.name, *words]
        return subprocess.run(
            line, env=self.environ, cwd=self.checkout, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )

    def up(self) -> subprocess.CompletedProcess[str]:
        return self.script("up", "--env", str(self.folder / "four.toml"))

    def down(self) -> subprocess.CompletedProcess[str]:
        return self.script("down")

    def login(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """A command on the login node, in the checkout, with more environment variables."""
        return self.script("login", "env", *(f"{name}={value}" for name, value in variables.items()), *words)

    def submit(self, *words: str, **variables: str) -> str:
        """Submit a script; returns the job's number."""
        return self.numbers("sbatch", "--parsable", *words, **variables)[0]

    def numbers(self, *words: str, **variables: str) -> list[str]:
        """The numbers of the jobs that a command submits, as it prints them."""
        done = self.login(*words, **variables)
        assert done.returncode == 0, done.stderr
        found = done.stdout.split()
        assert found, done.stderr
        assert all(number.isdigit() for number in found), done.stdout
        self.submitted += found
        return found

    def ask(self, *words: str) -> str:
        """What a command of Slurm's says, asked on the login node without the detour by login.sh, since it is asked
        often."""
        (conf,) = self.folder.glob(f"dlion-emulation-{self.name}-*/slurm.conf")
        enter = ["nsenter", f"--net={netns.NAMESPACES / netns.hub(self.name)}", *words]
        return subprocess.run(
            enter, env={**self.environ, "SLURM_CONF": str(conf)}, capture_output=True, text=True, check=True, timeout=60
        ).stdout

    def records(self, number: str) -> list[dict[str, str]]:
        """What Slurm knows of a job: one table, or one per task or component."""
        said = self.ask("scontrol", "show", "--oneliner", "job", number)
        return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in said.splitlines() if line.strip()]

    def until(self, number: str, *states: str, timeout_s: float = LIMIT_S) -> list[dict[str, str]]:
        """Wait until all of a job is in one of the states. Fails with its log after ``timeout_s``."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            records = self.records(number)
            if records and {record["JobState"] for record in records} <= set(states):
                return records
            if time.monotonic() > deadline_s:
                now = ", ".join(f"{record['JobState']} ({record['Reason']})" for record in records)
                raise AssertionError(f"job {number} is {now} after {timeout_s} s: {self.log(records[0])}")
            time.sleep(0.25)

    def ended(self, number: str, *, timeout_s: float = LIMIT_S) -> list[Job]:
        """Wait for a job's end: its tasks or components."""
        jobs = []
        for record in self.until(number, *ENDED, timeout_s=timeout_s):
            code, signal = map(int, record["ExitCode"].split(":"))
            jobs.append(Job(record["JobId"], record["JobState"], 128 + signal if signal else code, self.log(record)))
        return jobs

    def end(self, number: str, *, timeout_s: float = LIMIT_S) -> Job:
        """As `ended`, of a job that is only one."""
        return self.ended(number, timeout_s=timeout_s)[0]

    def log(self, record: dict[str, str]) -> str:
        path = Path(record.get("StdOut", ""))
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "no log"

    def wait_for_log(self, number: str, text: str) -> None:
        """Wait until a job's log says something."""
        deadline_s = time.monotonic() + LIMIT_S
        while text not in self.log(record := self.records(number)[0]):
            assert record["JobState"] in ("PENDING", "RUNNING", "CONFIGURING"), self.log(record)
            assert time.monotonic() < deadline_s, f"no {text!r} in {self.log(record)}"
            time.sleep(0.25)

    def sent_bytes(self, worker: int) -> int:
        """Bytes that a worker has sent over its link, by its port on the bridge."""
        line = next(
            line for line in self.ask("cat", "/proc/net/dev").splitlines() if line.strip().startswith(f"w{worker}:")
        )
        return int(line.split(":")[1].split()[0])

    def node_states(self) -> list[str]:
        return self.ask("sinfo", "--noheader", "--Node", "--partition=all", "--format=%T").split()

    def ranks_left(self) -> list[str]:
        """Command lines of trainings of this cluster that still run some seconds after their job."""
        deadline_s = time.monotonic() + 20
        while (found := self._ranks()) and time.monotonic() < deadline_s:
            time.sleep(0.25)
        return found

    def _ranks(self) -> list[str]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    folder = os.readlink(entry / "cwd")
                except OSError:
                    continue
                if "dlion train" in line and folder == str(self.checkout):
                    found.append(line)
        return found
