"""Measure the speed of `dlion simulate`: real seconds and memory of a virtual run. Prints one JSON object.

Each case runs in a new process from the root of the repository. `within` says whether the case stayed within its limits
of time and memory, which are set for 2 idle cores.

    python benchmarks/simulate.py
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from heading import heading


@dataclass(frozen=True, kw_only=True)
class Case:
    """Options of a simulated run, and its limits of time and memory."""

    options: str
    limit_s: float
    limit_mb: float = 4096.0


CASES = {
    "six workers, Cipher": Case(options="--env hetero-sys-a --seconds 600", limit_s=240.0),
    "100 workers, dense": Case(
        options="--env homo-b --workers 100 --data digits --model tests.nets:dense --steps 200", limit_s=180.0
    ),
}


def child(options: list[str]) -> None:
    """Simulate in this process and print its processor time and memory after the result."""
    from dlion_mpi.commands import simulate

    parser = argparse.ArgumentParser()
    simulate.add_arguments(parser)
    code = simulate.main(parser.parse_args(options))
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"cpu_s": round(used.ru_utime + used.ru_stime, 1), "max_mb": round(used.ru_maxrss / 1024, 1)}))
    sys.exit(code)


def measured(case: Case) -> dict[str, Any]:
    """Run a case. Raises CalledProcessError if it fails."""
    began_s = time.monotonic()
    command = [sys.executable, __file__, "--child", *shlex.split(case.options)]
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    wall_s = round(time.monotonic() - began_s, 1)
    result, cost = json.loads(lines[-2]), json.loads(lines[-1])
    return {
        "command": f"dlion simulate {case.options}",
        "workers": result["ranks"],
        "steps": result["steps"],
        "virtual_s": result["seconds"],
        "accuracy_mean": result["accuracy_mean"],
        "wall_s": wall_s,
        **cost,
        "limit_s": case.limit_s,
        "limit_mb": case.limit_mb,
        "within": wall_s <= case.limit_s and cost["max_mb"] <= case.limit_mb,
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        sys.path.insert(0, os.getcwd())
        child(sys.argv[2:])
    parser = argparse.ArgumentParser(description="Measure the speed of virtual runs; prints JSON.")
    parser.add_argument("--only", choices=sorted(CASES), help="run one case")
    only = parser.parse_args().only
    about = heading("simulate")
    results = {name: measured(case) for name, case in CASES.items() if only in (None, name)}
    print(json.dumps(about | {"results": results}))


if __name__ == "__main__":
    main()
