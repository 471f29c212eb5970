"""Launch of rank k in the namespace of worker k, by the mpirun of Open MPI or MPICH.

Both start remote ranks through an agent that they call like ssh, with a host and a command. Our agent enters the
worker's namespaces instead of logging in to a host.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dlion_mpi.emulation import netns
from dlion_mpi.emulation.records import Emulation
from dlion_mpi.errors import UserError
from dlion_mpi.mpi import launcher as mpi_launcher
from dlion_mpi.mpi.launcher import GET_ONE, Launcher, find_program

BEFORE_START_S = 0.1
"""Delay under Open MPI before a rank executes its program. mpirun 5.0.11 can hang if a program ends while other ranks
are still being launched. On busy cores 30 of 72 runs of `true` hung."""


def find_launcher() -> Launcher:
    """Find an mpirun that can start ranks through an agent of ours. Raises UserError if there is none."""
    launcher = mpi_launcher.find()
    if launcher.kind == "openmpi" and launcher.major < 5:
        raise UserError(f"{launcher.path} is {launcher.name}: emulation needs Open MPI 5 or MPICH: {GET_ONE}")
    return launcher


def environ_of(launcher: Launcher) -> dict[str, str]:
    """Environment variables to set. Without them MPICH detects that the workers share a machine and uses memory."""
    return {"UCX_TLS": "tcp,self", "FI_PROVIDER": "tcp"} if launcher.kind == "hydra" else {}


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
