"""The names of test metrics: in files, and which metric a short text shows. Keras and its users choose them freely."""

from __future__ import annotations

import re
from collections.abc import Sequence

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


def is_share(metric: str) -> bool:
    """Whether a metric is a share of the rows, 0 to 1, which people read in per cent."""
    return metric.endswith(("accuracy", "_acc")) or metric == "acc"


def main_metric(metrics: Sequence[str]) -> str | None:
    """The metric that a short text shows: the first accuracy, else the test loss; None if there are none."""
    accuracies = [name for name in metrics if is_share(name)]
    first = [name for name in ("accuracy", *accuracies, TEST_LOSS) if name in metrics]
    return next(iter([*first, *metrics]), None)
