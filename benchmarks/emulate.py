"""Measure the accuracy of emulated micro-clouds: link rates of two environments, paces, and rate changes.

    python benchmarks/emulate.py > benchmarks/results/emulate.json

Needs root and takes 1 minute. Prints one JSON object: the range of measured over set values, and the longest rate
change, by environment. Targets: links 0.93 to 1.02, paces within 5 %, changes within 1 s.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from typing import Any

ENVIRONMENTS = ("hetero-net-a", "hetero-net-b", "dynamic-a")


def check(environment: str) -> dict[str, Any]:
    """Return the report of `dlion emulate check` on an environment."""
    command = [sys.executable, "-m", "dlion_mpi.commands.emulate", "check", "--env", environment, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600, check=False)
    if not done.stdout:
        sys.exit(f"`{' '.join(command)}` failed with exit code {done.returncode}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """Summarise a report: smallest and largest ratio of links and paces, and the longest rate change."""

    def of(what: str, key: str) -> list[float]:
        return [row[key] for row in report["rows"] if row["what"] == what]

    def spread(values: list[float]) -> list[float]:
        return [round(min(values), 4), round(max(values), 4)]

    links = of("link", "ratio")
    return {
        "ok": report["ok"],
        "links": len(links),
        "link_ratio": spread(links),
        "link_ratio_mean": round(sum(links) / len(links), 4),
        "pace_ratio": spread(of("pace", "ratio")),
        "changes": len(of("change", "measured")),
        "change_s": round(max(of("change", "measured")), 2) if of("change", "measured") else None,
    }


def main() -> None:
    """Measure and print."""
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": {"cores": os.cpu_count(), "kernel": platform.release(), "load_before": os.getloadavg()[0]},
        "environments": {name: summary(check(name)) for name in ENVIRONMENTS},
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
