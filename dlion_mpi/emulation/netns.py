"""Network namespaces and traffic shaping of an emulated micro-cloud.

Each worker has a network namespace with one interface, `eth0`. A bridge in another namespace, the hub, joins them. An
emulation therefore shares no interface, address or route with the host or with another emulation, and deleting its
namespaces removes everything.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from dlion_mpi.errors import UserError
from dlion_mpi.microcloud.environment import Environment, Phase

NAMESPACES = Path("/run/netns")
MAX_WORKERS = 250
KILL_TIMEOUT_S = 10.0
TOOLS = {
    "ip": "iproute2",
    "tc": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "mount": "mount",
    "hostname": "hostname",
}
INSTEAD = "or use `dlion simulate`, which needs none of this"
# Replaces the host's congestion control: BBR, for example, splits an uplink 4 to 1 between equal flows.
TCP_SETTINGS = "echo reno > /proc/sys/net/ipv4/tcp_congestion_control"
_FRAME_BYTES = 1514
_MIN_BURST_BYTES = 4 * _FRAME_BYTES
_CATCH_UP_S = 0.02
_PEAK_S = 0.002
_FIRST_PEER_CLASS = 0x10


def require() -> None:
    """Raise UserError unless this machine can make and shape network namespaces."""
    if not sys.platform.startswith("linux"):
        raise UserError(f"dlion emulate needs Linux network namespaces: use a Linux machine, {INSTEAD}")
    missing = [tool for tool in TOOLS if which(tool) is None]
    if missing:
        packages = sorted({TOOLS[tool] for tool in missing})
        raise UserError(f"dlion emulate needs {', '.join(missing)}: install {', '.join(packages)} (apt), {INSTEAD}")
    if os.geteuid() != 0:
        raise UserError(f"dlion emulate needs root to make network namespaces: run it with sudo, {INSTEAD}")


def which(tool: str) -> str | None:
    """Return the path of a system tool, or None. Also searches the sbin directories."""
    return shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/bin:/bin")


def of_emulation(name: str) -> str:
    """Prefix of the namespaces of an emulation."""
    return f"dlion-{name}"


def hub(name: str) -> str:
    """Namespace of the bridge, where mpirun runs."""
    return f"{of_emulation(name)}-hub"


def of_worker(name: str, worker: int) -> str:
    """Namespace of a worker."""
    return f"{of_emulation(name)}-{hostname(worker)}"


def all_of(name: str, workers: int) -> list[str]:
    """List all namespaces of an emulation."""
    return [hub(name), *(of_worker(name, worker) for worker in range(workers))]


def hostname(worker: int) -> str:
    """Host name of a worker; also the name of its port on the bridge."""
    return f"w{worker}"


def address(worker: int) -> str:
    """IPv4 address of a worker's eth0. Emulations are isolated from each other and use the same addresses."""
    return f"10.47.0.{worker + 1}"


HUB_ADDRESS = "10.47.0.254"


def build(name: str, workers: int) -> None:
    """Create the namespaces, the bridge and the unshaped links. Raises UserError if the machine refuses."""
    if workers > MAX_WORKERS:
        raise UserError(f"{workers} workers are too many to emulate: at most {MAX_WORKERS}, {INSTEAD}")
    for namespace in all_of(name, workers):
        _run(["ip", "netns", "add", namespace])
    _ip(
        hub(name),
        "link set lo up",
        "link add br0 type bridge",
        "link set br0 addrgenmode none",  # no IPv6: MPI would try it, and only IPv4 is shaped
        f"addr add {HUB_ADDRESS}/24 dev br0",
        "link set br0 up",
    )
    for worker in range(workers):
        namespace, port = of_worker(name, worker), hostname(worker)
        _ip(
            hub(name),
            f"link add {port} type veth peer name eth0 netns {namespace}",
            f"link set {port} addrgenmode none",
            f"link set {port} master br0 up",
        )
        _ip(
            namespace,
            "link set lo up",
            "link set eth0 addrgenmode none",
            f"addr add {address(worker)}/24 dev eth0",
            "link set eth0 up",
        )
        _run(["nsenter", f"--net={NAMESPACES / namespace}", "sh", "-c", TCP_SETTINGS])


def segment_bytes(environment: Environment, worker: int) -> int:
    """Return the largest segment that the kernel may pass to a worker's eth0: 4 ms of its slowest link.

    With 64 KiB a link of 4 Mbit/s would send one burst and then stay silent for 0.13 s. With less than 8 frames the
    acknowledgements would fill slow links in the opposite direction.
    """
    peers = [peer for peer in range(environment.workers) if peer != worker]
    rates = [environment.rate_mbit(worker, peer, phase) for phase in environment.phases for peer in peers]
    slowest_bytes = min(rates, default=0.0) * 1e6 / 8 * 0.004
    return int(min(max(slowest_bytes, 8 * _FRAME_BYTES), 65_536))


def shape(name: str, environment: Environment, phase: Phase, *, verb: str) -> None:
    """Set the rate of every link. `verb`: "add" after `build`, "change" while the links carry traffic."""
    for worker in range(environment.workers):
        if verb == "add":
            largest = segment_bytes(environment, worker)
            _ip(of_worker(name, worker), f"link set eth0 gso_max_size {largest}")
        commands = shaping(environment, worker, phase, verb=verb)
        if commands:
            _run(["tc", "-n", of_worker(name, worker), "-batch", "-"], text="\n".join(commands) + "\n")


def shaping(environment: Environment, worker: int, phase: Phase, *, verb: str) -> list[str]:
    """Return the `tc` commands that shape one worker's eth0.

    The uplink has one htb class with a child class per destination. A shared uplink guarantees each peer an even part
    and lends unused rate; a matrix limits each peer to its own rate. Traffic to the hub (mpirun) is in no class and not
    shaped, because it does not belong to the micro-cloud.
    """
    peers = [peer for peer in range(environment.workers) if peer != worker]
    rates = {peer: environment.rate_mbit(worker, peer, phase) for peer in peers}
    total = sum(rates.values())
    if not peers:
        return []
    commands = ["qdisc add dev eth0 root handle 1: htb default 0"] if verb == "add" else []
    commands.append(f"class {verb} dev eth0 parent 1: classid 1:1 {_htb(total, total)}")
    for peer in peers:
        most = rates[peer] if phase.uplink_mbit is None else total
        class_id = f"1:{_FIRST_PEER_CLASS + peer:x}"
        commands.append(f"class {verb} dev eth0 parent 1:1 classid {class_id} {_htb(rates[peer], most)}")
        if verb == "add":
            match = f"u32 match ip dst {address(peer)}/32 flowid {class_id}"
            commands.append(f"filter add dev eth0 parent 1: protocol ip prio 1 {match}")
    return commands


def _htb(rate_mbit: float, ceil_mbit: float) -> str:
    """Return the options of an htb class.

    The burst lets a link use its share after `_CATCH_UP_S` of silence, at most at its ceiling. Small, equal quanta make
    siblings share evenly.
    """
    burst_bytes = max(_MIN_BURST_BYTES, int(rate_mbit * 1e6 / 8 * _CATCH_UP_S))
    ceil_burst_bytes = max(_MIN_BURST_BYTES, int(ceil_mbit * 1e6 / 8 * _PEAK_S))
    return (
        f"htb rate {rate_mbit * 1e6:.0f}bit ceil {ceil_mbit * 1e6:.0f}bit quantum {_MIN_BURST_BYTES} "
        f"burst {burst_bytes} cburst {ceil_burst_bytes}"
    )


def delay(name: str, environment: Environment) -> bool:
    """Add the one-way latency to every port of the bridge. Returns False if the kernel has no netem."""
    if environment.latency_s == 0:
        return True
    options = f"netem delay {environment.latency_s * 1e6:.0f}us limit 100000"
    commands = [f"qdisc add dev {hostname(k)} root {options}" for k in range(environment.workers)]
    try:
        _run(["tc", "-n", hub(name), "-batch", "-"], text="\n".join(commands) + "\n")
    except UserError:
        return False
    return True


def exists(name: str, workers: int) -> bool:
    """Whether a namespace of that emulation exists."""
    return any((NAMESPACES / namespace).exists() for namespace in all_of(name, workers))


def processes(namespaces: Iterable[str]) -> list[int]:
    """List the ids of the processes in the given namespaces."""
    wanted = set()
    for namespace in namespaces:
        try:
            status = os.stat(NAMESPACES / namespace)
        except OSError:
            continue
        wanted.add((status.st_dev, status.st_ino))
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            status = os.stat(entry / "ns" / "net")
        except OSError:  # the process has ended
            continue
        if (status.st_dev, status.st_ino) in wanted:
            found.append(int(entry.name))
    return found


def destroy(name: str, workers: int) -> list[str]:
    """Kill the processes in the namespaces and delete the namespaces. Missing namespaces are not an error.

    Returns one line per failure.
    """
    namespaces = all_of(name, workers)
    deadline_s = time.monotonic() + KILL_TIMEOUT_S
    while (pids := processes(namespaces)) and time.monotonic() < deadline_s:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)
    problems = [f"process {pid} does not die" for pid in pids]
    for namespace in namespaces:
        if not (NAMESPACES / namespace).exists():
            continue
        try:
            _run(["ip", "netns", "del", namespace])
        except UserError as error:
            if (NAMESPACES / namespace).exists():  # otherwise another process has deleted it
                problems.append(str(error))
    return problems


def sent_bytes(name: str, worker: int) -> dict[int, int]:
    """Return the bytes that a shaped worker has sent to each peer, headers included, from the kernel's counters."""
    tc = which("tc") or "tc"
    command = [tc, "-n", of_worker(name, worker), "-s", "class", "show", "dev", "eth0"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    rows = re.findall(r"^class htb 1:(\w+) .*\n *Sent (\d+) bytes", shown, re.MULTILINE)
    found = {int(minor, 16) - _FIRST_PEER_CLASS: int(sent) for minor, sent in rows}
    return {peer: sent for peer, sent in found.items() if peer >= 0}


def _ip(namespace: str, *commands: str) -> None:
    _run(["ip", "-n", namespace, "-batch", "-"], text="\n".join(commands) + "\n")


def _run(command: Sequence[str], *, text: str = "") -> None:
    """Run a system tool in a separate session, so that Ctrl-C does not reach it. Raises UserError if it fails."""
    tool = which(command[0]) or command[0]
    done = subprocess.run(
        [tool, *command[1:]],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        start_new_session=True,
    )
    if done.returncode != 0:
        complaint = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
        raise UserError(
            f"this machine refuses `{' '.join(command)}` ({complaint}): "
            f"use one with network namespaces and htb, as root and outside a container, {INSTEAD}"
        )
