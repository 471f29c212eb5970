"""`dlion emulate`: a micro-cloud on one machine, with real processes, MPI and TCP over shaped links."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from dlion_mpi.emulation import mpilaunch, netns, records
from dlion_mpi.emulation.records import Emulation
from dlion_mpi.errors import RunError, UserError
from dlion_mpi.microcloud import environments
from dlion_mpi.microcloud.environments import Environment

POLL_S = 0.1
GRACE_S = 5.0  # time for mpirun to end its ranks after SIGTERM
OWNER_TIMEOUT_S = 30.0


@dataclass
class Stop:
    """The signal that this process received, if any."""

    signum: int | None = None


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Record Ctrl-C, SIGTERM and SIGHUP instead of ending, so that a partly built emulation can be removed."""
    stop = Stop()

    def note(signum: int, frame: FrameType | None) -> None:
        stop.signum = signum

    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {signum: signal.signal(signum, note) for signum in watched}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@dataclass
class Shaper:
    """Sets the rates of each phase at its time, counted from the start of training."""

    emulation: Emulation
    environment: Environment
    run_seconds: float | None  # None: the training program reports it
    current: int = 0
    starts_s: tuple[float, ...] = field(default=())

    def update(self, now_s: float) -> None:
        """Shape the network for the time `now_s` (seconds since the epoch)."""
        if len(self.environment.phases) == 1:
            return
        if not self.starts_s:
            clock = environments.read_clock(self.emulation.clock)
            if clock is None:
                return
            run_seconds = clock.run_seconds if self.run_seconds is None else self.run_seconds
            self.starts_s = tuple(clock.started_s + s for s in self.environment.phase_starts_s(run_seconds))
            if self.starts_s[-1] == float("inf"):
                say("the length of the run is unknown, so the first phase never ends: give --seconds")
        due = max((n for n, start_s in enumerate(self.starts_s) if start_s <= now_s), default=0)
        if due != self.current:
            self.current = due
            phase = self.environment.phases[due]
            netns.shape(self.emulation.name, self.environment, phase, verb="change")
            say(f"phase {due + 1} of {len(self.starts_s)} from {now_s - self.starts_s[0]:.1f} s")


def say(message: str) -> None:
    """Print a message on stderr; stdout belongs to the command."""
    print(f"dlion emulate: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def emulated(environment: Environment, reference: str, *, name: str | None) -> Iterator[Emulation]:
    """Build and shape an emulation, and remove it at the end in any case."""
    emulation = records.claim(reference, environment.workers, name=name, owned=True)
    try:
        build(emulation, environment)
        yield emulation
    finally:
        for problem in records.take_down(emulation):
            say(f"{problem}; try `dlion emulate down --name {emulation.name}`")


def build(emulation: Emulation, environment: Environment) -> None:
    """Create an emulation's namespaces, links and launch agent, shaped for the first phase."""
    netns.build(emulation.name, environment.workers)
    netns.shape(emulation.name, environment, environment.phases[0], verb="add")
    if environment.link_latency_s is not None:
        say("links have their bandwidth, but not their latency: one that differs from link to link is only simulated")
    elif not netns.delay(emulation.name, environment):
        latency_ms = environment.latency_s * 1e3
        say(f"this kernel has no netem: links have their bandwidth, but not their {latency_ms:g} ms of latency")
    mpilaunch.write_agent(emulation)


def run_emulated(
    reference: str,
    command: Sequence[str],
    *,
    seconds: float | None = None,
    name: str | None = None,
    mpi_options: Sequence[str] = (),
    stdout: IO[bytes] | None = None,
    timeout_s: float = float("inf"),
) -> int:
    """Run `command` as one MPI rank per worker of an environment, in a new emulation.

    `reference`: built-in name or path. `seconds`: planned length of the run, for phases given as shares (None: the
    training program reports it). Returns the exit code, or 128 + the signal that stopped this process. Raises UserError
    if it cannot start, RunError after `timeout_s` seconds.
    """
    environment = environments.load(reference)
    if seconds is not None and not 0 < seconds < float("inf"):
        raise UserError(f"--seconds {seconds:g}: give a length above zero")
    program = mpilaunch.find_command(command)
    netns.require()
    launcher = mpilaunch.find_launcher()
    if reference not in environments.names():
        reference = str(environments.locate(reference))
    with stop_signals() as stop:
        for swept in records.sweep():
            say(f"removed emulation {swept}, which a killed run had left behind")
        with emulated(environment, reference, name=name) as emulation:
            say(f"{environment.name}, {environment.workers} workers, emulation {emulation.name}")
            variables = {
                environments.ENVIRONMENT_VARIABLE: reference,
                environments.CLOCK_VARIABLE: str(emulation.clock),
            }
            if seconds is not None:
                variables[environments.SECONDS_VARIABLE] = repr(seconds)
            argv = mpilaunch.launch_command(launcher, emulation, program, forward=list(variables), options=mpi_options)
            mpirun = _start(argv, {**mpilaunch.environ_of(launcher), **variables}, emulation, stdout)
            shaper = Shaper(emulation=emulation, environment=environment, run_seconds=seconds)
            return _watch(mpirun, shaper, stop, timeout_s)


def _start(
    argv: Sequence[str], variables: Mapping[str, str], emulation: Emulation, stdout: IO[bytes] | None
) -> subprocess.Popen[bytes]:
    """Start mpirun in a new session, so that Ctrl-C reaches it only through this process."""
    environ = {**os.environ, **variables, "TMPDIR": str(Path(emulation.folder) / "hub")}
    return subprocess.Popen(argv, env=environ, stdin=subprocess.DEVNULL, stdout=stdout, start_new_session=True)


def _watch(mpirun: subprocess.Popen[bytes], shaper: Shaper, stop: Stop, timeout_s: float) -> int:
    """Wait for mpirun and change the rates at the start of each phase. Returns the exit code of the run."""
    deadline_s = time.monotonic() + timeout_s
    try:
        while stop.signum is None:
            if time.monotonic() > deadline_s:
                raise RunError(f"the command did not end within {timeout_s:g} s")
            shaper.update(time.time())
            try:
                code = mpirun.wait(timeout=POLL_S)
            except subprocess.TimeoutExpired:
                continue
            return code if code >= 0 else 128 - code
        return 128 + stop.signum
    finally:
        _end(mpirun)


def _end(mpirun: subprocess.Popen[bytes]) -> None:
    """End mpirun if it is running: SIGTERM first, then SIGKILL."""
    if mpirun.poll() is None:
        mpirun.terminate()
        try:
            mpirun.wait(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            mpirun.kill()
            mpirun.wait()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `run`, `check`, `up`, `status` and `down` to the parser of `dlion emulate`."""
    parser.set_defaults(action=main)
    actions = parser.add_subparsers(dest="emulate_action", required=True, metavar="ACTION")

    def add(action: str, text: str, *, env: bool) -> argparse.ArgumentParser:
        made = actions.add_parser(action, help=text, description=text[0].upper() + text[1:] + ".")
        if env:
            listed = ", ".join(environments.names())
            made.add_argument(
                "--env", required=True, metavar="NAME", help=f"environment: a TOML file, or one of {listed}"
            )
        return made

    run = add("run", "run a command as one MPI rank per worker of an environment", env=True)
    run.add_argument("--seconds", type=float, help="planned length of the run, which times its phases")
    run.add_argument("--name", help="name of the emulation (default: random)")
    run.add_argument("--mpi-options", default="", metavar="OPTIONS", help="additional options of mpirun, in one string")
    run.add_argument("rank_command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="command of every rank")
    check = add("check", "compare the measured links and paces of an environment with the set values", env=True)
    check.add_argument("--seconds", type=float, default=6.0, help="seconds of traffic per phase (default: 6)")
    check.add_argument("--json", action="store_true", help="print JSON instead of a table")
    up = add("up", "build an environment's namespaces and links, and keep them", env=True)
    up.add_argument("--name", help="name of the emulation (default: random)")
    add("status", "list the emulations of this machine", env=False)
    down = add("down", "remove an emulation, and those that killed runs left behind", env=False)
    which = down.add_mutually_exclusive_group()
    which.add_argument("--name", help="emulation to remove (default: the only one that `up` created)")
    which.add_argument("--all", action="store_true", help="remove all emulations of this machine, even running ones")


def main(args: argparse.Namespace) -> int:
    """Run the chosen action. Returns the exit code; raises UserError or RunError."""
    actions = {"run": _run, "check": _check, "up": _up, "status": _status, "down": _down}
    return actions[args.emulate_action](args)


def _run(args: argparse.Namespace) -> int:
    command = args.rank_command[1:] if args.rank_command[:1] == ["--"] else args.rank_command
    try:
        options = shlex.split(args.mpi_options)
    except ValueError as error:
        raise UserError(f"--mpi-options {args.mpi_options!r}: {error}; balance the quotes") from None
    return run_emulated(args.env, command, seconds=args.seconds, name=args.name, mpi_options=options)


def _check(args: argparse.Namespace) -> int:
    from dlion_mpi.emulation import linkcheck  # imports NumPy, which would slow down `dlion --help`

    environment = environments.load(args.env)
    if not linkcheck.SETTLE_S < args.seconds < float("inf"):
        raise UserError(f"--seconds {args.seconds:g}: give more than {linkcheck.SETTLE_S:g}, for rates to settle")
    run_seconds = linkcheck.run_seconds(environment, args.seconds)
    probe = [
        sys.executable,
        "-m",
        "mpi4py",
        "-m",
        "dlion_mpi.mpi.linkprobe",
        *map(netns.hostname, range(environment.workers)),
    ]
    with tempfile.TemporaryFile() as output:
        code = run_emulated(args.env, probe, seconds=run_seconds, stdout=output, timeout_s=3 * run_seconds + 120)
        output.seek(0)
        text = output.read().decode()
    if code >= 128:
        return code
    if code != 0:
        raise RunError(f"the probe failed with exit code {code}")
    report = linkcheck.evaluate(environment, linkcheck.read_probe(text, environment), run_seconds)
    print(linkcheck.to_json(report) if args.json else linkcheck.to_table(report))
    return 0 if report.ok else 1


def _up(args: argparse.Namespace) -> int:
    environment = environments.load(args.env)
    netns.require()
    reference = args.env if args.env in environments.names() else str(environments.locate(args.env))
    with stop_signals() as stop:
        records.sweep()
        emulation = records.claim(reference, environment.workers, name=args.name, owned=False)
        built = False
        try:
            build(emulation, environment)
            built = True
        finally:
            if not built or stop.signum is not None:
                records.take_down(emulation)
        if stop.signum is not None:
            return 128 + stop.signum
    print(f"emulation {emulation.name}: {environment.name}, {environment.workers} workers")
    places = [
        (netns.hostname(k), netns.address(k), netns.of_worker(emulation.name, k)) for k in range(environment.workers)
    ]
    for host, address, namespace in [*places, ("hub", netns.HUB_ADDRESS, netns.hub(emulation.name))]:
        print(f"  {host:<5} {address:<12} ip netns exec {namespace} COMMAND")
    if len(environment.phases) > 1:
        say("the emulation stays in its first phase; `dlion emulate run` runs all phases")
    return 0


def _status(args: argparse.Namespace) -> int:
    found = records.find_all()
    if not found:
        print("no emulations")
    for emulation in found:
        if emulation.owner_pid is None:
            state = "created by up"
        elif emulation.owner_lives():
            state = f"owned by process {emulation.owner_pid}"
        else:
            state = "left behind by a killed run"
        busy = len(netns.processes(netns.all_of(emulation.name, emulation.workers)))
        size = f"{emulation.workers} workers, {busy} processes"
        print(f"{emulation.name}  {emulation.environment}  {size}  {state}")
    return 0


def _down(args: argparse.Namespace) -> int:
    netns.require()
    with stop_signals():
        gone = records.sweep()
        found = records.find_all()
        if args.all:
            chosen = found
        elif args.name is not None:
            chosen = [emulation for emulation in found if emulation.name == args.name]
            if not chosen and args.name not in gone:
                listed = ", ".join(emulation.name for emulation in found) or "none"
                raise UserError(f"no emulation {args.name!r}: there are {listed}")
        else:
            chosen = [emulation for emulation in found if emulation.owner_pid is None]
            if len(chosen) > 1:
                listed = ", ".join(emulation.name for emulation in chosen)
                raise UserError(f"several emulations are up ({listed}): choose with --name, or give --all")
        problems = []
        for emulation in chosen:
            problems += _take_down(emulation)
            gone.append(emulation.name)
    for problem in problems:
        say(problem)
    print(f"taken down: {', '.join(gone)}" if gone else "nothing to take down")
    return 1 if problems else 0


def _take_down(emulation: Emulation) -> list[str]:
    """Remove an emulation. A running owner is asked to do it first."""
    if emulation.owner_pid is not None and emulation.owner_lives():
        with contextlib.suppress(ProcessLookupError):
            os.kill(emulation.owner_pid, signal.SIGTERM)
        deadline_s = time.monotonic() + OWNER_TIMEOUT_S
        while emulation.owner_lives() and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
    return records.take_down(emulation)


def program() -> int:
    """`python -m dlion_mpi.commands.emulate`. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="dlion emulate", description=__doc__)
    add_arguments(parser)
    try:
        return main(parser.parse_args())
    except (UserError, RunError) as error:
        print(f"dlion: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


if __name__ == "__main__":
    sys.exit(program())
