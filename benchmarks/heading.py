"""The heading of every benchmark result: date, machine and versions."""

from __future__ import annotations

import os
import platform
from datetime import date
from typing import Any

from dlion_mpi.provenance import commit, versions


def heading(benchmark: str) -> dict[str, Any]:
    """Return the heading. Call it before measuring, because it contains the machine's load."""
    return {
        "benchmark": benchmark,
        "date": date.today().isoformat(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": versions(),
        "commit": commit(),
    }
