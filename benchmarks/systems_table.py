"""Tables from the results of `systems.py`: medians over the seeds, and ratios. Prints JSON or Markdown.

    python benchmarks/systems_table.py FILE [FILE ...] [--markdown | --settings] [--emulated]

A ratio compares medians of seconds, so above 1 the divisor is faster. A run that did not reach its target counts as
infinite. If one side of a ratio did not reach the target, its time limit gives a bound of the ratio.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

OURS, IDEAL, RINGS = "dlion", "free-network", ("horovod", "allreduce")
RIVALS = ("baseline", "ako", "gaia", "hop")
NOTHING = "-"


@dataclass(frozen=True, slots=True)
class Time:
    """Median seconds to a target, infinite if not reached in at least ``given_s`` seconds."""

    seconds: float
    given_s: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """A quotient; with ``bound`` ">" or "<" only its bound; None if neither side reached the target."""

    value: float | None
    bound: str = ""

    @classmethod
    def of(cls, over: Time | None, under: Time | None) -> Ratio:
        """Return ``over / under``; either may be missing."""
        if over is None or under is None or (math.isinf(over.seconds) and math.isinf(under.seconds)):
            return cls(None)
        if math.isinf(over.seconds):
            return cls(over.given_s / under.seconds, ">")
        if math.isinf(under.seconds):
            return cls(over.seconds / under.given_s, "<")
        return cls(over.seconds / under.seconds)

    def __str__(self) -> str:
        return NOTHING if self.value is None else f"{self.bound} {self.value:.2f}".strip()


def read(path: Path) -> list[dict[str, Any]]:
    """Read the runs of a results file. Skips incomplete lines, for example after a full disk."""
    runs = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            run = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(run, dict) and "lasted_s" in run:  # a complete line
            runs.append(run)
    return runs


def rows(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return medians over the seeds by environment and system; seconds are None if the median run missed the target."""
    table = []
    for env, system in dict.fromkeys((run["environment"], run["system"]) for run in runs):
        own = [run for run in runs if (run["environment"], run["system"]) == (env, system)]
        row = {
            "environment": env,
            "system": system,
            "seeds": sorted(run["seed"] for run in own),
            "seconds_to": {target: _finite(_time(own, target)) for target in own[0]["seconds_to"]},
            "seconds_given": _finite(_given_s(own)),
        }
        for name in ("accuracy_at", "spread_at", "mean_accuracy_to", "gigabytes_at", "gigabytes_to_end"):
            known = [run[name] for run in own if run.get(name) is not None]  # older runs have no mean accuracy
            row[name] = statistics.median(known) if known else None
        table.append(row)
    return table


def _time(runs: Sequence[Mapping[str, Any]], target: str) -> float:
    """Return the median seconds to a target, infinite if not reached."""
    return statistics.median(math.inf if (s := run["seconds_to"][target]) is None else s for run in runs)


def _given_s(runs: Sequence[Mapping[str, Any]]) -> float:
    """Return the shortest time that a run had without reaching the last target. An unstable run had all of its time."""
    missed = [run for run in runs if None in run["seconds_to"].values()]
    return min(
        (run["most_seconds"] if run["lasted_s"] is None else run["lasted_s"] for run in missed), default=math.inf
    )


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def ratios(table: Sequence[Mapping[str, Any]], target: str) -> dict[str, dict[str, Ratio]]:
    """Compare the best rival, the ring and the free network with DLion, by environment."""
    found = {}
    for env in dict.fromkeys(row["environment"] for row in table):
        times = {
            row["system"]: Time(_or_infinite(row["seconds_to"][target]), _or_infinite(row["seconds_given"]))
            for row in table
            if row["environment"] == env
        }
        rivals = [time for system, time in times.items() if system.split()[0] in RIVALS]
        # If no rival reached the target, any of them may be the best, and the shortest time limit is the bound.
        best = min(rivals, key=lambda time: (time.seconds, time.given_s), default=None)
        ours = times.get(OURS)
        ring = next((times[name] for name in RINGS if name in times), None)
        found[env] = {
            "best rival over dlion": Ratio.of(best, ours),
            "all-reduce over dlion": Ratio.of(ring, ours),
            "dlion over free-network": Ratio.of(ours, times.get(IDEAL)),
        }
    return found


def _grid(
    table: Sequence[Mapping[str, Any]],
    cell: Callable[[Mapping[str, Any]], str],
    more: Mapping[str, Mapping[str, Ratio]],
) -> list[str]:
    """Return the lines of a Markdown table: environments down, systems across, then the ratios of ``more``."""
    systems = list(dict.fromkeys(row["system"] for row in table))
    names = list(next(iter(more.values()))) if more else []
    lines = [_line(["", *systems, *names]), _line(["---"] * (1 + len(systems) + len(names)))]
    cells = {(row["environment"], row["system"]): cell(row) for row in table}
    for env in dict.fromkeys(row["environment"] for row in table):
        own = [cells.get((env, system), "") for system in systems]
        lines.append(_line([env, *own, *(str(more[env][name]) for name in names)]))
    return lines


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _seconds(row: Mapping[str, Any], target: str) -> str:
    seconds = row["seconds_to"][target]
    return NOTHING if seconds is None else f"{seconds:.0f}"


def _accuracy(row: Mapping[str, Any]) -> str:
    known = row["accuracy_at"] is not None
    return f"{100 * row['accuracy_at']:.1f}, {100 * row['spread_at']:.1f}" if known else NOTHING


def _mean_accuracy(row: Mapping[str, Any]) -> str:
    known = row["mean_accuracy_to"] is not None
    return f"{100 * row['mean_accuracy_to']:.1f}" if known else NOTHING


def _gigabytes(row: Mapping[str, Any]) -> str:
    known = row["gigabytes_at"] is not None
    return f"{row['gigabytes_at']:.2f}, {row['gigabytes_to_end']:.2f}" if known else NOTHING


def _span(values: Iterable[float]) -> str:
    """Format the range of values, or the value if all are equal."""
    ordered = sorted(values)
    return " to ".join(f"{value:g}" for value in dict.fromkeys((ordered[0], ordered[-1])))


def markdown(runs: Sequence[Mapping[str, Any]]) -> str:
    """Format all tables."""
    if not runs:
        return "No runs yet."
    table = rows(runs)
    seeds = _span(len(row["seeds"]) for row in table)
    at, clock = f"{runs[0]['at_seconds']:g}", "virtual seconds" if runs[0]["testbed"] == "simulated" else "seconds"
    given = _span(run["most_seconds"] for run in runs)
    most = f"{given} {clock} or {runs[0]['most_steps']} steps"
    text = [f"Medians over {seeds} seed{'s' * (seeds != '1')}; `{NOTHING}`: not reached in {most}."]
    for target in reversed(runs[0]["seconds_to"]):
        text += ["", f"{clock.capitalize()} to {target.replace('%', ' %')}:", ""]
        text += _grid(table, lambda row, target=target: _seconds(row, target), ratios(table, target))  # type: ignore[misc]
    text += ["", f"Test accuracy at {at} s in %, and its standard deviation between the workers in points:", ""]
    text += _grid(table, _accuracy, {})
    text += ["", f"Mean test accuracy over the first {at} s in %:", ""]
    text += _grid(table, _mean_accuracy, {})
    text += ["", f"GB sent by all workers, by {at} s and until the last target (or the end):", ""]
    text += _grid(table, _gigabytes, {})
    return "\n".join(text)


def settings(runs: Sequence[Mapping[str, Any]], environments: Sequence[str]) -> str:
    """Format one Markdown table for many settings of few systems: settings down, environments across.

    [n] marks a cell with fewer seeds than most. Failed runs, for example with a non-finite loss, are only counted. The
    last of several runs with the same seed counts.
    """
    runs = list({(run["environment"], run["system"], run["seed"]): run for run in runs}.values())
    table = rows(runs)
    most = max((len(row["seeds"]) for row in table), default=0)

    def cell(row: Mapping[str, Any]) -> str:
        own = [run for run in runs if (run["environment"], run["system"]) == (row["environment"], row["system"])]
        failed = sum(run["failed"] is not None for run in own)
        if failed == len(own):
            text = "all failed"
        else:
            last = f"{100 * row['accuracy_at']:.1f} ({100 * row['spread_at']:.1f})"
            text = f"{_mean_accuracy(row)}; {_seconds(row, list(row['seconds_to'])[-1])}; {last}"
            text += f", {failed} failed" * (failed > 0)
        return text + f" [{len(own)}]" * (len(own) < most)

    cells = {(row["environment"], row["system"]): cell(row) for row in table}
    lines = [_line(["", *environments]), _line(["---"] * (1 + len(environments)))]
    for system in dict.fromkeys(row["system"] for row in table):
        lines.append(_line([f"`{system}`", *(cells.get((env, system), "") for env in environments)]))
    return "\n".join(lines)


def as_json(runs: Sequence[Mapping[str, Any]]) -> str:
    """Format the table, the ratios and the runs as JSON."""
    table = rows(runs)
    targets = list(runs[0]["seconds_to"]) if runs else []
    found = {target: ratios(table, target) for target in targets}
    about = {
        "benchmark": "systems",
        "date": date.today().isoformat(),
        "commits": sorted({run["commit"] for run in runs}),
        "ratios": {
            target: {env: {name: asdict(ratio) for name, ratio in own.items()} for env, own in by_env.items()}
            for target, by_env in found.items()
        },
        "table": table,
        "runs": list(runs),
    }
    return json.dumps(about)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables from the results of systems.py.")
    parser.add_argument("results", type=Path, metavar="FILE", nargs="+")
    parser.add_argument("--emulated", action="store_true", help="use emulated runs instead of simulated ones")
    parser.add_argument("--env", nargs="+", help="only these environments")
    parser.add_argument("--system", nargs="+", help="only these systems, each with its options, quoted")
    parser.add_argument("--at", type=float, metavar="SECONDS", help="only runs with this --at")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print Markdown tables instead of JSON")
    form.add_argument(
        "--settings",
        action="store_true",
        help="print one table, systems down: mean accuracy until --at, seconds to the last target, accuracy (spread)",
    )
    args = parser.parse_args()
    runs = [
        run
        for path in args.results
        for run in read(path)
        if run["testbed"] == ("emulated" if args.emulated else "simulated")
        and (not args.env or run["environment"] in args.env)
        and (not args.system or run["system"] in args.system)
        and (args.at is None or run["at_seconds"] == args.at)
    ]
    if args.settings:
        print(settings(runs, args.env or list(dict.fromkeys(run["environment"] for run in runs))))
    else:
        print(markdown(runs) if args.markdown else as_json(runs))


if __name__ == "__main__":
    main()
