"""A real Slurm on one machine: a controller in the hub of an emulation, and a slurmd in each of its workers.

All processes run in the emulation's namespaces, and all files are in its folder. Removing the emulation kills those
processes and deletes that folder, so it removes the cluster in any state.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dlion_mpi.commands import emulate
from dlion_mpi.emulation import netns, records
from dlion_mpi.emulation.records import Emulation
from dlion_mpi.errors import RunError, UserError
from dlion_mpi.log import complain
from dlion_mpi.microcloud import environments
from dlion_mpi.microcloud.environments import Environment

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "libpmix-dev")
"""Debian packages. Slurm's PMIx plugin opens libpmix.so, which only the development package contains."""
TOOLS = ("slurmctld", "slurmd", "sbatch", "munged")
READY_TIMEOUT_S = 60.0
POLL_S = 0.2
CONF = "slurm.conf"
POLICY = Path("/usr/sbin/policy-rc.d")
"""Debian packages call this script to ask whether they may start their daemons."""


def kinds(environment: Environment) -> tuple[list[str], list[str]]:
    """Return the names of the fast nodes (more cores than the mean) and of the slow ones; equal nodes are halved."""
    cores = environment.phases[0].cores
    names = [netns.hostname(worker) for worker in range(len(cores))]
    fast = [name for name, count in zip(names, cores, strict=True) if count > sum(cores) / len(cores)]
    fast = fast or names[: (len(names) + 1) // 2]
    return fast, [name for name in names if name not in fast]


def slurm_conf(environment: Environment, folder: Path) -> str:
    """Return the configuration of a cluster of the environment's workers.

    Fast nodes have 4 processors and 2 nominal GPUs, slow ones 2 processors. Any other job preempts jobs of the
    partition `spot`, which get a signal and 30 s, and are requeued.
    """
    fast, slow = kinds(environment)
    lines = []
    for worker, cores in enumerate(environment.phases[0].cores):
        name = netns.hostname(worker)
        kind = "CPUs=4 Gres=gpu:2 Feature=fast" if name in fast else "CPUs=2 Feature=slow"
        lines.append(f"NodeName={name} NodeAddr={netns.address(worker)} RealMemory=8000 {kind},cores{cores:g}")
    steady = "PriorityTier=5 PreemptMode=OFF"
    for partition, nodes, options in (
        ("all", [*fast, *slow], f"Default=YES {steady}"),
        ("fast", fast, steady),
        ("slow", slow, steady),
        ("spot", [*fast, *slow], "PriorityTier=1 PreemptMode=REQUEUE GraceTime=30"),
    ):
        if nodes:
            lines.append(f"PartitionName={partition} Nodes={','.join(nodes)} MaxTime=60 DefaultTime=10 {options}")
    nodes_and_partitions = "\n".join(lines)
    return f"""\
ClusterName=dlion
SlurmctldHost=hub({netns.HUB_ADDRESS})
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its credential expires, by default two minutes.
AuthInfo=socket={folder}/munge.socket,cred_expire=15
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
# Nodes share one file system and need separate folders: %n is the node's name.
SlurmdSpoolDir={folder}/%n/spool
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmdLogFile={folder}/%n/slurmd.log
TmpFS={folder}/%n/tmp
TaskProlog={folder}/task-prolog
# No control groups, because a container cannot create them. Processors are counted, but not bound.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
# Use the resources configured below instead of those of this machine.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2,sched_min_interval=100000
GresTypes=gpu
MpiDefault=none
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=10
MessageTimeout=60
SlurmdTimeout=0
InactiveLimit=0
{nodes_and_partitions}
"""


def other_files(environment: Environment, folder: Path) -> dict[str, str]:
    """Return the other configuration files by name."""
    gpus = f"NodeName={','.join(kinds(environment)[0])} Name=gpu"
    cgroup = "CgroupPlugin=cgroup/v1" if Path("/sys/fs/cgroup/memory").is_dir() else "IgnoreSystemd=yes"
    hosts = {"localhost": "127.0.0.1", "hub": netns.HUB_ADDRESS}
    hosts |= {netns.hostname(worker): netns.address(worker) for worker in range(environment.workers)}
    return {
        "hosts": "".join(f"{address} {name}\n" for name, address in hosts.items()),
        "cgroup.conf": cgroup + "\n",
        # Nominal GPUs: they are counted and allocated, and each has a device file that exists on every machine.
        "gres.conf": "AutoDetect=off\n" + "".join(f"{gpus} File=/dev/{device}\n" for device in ("null", "zero")),
        # With a shared TMPDIR, MPI's daemons of different nodes would use each other's files.
        "task-prolog": f'#!/bin/sh\necho "export TMPDIR={folder}/$SLURMD_NODENAME/tmp"\n',
    }


def main() -> int:
    """Parse the command line and run the action. Returns the exit code; for `login`, that of the command."""
    parser = argparse.ArgumentParser(prog="env/slurm", description=__doc__.split("\n")[0] if __doc__ else None)
    actions = parser.add_subparsers(dest="action", required=True)
    for name in ("up", "down", "login"):
        action = actions.add_parser(name, prog=f"env/slurm/{name}.sh")
        action.add_argument("--name", default="slurm", help="name of the cluster (default: slurm)")
        if name == "up":
            action.add_argument("--env", default="hetero-sys-a", help="micro-cloud: a name or a TOML file")
        if name == "login":
            action.add_argument("command", nargs=argparse.REMAINDER, help="command to run (default: a shell)")
    args = parser.parse_args()
    try:
        return {"up": up, "down": down, "login": login}[args.action](args)
    except UserError as error:
        complain(str(error))
        return 2
    except RunError as error:
        complain(str(error))
        return 1


def up(args: argparse.Namespace) -> int:
    """Build the emulation and start the cluster in it. Removes everything on failure."""
    if os.geteuid() != 0:
        raise UserError("env/slurm/up.sh needs root, to make network namespaces and run Slurm's daemons: use sudo")
    environment = environments.load(args.env)
    netns.require()
    with emulate.stop_signals() as stop:
        install()
        reference = args.env if args.env in environments.names() else str(environments.locate(args.env))
        records.sweep()
        emulation = records.claim(reference, environment.workers, name=args.name, owned=False)
        up_and_running = False
        try:
            emulate.build(emulation, environment)
            start(emulation, environment)
            while stop.signum is None and not up_and_running:
                up_and_running = ready(emulation)
        finally:
            if not up_and_running:
                records.take_down(emulation)
        if stop.signum is not None:
            records.take_down(emulation)
            return 128 + stop.signum
    name = "" if args.name == "slurm" else f" --name {args.name}"
    print(on_login_node(emulation, "sinfo", "--format=%9P %.5D %10N %f").stdout, end="")
    print(f"log in:    bash env/slurm/login.sh{name}\ntake down: bash env/slurm/down.sh{name}")
    return 0


def down(args: argparse.Namespace) -> int:
    """Remove the cluster, or the rest of one. A missing cluster is not an error."""
    if os.geteuid() != 0:
        raise UserError("env/slurm/down.sh needs root, as up.sh does: use sudo")
    netns.require()
    with emulate.stop_signals():
        records.sweep()
        chosen = [emulation for emulation in records.find_all() if emulation.name == args.name]
        problems = [problem for emulation in chosen for problem in records.take_down(emulation)]
    for problem in problems:
        complain(problem)
    print(f"taken down: {args.name}" if chosen else f"nothing to take down: no cluster {args.name}")
    return 1 if problems else 0


def login(args: argparse.Namespace) -> int:
    """Replace this process by a shell or a command on the login node."""
    words = args.command[1:] if args.command[:1] == ["--"] else args.command
    if os.geteuid() != 0:
        raise UserError("env/slurm/login.sh needs root, as up.sh does: use sudo")
    emulation = next((e for e in records.find_all() if e.name == args.name), None)
    if emulation is None or not (Path(emulation.folder) / CONF).exists():
        raise UserError(f"there is no cluster {args.name}: start one with bash env/slurm/up.sh")
    line = on_hub(emulation, *(words or [os.environ.get("SHELL") or "bash"]))
    os.execvpe(line[0], line, environ(emulation))


def install() -> None:
    """Install Slurm and munge from Debian without starting their daemons. Raises UserError on failure."""
    apt = shutil.which("apt-get")
    has_slurm = all(netns.which(tool) for tool in TOOLS)
    if has_slurm and (apt is None or any(Path("/usr/lib").glob("*/pmix2/lib/libpmix.so"))):
        return
    needed = f"env/slurm/up.sh needs {', '.join(PACKAGES)}"
    if apt is None:
        raise UserError(f"{needed}, and there is no apt-get: use Debian or Ubuntu, or install Slurm 22.05 or later")
    emulate.say(f"installing from Debian: {' '.join(PACKAGES)}")
    options = ["-qq", "-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=120"]
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with daemons_not_started():
        for words in (["install", *PACKAGES], ["update"], ["install", *PACKAGES]):
            done = subprocess.run(
                [apt, *options, *words],
                env=quiet,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode == 0 and words[0] == "install":
                return
    reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
    raise UserError(f"{needed}, which apt-get could not install ({reason}): check the network and the disk")


@contextlib.contextmanager
def daemons_not_started() -> Iterator[None]:
    """Prevent packages from starting daemons during installation. An existing policy of the host is kept."""
    is_missing = not POLICY.exists()
    if is_missing:
        POLICY.write_text("#!/bin/sh\nexit 101\n", encoding="utf-8")
        POLICY.chmod(0o755)
    try:
        yield
    finally:
        if is_missing:
            POLICY.unlink(missing_ok=True)


def start(emulation: Emulation, environment: Environment) -> None:
    """Write the configuration and start munged, slurmctld and the slurmds."""
    folder = Path(emulation.folder)
    workers = [netns.hostname(worker) for worker in range(environment.workers)]
    for place in ("state", *(f"{host}/{kind}" for host in workers for kind in ("spool", "tmp"))):
        (folder / place).mkdir(parents=True, exist_ok=True)
    files = {CONF: slurm_conf(environment, folder), **other_files(environment, folder)}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "task-prolog").chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    # --force: munged objects to running as root and to a private folder.
    places = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
    daemon(emulation, "hub", "munged", "--force", f"--socket={folder}/munge.socket", *places)
    daemon(emulation, "hub", "slurmctld", "-f", str(folder / CONF))
    # A slurmd that finds no controller retries at growing intervals.
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while on_login_node(emulation, "scontrol", "ping").returncode != 0 and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    for host in workers:
        daemon(emulation, host, "slurmd", "-N", host, "-f", str(folder / CONF))


def daemon(emulation: Emulation, host: str, program: str, *options: str) -> None:
    """Start a daemon on a host. Raises RunError with its output on failure."""
    line = on_host(emulation, host, netns.which(program) or program, *options)
    with tempfile.TemporaryFile("w+") as output:  # not a pipe, which the daemon would keep open
        done = subprocess.run(
            line,
            env=environ(emulation),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            timeout=READY_TIMEOUT_S,
            check=False,
            start_new_session=True,
        )
        output.seek(0)
        if done.returncode != 0:
            raise RunError(f"{program} on {host} did not start: {' '.join(output.read().split()) or 'no output'}")


def ready(emulation: Emulation) -> bool:
    """Whether every node is idle; waits POLL_S if not. Raises RunError after READY_TIMEOUT_S."""
    folder = Path(emulation.folder)
    begun_s = (folder / CONF).stat().st_mtime
    answer = on_login_node(emulation, "sinfo", "--noheader", "--Node", "--partition=all", "--format=%T")
    states = answer.stdout.split()
    if len(states) == emulation.workers and set(states) == {"idle"}:
        return True
    if time.time() - begun_s > READY_TIMEOUT_S:
        found = ", ".join(states) or answer.stderr.strip()
        raise RunError(f"the nodes are not ready after {READY_TIMEOUT_S:g} s: {found}{_last_errors(folder)}")
    time.sleep(POLL_S)
    return False


def _last_errors(folder: Path) -> str:
    """Return the last error of each log, because the logs are deleted with the folder."""
    found = ""
    for log in sorted([*folder.glob("*.log"), *folder.glob("*/slurmd.log")]):
        errors = [line for line in log.read_text(errors="replace").splitlines() if "error" in line or "fatal" in line]
        found += f"; {log.relative_to(folder)}: {errors[-1]}" if errors else ""
    return found


def on_login_node(emulation: Emulation, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command on the login node and return its output."""
    return subprocess.run(
        on_hub(emulation, *words),
        env=environ(emulation),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=READY_TIMEOUT_S,
        check=False,
    )


def on_hub(emulation: Emulation, *words: str) -> list[str]:
    """Return the command line that runs a command on the login node."""
    return on_host(emulation, "hub", *words)


def on_host(emulation: Emulation, host: str, *words: str) -> list[str]:
    """Return the command line that runs a command on a host through the emulation's agent, which is called like ssh.

    Only the command sees the agent's mounts, and so the names of the nodes.
    """
    named = shlex.join(["mount", "--bind", str(Path(emulation.folder) / "hosts"), "/etc/hosts"])
    return ["sh", str(Path(emulation.folder) / "agent"), host, f"{named} && {shlex.join(['exec', *words])}"]


def environ(emulation: Emulation) -> dict[str, str]:
    """Return this process's environment with the cluster's configuration instead of any other Slurm settings."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
    return {**own, "SLURM_CONF": str(Path(emulation.folder) / CONF)}


if __name__ == "__main__":
    sys.exit(main())
