"""The share of the cores that a rank has."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from dlion_mpi.mpi.ranks import Ranks

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Linux: the same for all processes of one machine, also in containers and namespaces with other host names."""


def share_of_cores(ranks: Ranks) -> int:
    """Return the cores of this rank. A core that several ranks of the machine may run on is divided among them."""
    try:
        machine = f"{BOOT_ID.read_text(encoding='ascii').strip()}:"
    except OSError:
        machine = f"{platform.node()}:"
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    texts = ranks.gather_text(machine + ",".join(map(str, cores)))
    neighbours = [set(t.removeprefix(machine).split(",")) for t in texts if t.startswith(machine)]
    share = sum(1 / sum(str(core) in other for other in neighbours) for core in cores)
    return max(1, int(share + 1e-9))
