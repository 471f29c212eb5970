"""The two tables of the page: the results of each run, and its settings and versions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dlion_mpi.config.target import falls, is_share
from dlion_mpi.metrics.grid import nanmean
from dlion_mpi.metrics.reader import Run
from dlion_mpi.metrics.series import Links, curve, part_names, step_parts
from dlion_mpi.report.tests import scaled
from dlion_mpi.view.forms import text_of

NONE = "–"
EXPECTED_TO_DIFFER = ("run.out",)
"""Settings that are different in every run, so their difference is not marked."""


def summary(run: Run, found: Sequence[Links], metrics: Sequence[str]) -> dict[str, str]:
    """The results of a run: text by column, whose name contains the unit.

    ``found``: `links` of its ranks. ``metrics``: the test metrics that have columns, the main one first.
    """
    steps = [len(rank.steps["step"]) for rank in run.ranks]
    samples = sum(float(np.nansum(rank.steps["lbs"])) for rank in run.ranks)
    bytes_sent = sum(float(np.nansum(own.bytes_sent)) for own in found)
    parts = nanmean(np.array([step_parts(rank) for rank in run.ranks]).T)
    waiting = parts[part_names().index("waiting")] / parts.sum()
    losses = [float(np.mean(rank.steps["loss"][-10:])) for rank in run.ranks if len(rank.steps["loss"])]
    return {
        "strategy": run.strategy,
        "workers": str(run.workers),
        "where": where(run),
        "ended": "yes" if run.ended else "no",
        "time (s)": _number(run.seconds, 1),
        "steps": f"{min(steps)} to {max(steps)}" if min(steps) != max(steps) else str(steps[0]),
        **_tests(run, metrics),
        "loss": _number(float(np.mean(losses)) if losses else math.nan, 3),
        "samples/s": _number(samples / run.seconds if run.seconds else math.nan, 0),
        "waiting (%)": _number(100 * float(waiting), 1),
        "sent (MB)": _number(bytes_sent / 1e6, 1),
    }


def _tests(run: Run, metrics: Sequence[str]) -> dict[str, str]:
    """The last values of the test metrics; of the main one also those of the worst and the best worker."""
    texts = {}
    for n, metric in enumerate(metrics):
        found, unit = curve(run, metric), " (%)" * is_share(metric)
        form = ".2f" if is_share(metric) else ".4g"
        last = [scaled(metric, part[-1:]) for part in (found.mean, found.std, found.low, found.high)]
        mean, std, low, high = (text_of(float(part[0]), form) if len(part) else NONE for part in last)
        texts[f"{metric} ± std{unit}"] = f"{mean} ± {std}" if len(found.mean) else NONE
        if n == 0:
            worst, best = (high, low) if falls(metric) else (low, high)
            texts[f"worst to best{unit}"] = f"{worst} to {best}" if len(found.mean) else NONE
    return texts


def where(run: Run) -> str:
    """The micro-cloud of a simulated or emulated run, or the hosts."""
    for environment, how in ((run.environment, "simulated"), (run.emulated, "emulated")):
        if environment is not None:
            return f"{environment.get('name', 'micro-cloud')}, {how}"
    return run.attribute("host") or NONE


def settings(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """Name, value in each run, and whether the runs differ. Settings that differ come first."""
    tables = [_settings(run) for run in runs]
    rows = []
    for name in dict.fromkeys(name for table in tables for name in table):
        values = [table.get(name, NONE) for table in tables]
        rows.append((name, values, len(set(values)) > 1 and name not in EXPECTED_TO_DIFFER))
    return sorted(rows, key=lambda row: not row[2])


def _settings(run: Run) -> dict[str, str]:
    found = {name: str(value) for name, value in run.config.items()}
    found |= {f"version of {package}": version for package, version in run.versions.items()}
    names = {
        "commit": "commit",
        "python": "version of Python",
        "mpi": "MPI",
        "host": "host",
        "data_source": "data source",
    }
    found |= {title: run.attribute(name) or NONE for name, title in names.items()}
    found["training samples per worker"] = run.attribute("samples") or NONE
    return found | _environment(run.environment or run.emulated or {})


def _environment(environment: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a micro-cloud and of each of its phases."""
    found = {}
    phases = environment.get("phases")
    for name, value in environment.items():
        if name != "phases":
            found[f"micro-cloud: {name}"] = str(value)
    for n, phase in enumerate(phases if isinstance(phases, list) else []):
        if isinstance(phase, dict):
            for name, value in phase.items():
                if value is not None:
                    found[f"micro-cloud, phase {n + 1}: {name}"] = _listed(value)
    return found


def _listed(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "; ".join(_listed(row) for row in value)
    return (
        ", ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value)
        if isinstance(value, list)
        else str(value)
    )


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else NONE
