"""`dlion launch`: start the ranks of a run with whichever MPI is here, as torchrun and horovodrun do."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence, Set
from pathlib import Path

from dlion_mpi.errors import UserError
from dlion_mpi.log import say
from dlion_mpi.mpi import jobenv, launcher
from dlion_mpi.mpi.launcher import Host, Kind
from dlion_mpi.signals import STOPPING

EXAMPLES = """examples:
  dlion launch -n 4 train --data digits           dlion train on 4 ranks of this machine
  dlion launch -n 4 mine.py --width 64            a Python script that calls dlion_mpi.fit
  dlion launch -n 4 -- ./program --its options    any program
  dlion launch --hosts node1:2,node2:2 train      2 ranks on each of two machines, by ssh
"""
COMMANDS = ("train", "doctor")
"""Commands of dlion that make sense on several ranks."""
WATCHED = {*STOPPING, signal.SIGUSR1, signal.SIGCHLD}
INTERRUPTS = 3
"""The Ctrl-C that kills the ranks. The first ends a run after the current step, the second at once."""
PR_SET_PDEATHSIG = 1
"""Linux, prctl(2): the signal that a process gets when its parent dies."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `dlion launch`."""
    parser.description = (
        "Start the ranks of a run with the launcher that belongs to this Python's MPI: mpirun, or srun inside a Slurm "
        "job. Prints the command that it runs; passes signals and the exit code on."
    )
    parser.epilog = EXAMPLES
    parser.set_defaults(action=main)
    parser.add_argument(
        "-n", "-np", dest="ranks", metavar="RANKS", help="number of ranks (default: what --hosts sum to)"
    )
    parser.add_argument("--hosts", metavar="HOST:RANKS,...", help="other machines, reached by ssh (default: this one)")
    parser.add_argument(
        "--mpi-options", default="", metavar="OPTIONS", help="more options for mpirun or srun, in one string"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command and run nothing")
    parser.add_argument(
        "rank_command",
        nargs=argparse.REMAINDER,
        metavar="COMMAND",
        help="train, doctor, a Python script, or -- and any program; with its options",
    )


def main(args: argparse.Namespace) -> int:
    """Start the ranks and wait for them. Returns their exit code; raises UserError for what cannot be started."""
    place = jobenv.place(os.environ)
    if place is not None and place.size > 1:
        raise UserError(
            f"this is rank {place.rank} of {place.size} under {place.launcher}: start dlion launch by itself",
            quiet=place.rank != 0,
        )
    program = _program(args.rank_command)
    hosts = () if args.hosts is None else launcher.parse_hosts(args.hosts)
    ranks = _ranks(args.ranks, args.hosts, hosts)
    starter = launcher.find()
    if "SLURM_JOB_ID" in os.environ and not hosts:
        starter = launcher.in_slurm(starter)
    command = launcher.command_line(
        starter,
        program,
        ranks=ranks,
        hosts=hosts,
        options=_mpi_options(args.mpi_options),
        root=os.geteuid() == 0,
    )
    if args.dry_run:
        print(shlex.join(command))
        return 0
    say(f"dlion launch: {shlex.join(command)}")
    return Job(command, starter.kind).wait()


def _program(words: Sequence[str]) -> list[str]:
    """Return what each rank runs, with the program's absolute path."""
    folder = os.path.dirname(sys.executable)
    if words[:1] == ["--"]:
        words = words[1:]
    elif words and words[0] in COMMANDS:
        dlion = launcher.find_program(os.path.join(folder, "dlion"))
        return [*([sys.executable, "-m", "dlion_mpi"] if dlion is None else [dlion]), *words]
    elif words and words[0].endswith(".py"):
        if not Path(words[0]).is_file():
            raise UserError(f"script {words[0]} not found: give the path of a Python script")
        return [sys.executable, *words]
    if not words:
        raise UserError("no command given: write for example `dlion launch -n 4 train --data digits`")
    program = launcher.find_program(words[0], first=folder)
    if program is None:
        raise UserError(f"command {words[0]!r} not found: give {', '.join(COMMANDS)}, a script.py or a program in PATH")
    return [program, *words[1:]]


def _ranks(text: str | None, hosts_text: str | None, hosts: Sequence[Host]) -> int | None:
    """Return the number of ranks; None where Slurm knows it."""
    places = sum(host.ranks for host in hosts)
    if text is None:
        if hosts:
            return places
        tasks = os.environ.get("SLURM_NTASKS", "")
        if "SLURM_JOB_ID" not in os.environ:
            raise UserError("how many ranks? Write for example `dlion launch -n 4 train --data digits`")
        return int(tasks) if tasks.isdecimal() else None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"-n {text}: must be a whole number from 1")
    if hosts and int(text) > places:
        raise UserError(
            f"-n {text}: --hosts {hosts_text} has room for {places}: give each host its number, as in node1:2,node2:2"
        )
    return int(text)


def _mpi_options(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"--mpi-options {text!r}: {error}; balance the quotes") from None


class Job:
    """A running launcher. It has its own session, so that a Ctrl-C reaches it through this process only.

    Signals are blocked and fetched one by one: a handler that is interrupted by the next signal might never end.
    """

    def __init__(self, command: Sequence[str], kind: Kind) -> None:
        self._kind = kind
        self._interrupts = 0
        self._passed_on: set[int] = set()
        self._informed = False
        self._ended_by = 0
        # A background job must not take what is typed in the terminal.
        stdin = subprocess.DEVNULL if sys.stdin is None or sys.stdin.isatty() else None
        self._unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
        signal.signal(
            signal.SIGCHLD, lambda number, frame: None
        )  # a signal that is ignored would not wait to be fetched
        try:
            self._process = subprocess.Popen(
                command, stdin=stdin, start_new_session=True, preexec_fn=_before_exec(kind, self._unblocked)
            )
        except OSError as error:
            raise UserError(f"{command[0]} cannot be started ({error.strerror})") from None

    def wait(self) -> int:
        """Pass signals on until the launcher ends. Returns its exit code, or 128 + the signal that ended it."""
        while (code := self._process.poll()) is None:
            number = signal.sigwait(WATCHED)
            if number != signal.SIGCHLD:
                self._pass_on(number)
        if not self._passed_on:  # a repeated signal must not change the exit code
            signal.pthread_sigmask(signal.SIG_SETMASK, self._unblocked)
        if self._kind == "hydra" and code in self._passed_on:
            self._ended_by = code  # so MPICH's mpirun says that a signal has killed a rank
        if self._ended_by:
            return 128 + self._ended_by
        return code if code >= 0 else 128 - code

    def _pass_on(self, number: int) -> None:
        """Pass a signal to all ranks.

        On SIGINT and SIGTERM, Open MPI's mpirun kills its ranks within a quarter of a second, so the ranks of this
        machine get those signals directly. `dlion train` ends on all ranks if one is asked to end. MPICH's mpirun kills
        its ranks on the second SIGINT only.
        """
        self._passed_on.add(number)
        self._interrupts += number == signal.SIGINT
        by_mpirun = self._kind == "hydra" and self._interrupts > 1
        if self._kind == "openmpi" and number in STOPPING:
            ranks = ranks_below(self._process.pid)
            self._informed |= bool(ranks)
            for rank in ranks:
                with contextlib.suppress(OSError):
                    os.killpg(rank, number)
            by_mpirun = not self._informed or self._interrupts >= INTERRUPTS
            if not by_mpirun:
                return
        if by_mpirun:
            self._ended_by = number
        self._process.send_signal(number)


def ranks_below(launcher_pid: int) -> list[int]:
    """Process ids of the ranks that Open MPI's mpirun has started on this machine. Each leads a process group."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            _, parent, group, *_ = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            mine = int(parent) == launcher_pid and group == entry.name
            if mine and b"OMPI_COMM_WORLD_RANK=" in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def _before_exec(kind: Kind, unblocked: Set[int]) -> Callable[[], None]:
    """Return what a launcher does before it starts: unblock signals; on Linux, arrange to end with this process.

    SIGTERM makes Open MPI's mpirun and srun end their ranks. MPICH's mpirun would wait for its ranks; if it is killed,
    its proxies end them.
    """
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    number = signal.SIGKILL if kind == "hydra" else signal.SIGTERM
    parent = os.getpid()

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:
            os._exit(1)

    return prepare
