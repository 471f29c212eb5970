"""Environment files, and the clock that paces a training program.

An `Environment` is read from TOML: one of the built-in files in `named/`, or a user's file. The emulator shapes a real
network with it, the simulator a virtual one. `PaceClock` gives a training program the duration of an iteration on one
of its workers.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlion_mpi.errors import UserError
from dlion_mpi.microcloud.environment import Environment, InvalidEnvironment, Pace, Phase

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "Clock",
    "Environment",
    "InvalidEnvironment",
    "Pace",
    "PaceClock",
    "Phase",
    "load",
    "locate",
    "names",
]

BUILT_IN = Path(__file__).parent / "named"

# Variables that `dlion emulate` sets for its ranks.
ENVIRONMENT_VARIABLE = "DLION_ENVIRONMENT"
CLOCK_VARIABLE = "DLION_ENVIRONMENT_CLOCK"
SECONDS_VARIABLE = "DLION_ENVIRONMENT_SECONDS"


def names() -> tuple[str, ...]:
    """Names of the built-in environments."""
    return tuple(sorted(path.stem for path in BUILT_IN.glob("*.toml")))


def load(name_or_path: str | os.PathLike[str]) -> Environment:
    """Read a built-in environment by name, or a TOML file by path (ends in .toml, or has a directory).

    Raises UserError with the file, the key and the line of the mistake.
    """
    path = locate(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"environment file {path}: {reason}; give a TOML file or one of {', '.join(names())}") from None
    try:
        return _parse(tomllib.loads(text), default_name=path.stem)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {_with_key(str(error), text)}") from None
    except InvalidEnvironment as error:
        line = _line_of(text, error.key, error.phase)
        raise UserError(f"{path}, line {line}: {error}") from None


def locate(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the absolute path of an environment's TOML file. Raises UserError for an unknown name."""
    given = os.fspath(name_or_path)
    if given.endswith(".toml") or os.sep in given:
        return Path(given).absolute()
    if given not in names():
        raise UserError(f"unknown environment {given!r}: give a .toml file or one of {', '.join(names())}")
    return BUILT_IN / f"{given}.toml"


_KEYS = {"name", "workers", "alpha_s", "seconds_per_sample_24", "latency_s", "link_latency_s", "phases"}
_PHASE_KEYS = {"cores", "uplink_mbit", "link_mbit", "share", "start_s"}


def _parse(table: Mapping[str, Any], *, default_name: str) -> Environment:
    """Build the environment of a TOML table. Types are checked here, values by the dataclass."""
    _check_keys(table, _KEYS, None)
    workers = table.get("workers")
    if not isinstance(workers, int) or isinstance(workers, bool):
        raise InvalidEnvironment("workers", "give the number of workers, a whole number")
    name = table.get("name", default_name)
    if not isinstance(name, str):
        raise InvalidEnvironment("name", "give a string")
    phases = table.get("phases", [])
    if not isinstance(phases, list) or not all(isinstance(phase, dict) for phase in phases):
        raise InvalidEnvironment("phases", "write each phase as a [[phases]] table")
    numbers = {
        key: _number(table[key], key, None) for key in ("alpha_s", "seconds_per_sample_24", "latency_s") if key in table
    }
    return Environment(
        name=name,
        workers=workers,
        link_latency_s=_matrix(table, "link_latency_s", workers, None),
        phases=tuple(_parse_phase(phase, index, workers) for index, phase in enumerate(phases)),
        **numbers,
    )


def _parse_phase(table: Mapping[str, Any], index: int, workers: int) -> Phase:
    _check_keys(table, _PHASE_KEYS, index)

    def per_worker(key: str) -> tuple[float, ...]:
        value = table[key]
        if isinstance(value, list):
            return tuple(_number(item, key, index) for item in value)
        return (_number(value, key, index),) * workers

    if "cores" not in table:
        raise InvalidEnvironment("cores", "missing; give one number per worker, or one for all", index)
    return Phase(
        cores=per_worker("cores"),
        uplink_mbit=per_worker("uplink_mbit") if "uplink_mbit" in table else None,
        link_mbit=_matrix(table, "link_mbit", workers, index),
        share=_number(table["share"], "share", index) if "share" in table else None,
        start_s=_number(table["start_s"], "start_s", index) if "start_s" in table else None,
    )


def _matrix(
    table: Mapping[str, Any], key: str, workers: int, phase: int | None
) -> tuple[tuple[float, ...], ...] | None:
    """Return a number per link, a row per source; None if the table has no such key."""
    rows = table.get(key)
    if rows is None:
        return None
    if not (isinstance(rows, list) and all(isinstance(row, list) for row in rows)):
        raise InvalidEnvironment(key, f"give {workers} rows of {workers} numbers", phase)
    return tuple(tuple(_number(item, key, phase) for item in row) for row in rows)


def _check_keys(table: Mapping[str, Any], known: set[str], phase: int | None) -> None:
    for key in table:
        if key not in known:
            raise InvalidEnvironment(key, f"unknown key; the keys here are {', '.join(sorted(known))}", phase)


def _number(value: Any, key: str, phase: int | None) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidEnvironment(key, f"{value!r} is not a number", phase)
    return float(value)


def _line_of(text: str, key: str, phase: int | None) -> int:
    """Return the line, from 1, that sets `key` in the given phase; if the key is missing, the line of its table."""
    lines = text.splitlines()
    tables = [n for n, line in enumerate(lines) if re.match(r"\s*\[\[\s*phases\s*\]\]", line)]
    begin, end = 0, tables[0] if tables else len(lines)
    if phase is not None and phase < len(tables):
        begin, end = tables[phase], (*tables, len(lines))[phase + 1]
    pattern = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=.]")
    return next((n for n in range(begin, end) if pattern.match(lines[n])), begin) + 1


def _with_key(message: str, text: str) -> str:
    """Append the key of the offending line to a TOML parser's message, if that line sets one."""
    at = re.search(r"line (\d+)", message)
    lines = text.splitlines()
    if at is None or int(at[1]) > len(lines):
        return message
    key = re.match(r"\s*([\w\"'.-]+)\s*=", lines[int(at[1]) - 1])
    return f"{message}, key {key[1]}" if key else message


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Start of training (seconds since the epoch) and planned length of the run (None: unknown)."""

    started_s: float
    run_seconds: float | None


def start_clock(
    run_seconds: float | None, *, started_s: float | None = None, environ: Mapping[str, str] = os.environ
) -> float:
    """Report the start of training to the emulator, which times the phases from it.

    Called by rank 0 only; without an emulation it writes nothing. `started_s`: start in seconds since the epoch (None:
    now). Returns that time.
    """
    begin_s = time.time() if started_s is None else started_s
    path = environ.get(CLOCK_VARIABLE)
    if not path:
        return begin_s
    planned_s = math.nan if run_seconds is None else float(run_seconds)
    partial = f"{path}.{os.getpid()}"
    with open(partial, "w", encoding="ascii") as file:
        file.write(f"{begin_s!r} {planned_s!r}\n")
    os.replace(partial, path)  # the reader sees all of the line or none of it
    return begin_s


def read_clock(path: str | os.PathLike[str]) -> Clock | None:
    """Read the line of `start_clock`. Returns None if it is missing or invalid."""
    try:
        started_s, run_seconds = (float(word) for word in Path(path).read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return None
    return Clock(started_s=started_s, run_seconds=None if math.isnan(run_seconds) else run_seconds)


@dataclass(frozen=True, kw_only=True)
class PaceClock:
    """Duration of each iteration of one worker of an environment."""

    environment: Environment
    worker: int
    run_seconds: float | None = None

    @classmethod
    def from_environ(
        cls, worker: int, *, run_seconds: float | None = None, environ: Mapping[str, str] = os.environ
    ) -> PaceClock | None:
        """Return the clock of `worker` in the current emulation, or None outside one.

        `run_seconds`: planned length of the run; the value given to `dlion emulate` takes precedence. Raises UserError
        if the environment has no such worker.
        """
        reference = environ.get(ENVIRONMENT_VARIABLE)
        if not reference:
            return None
        environment = load(reference)
        if not 0 <= worker < environment.workers:
            workers = f"{environment.workers} workers"
            raise UserError(
                f"there is a rank {worker}, but environment {environment.name} has {workers}: "
                f"start as many ranks, or unset {ENVIRONMENT_VARIABLE}"
            )
        given = environ.get(SECONDS_VARIABLE)
        return cls(environment=environment, worker=worker, run_seconds=float(given) if given else run_seconds)

    def seconds(self, batch: int, elapsed_s: float) -> float:
        """Return the seconds of an iteration of `batch` samples that begins `elapsed_s` after the start of training."""
        return self.environment.pace(self.worker, elapsed_s, self.run_seconds).seconds(batch)
