"""What every benchmark says first: when, on what, and with which versions it measured."""

from __future__ import annotations

import os
import platform
from datetime import date
from typing import Any

from dlion_mpi.provenance import commit, versions


def heading(benchmark: str) -> dict[str, Any]:
    """To be called before anything is measured: the machine's load is part of it."""
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
