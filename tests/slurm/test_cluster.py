"""The cluster itself: it is left by nothing, whatever its end was, and says in one line why it cannot be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dlion_mpi.emulation import netns
from tests.slurm.cluster import LIMIT_S, ROOT, Cluster

pytestmark = pytest.mark.timeout(240)
UP = ROOT / "env" / "slurm" / "cluster.py"


def traces(folder: Path, name: str) -> list[str]:
    """Namespaces, processes and files that there are of a cluster."""
    found = [path.name for path in netns.NAMESPACES.glob(f"{netns.of_emulation(name)}-*")]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if f"dlion-emulation-{name}-" in line:
                found.append(line)
    return found + [str(path) for path in folder.glob(f"dlion-emulation-{name}-*")]


def test_down_leaves_nothing_of_a_cluster_whose_up_was_killed(cluster: Cluster) -> None:
    other = Cluster(cluster.folder, f"{cluster.name}k")
    line = [sys.executable, str(UP), "up", "--name", other.name, "--env", str(other.folder / "four.toml")]
    process = subprocess.Popen(line, env=other.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + LIMIT_S
    while not any("slurmctld" in trace for trace in traces(other.folder, other.name)):
        assert process.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert traces(other.folder, other.name)
    done = other.down()
    assert (done.returncode, done.stdout) == (0, f"taken down: {other.name}\n")
    assert traces(other.folder, other.name) == []
    assert other.down().stdout.startswith("nothing to take down")
    # Its neighbour does not notice.
    assert cluster.node_states() == ["idle"] * 4


def test_an_interrupted_up_takes_down_what_it_had(cluster: Cluster) -> None:
    other = Cluster(cluster.folder, f"{cluster.name}i")
    line = [sys.executable, str(UP), "up", "--name", other.name, "--env", str(other.folder / "four.toml")]
    process = subprocess.Popen(line, env=other.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not traces(other.folder, other.name):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT_S) == 128 + signal.SIGINT
    assert traces(other.folder, other.name) == []


@pytest.mark.parametrize("action", ["up", "down", "login"])
def test_without_root_it_says_so_in_one_line(action: str) -> None:
    program = (
        "import os, runpy, sys\nos.geteuid = lambda: 1000\n"
        f"sys.argv = ['cluster', {action!r}]\nrunpy.run_path({str(UP)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "root" in done.stderr


def test_a_second_cluster_of_that_name_is_refused(cluster: Cluster) -> None:
    done = cluster.up()
    assert done.returncode == 2
    assert "exists already" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert cluster.node_states() == ["idle"] * 4
