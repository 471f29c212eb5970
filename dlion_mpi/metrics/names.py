"""The names of test metrics, which Keras and its users choose: in files, in options, in short texts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dlion_mpi.config.target import Target, is_share
from dlion_mpi.errors import UserError
from dlion_mpi.metrics.records import Evaluation, measures_of

TEST_LOSS = "val_loss"
"""The name of the loss on the test set."""
_UNFIT = re.compile(r"[%/\x00-\x1f]|^\.+$")
"""What the name of an HDF5 data set cannot contain, and the sign that stands for it."""


def column_of(metric: str) -> str:
    """The name of a metric's data set in a metrics file; the inverse of `metric_of`."""
    return _UNFIT.sub(lambda found: "".join(f"%{ord(sign):02X}" for sign in found[0]), metric)


def metric_of(column: str) -> str:
    """The metric whose data set has this name."""
    return re.sub(r"%([0-9A-F]{2})", lambda found: chr(int(found[1], 16)), column)


def main_metric(metrics: Sequence[str]) -> str | None:
    """The metric that a short text shows: the first accuracy, else the test loss; None if there are none."""
    accuracies = [name for name in metrics if is_share(name)]
    first = [name for name in ("accuracy", *accuracies, TEST_LOSS) if name in metrics]
    return next(iter([*first, *metrics]), None)


def form_of(metric: str) -> str:
    """The format specification of a metric's values: per cent for an accuracy, else four digits."""
    return ".2%" if is_share(metric) else ".4g"


def best_metric(best: str | None, metrics: Sequence[str]) -> str | None:
    """The metric that tells the best worker: ``best`` if given, else the test loss; None if there are none."""
    return best or (TEST_LOSS if TEST_LOSS in metrics else main_metric(metrics))


def check_names(metrics: Sequence[str], target: Target | None, best: str | None) -> None:
    """Check the names of a run's test metrics before the first step, and those that ``--target`` and ``--best`` give.

    Raises UserError.
    """
    for option, given in (("--target", target and target.metric), ("--best", best)):
        if given is None or given in metrics:
            continue
        what = f"{option} {target if option == '--target' else best}"
        if not metrics:
            raise UserError(
                f"{what}: nothing is tested without validation data (Exchange: without metrics): give some, or drop it"
            )
        raise UserError(f"{what}: the model has no metric {given}; it has {', '.join(metrics)}")
    taken = [name for name in metrics if name in measures_of(Evaluation)]
    if taken:
        raise UserError(f"the model has a metric named {taken[0]}, as a column of the metrics files: rename it")


def check_same(names: Sequence[str]) -> None:
    """Check that all ranks test the same metrics. ``names``: by rank, one in each line. Raises UserError."""
    for rank, own in enumerate(names):
        if own != names[0]:
            tests = [", ".join(text.splitlines()) or "nothing" for text in (names[0], own)]
            raise UserError(
                f"rank 0 tests {tests[0]}, rank {rank} {tests[1]}: compile all models with the same metrics, and give "
                "validation data to all ranks or to none"
            )
