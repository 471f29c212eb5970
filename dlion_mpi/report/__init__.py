"""`dlion report`: one page that shows one run, or compares many, and opens without a network."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from dlion_mpi.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dlion report`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder that --out of a run has made")
    parser.add_argument(
        "-o",
        "--output",
        default="report.html",
        metavar="FILE.html",
        help="the page; an older one of that name is replaced (default: report.html)",
    )
    parser.add_argument(
        "--target-accuracy",
        metavar="ACCURACY",
        help="the time to this test accuracy, in 0..1, is compared first (default: that of the runs, else the best "
        "that a run in the middle reached); the page offers the others too",
    )


def main(args: argparse.Namespace) -> int:
    """Write the page; its path goes to stdout, what cannot be shown to stderr. Returns the exit code."""
    target = target_of(args.target_accuracy)
    output = Path(args.output)
    if output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"-o {output}: must end in .html")
    from dlion_mpi.log import say
    from dlion_mpi.metrics.reader import labels, load_all
    from dlion_mpi.report.page import render

    runs = load_all(args.runs)
    for label, run in zip(labels(runs), runs, strict=True):
        for note in run.notes:
            say(f"dlion report: {label}: {note}")
    _write(output, render(runs, target=target))
    print(output)
    return 0


def report(runs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] = "report.html") -> Path:
    """Write the page of some runs, given by their folders, for example from a notebook. Raises UserError."""
    from dlion_mpi.metrics.reader import load_all
    from dlion_mpi.report.page import render

    path = Path(output)
    _write(path, render(load_all(runs), target=None))
    return path


def target_of(text: str | None) -> float | None:
    """The value of ``--target-accuracy``, in 0..1. Raises UserError."""
    if text is None:
        return None
    from dlion_mpi.config.options import Config, convert

    return Config(target_accuracy=convert("target_accuracy", text)).target_accuracy


def _write(path: Path, text: str) -> None:
    """Write the whole page or none of it."""
    with replaced(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of ``path`` when all of it is written, or never. Raises UserError."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(handle, "wb") as file:
                yield file
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise UserError(f"-o {path}: cannot be written ({error.strerror})") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
