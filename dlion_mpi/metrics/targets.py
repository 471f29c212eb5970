"""The time at which the workers together reached a target."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dlion_mpi.config.target import Target
from dlion_mpi.metrics.records import Evaluation


def reached_s(evaluations: Sequence[Sequence[Evaluation]], target: Target | None) -> float | None:
    """The first time at which the mean over the workers of their latest test reaches ``target``; None if never.

    ``evaluations``: per worker, in time order.
    """
    if target is None:
        return None
    events = sorted(
        (e.time_s, worker, e.metrics.get(target.metric, math.nan))
        for worker, own in enumerate(evaluations)
        for e in own
    )
    latest = np.full(len(evaluations), np.nan)
    for time_s, worker, value in events:
        latest[worker] = value
        if target.reached(float(latest.mean())):  # NaN until each worker has been evaluated once
            return time_s
    return None
