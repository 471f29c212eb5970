"""`dlion report`: one HTML page about one run, or a comparison of several."""

from __future__ import annotations

import argparse
from pathlib import Path

from dlion_mpi.commands.arguments import add_refused
from dlion_mpi.config.target import Target
from dlion_mpi.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dlion report`."""
    parser.description = (
        "Write one self-contained HTML page about runs: results, time to target, what differs between them, and the "
        "workers and links of each run. A run may be active, or have been killed."
    )
    parser.set_defaults(action=main)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="--out folder of a run")
    parser.add_argument(
        "-o",
        "--output",
        default="report.html",
        metavar="FILE.html",
        help="the page; an existing file is replaced (default: report.html)",
    )
    parser.add_argument(
        "--target",
        metavar="METRIC>=VALUE",
        help="compare the time to this value of a test metric, 'accuracy>=0.8' or 'val_loss<=0.3' (default: the "
        "target of the runs, or one that most runs reached)",
    )
    add_refused(parser, "target_accuracy")


def main(args: argparse.Namespace) -> int:
    """Write the page. Print its path on stdout and what is missing on stderr. Return the exit code."""
    target = target_of(args.target)
    output = Path(args.output)
    if output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"-o {output}: must end in .html")
    from dlion_mpi.log import say
    from dlion_mpi.metrics.reader import labels, load_all
    from dlion_mpi.report.output import replaced
    from dlion_mpi.report.page import render

    runs = load_all(args.runs)
    for label, run in zip(labels(runs), runs, strict=True):
        for note in run.notes:
            say(f"dlion report: {label}: {note}")
    with replaced(output) as file:
        file.write(render(runs, target=target).encode())
    print(output)
    return 0


def target_of(text: str | None) -> Target | None:
    """Parse ``--target``. Raises UserError."""
    if text is None:
        return None
    try:
        return Target.parse(text)
    except UserError as error:
        raise UserError(f"--target: {error}") from None
