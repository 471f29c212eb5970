"""`dlion trace`: a timeline of a run, for Perfetto (ui.perfetto.dev) and chrome://tracing."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from dlion_mpi.errors import UserError

if TYPE_CHECKING:
    from dlion_mpi.metrics.reader import Run

ENDINGS = (".json", ".gz")
COMPRESSION = 3
"""Level of gzip. It leaves a fourteenth of the size; higher levels take much longer for little."""
LARGE_BYTES = 1 << 30
"""Browsers cannot open larger traces."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dlion trace`."""
    parser.description = (
        "Write a timeline of a run in Chrome's trace format, for ui.perfetto.dev or chrome://tracing: what every "
        "rank did, and every message. A run may be active, or have been killed."
    )
    parser.set_defaults(action=main)
    parser.add_argument("run", metavar="RUN", help="--out folder of a run")
    parser.add_argument(
        "-o",
        "--output",
        default="trace.json",
        metavar="FILE.json[.gz]",
        help="the trace; an existing file is replaced; - is stdout (default: trace.json)",
    )
    parser.add_argument("--from", dest="begin", metavar="SECONDS", help="first second of training to show")
    parser.add_argument("--to", dest="end", metavar="SECONDS", help="last second of training to show")


def main(args: argparse.Namespace) -> int:
    """Write the trace. Print its path on stdout and what is missing on stderr. Return the exit code."""
    if args.output != "-" and not args.output.lower().endswith(ENDINGS):
        raise UserError(f"-o {args.output}: must end in {' or '.join(ENDINGS)}, or be - for stdout")
    begin_s, end_s = _seconds("--from", args.begin, 0.0), _seconds("--to", args.end, math.inf)
    from dlion_mpi.log import say
    from dlion_mpi.metrics.reader import load
    from dlion_mpi.trace.events import Window
    from dlion_mpi.trace.run import write

    run = load(args.run)
    window = Window.of_seconds(begin_s, end_s)
    _check(run, begin_s, end_s)
    try:
        with _opened(args.output) as file:
            summary = write(run, window, file)
    except BrokenPipeError:  # the reader of stdout has closed it; Python must not flush it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    for note in (*run.notes, *summary.notes):
        say(f"dlion trace: {note}")
    say(f"dlion trace: {summary.text()}")
    if summary.size_bytes > LARGE_BYTES:
        say("dlion trace: too large for a browser: choose a window with --from and --to")
    if args.output != "-":
        print(args.output)
    return 0


def _seconds(option: str, text: str | None, default: float) -> float:
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UserError(f"{option} {text}: must be 0 or more seconds")
    return value


def _check(run: Run, begin_s: float, end_s: float) -> None:
    """Refuse an empty window. Raises UserError."""
    if begin_s >= end_s:
        raise UserError(f"--from {begin_s:g} --to {end_s:g}: the first must be less than the second")
    if begin_s > run.seconds:
        raise UserError(f"--from {begin_s:g}: the run ends after {run.seconds:.3f} s")


@contextlib.contextmanager
def _opened(output: str) -> Iterator[IO[bytes]]:
    """Open the output, compressed if its name says so. A file is written completely or not at all. Raises UserError."""
    if output == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    from dlion_mpi.report.output import replaced

    with replaced(Path(output)) as file:
        if output.lower().endswith(".gz"):
            with gzip.GzipFile(filename="", mode="wb", compresslevel=COMPRESSION, fileobj=file, mtime=0) as packed:
                yield packed  # type: ignore[misc]
        else:
            yield file
