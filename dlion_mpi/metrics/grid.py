"""Equal spans of time over which long runs are averaged, the same for all workers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dlion_mpi.metrics.files import Array
from dlion_mpi.metrics.reader import Run

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Grid:
    """``count`` spans of ``width_s`` seconds, from the beginning of training."""

    width_s: float
    count: int

    @property
    def middles_s(self) -> Floats:
        """The middle of each span, (count,)."""
        return self.width_s * (np.arange(self.count, dtype=np.float64) + 0.5)

    def indices(self, time_s: Array) -> npt.NDArray[np.int64]:
        """The span of each time, in the shape of ``time_s``."""
        return np.clip(time_s / self.width_s, 0, self.count - 1).astype(np.int64)

    def means(self, time_s: Array, values: Array) -> Floats:
        """Average the finite values in each span; NaN where there are none. Both (T,), result (count,)."""
        usable = np.isfinite(values)
        index = self.indices(time_s[usable])
        sums = np.bincount(index, weights=values[usable], minlength=self.count)
        counts = np.bincount(index, minlength=self.count)
        return np.divide(sums, counts, out=np.full(self.count, np.nan), where=counts > 0)

    def rates(self, time_s: Array, total: Array) -> Floats:
        """Growth per second of a running total in each span; NaN after its end. Both (T,), result (count,)."""
        if not len(time_s):
            return np.full(self.count, np.nan)
        edges = np.minimum(np.arange(self.count + 1) * self.width_s, time_s[-1])
        at_edges = np.interp(edges, np.concatenate([[0.0], time_s]), np.concatenate([[0.0], total]))
        seconds = np.diff(edges)
        return np.divide(np.diff(at_edges), seconds, out=np.full(self.count, np.nan), where=seconds > 0)


def grid(run: Run, points: int = 200) -> Grid:
    """Choose about ``points`` spans at most, of a round width, in most of which every worker ends a step."""
    slowest_s = [float(np.nanmedian(r.steps["step_s"])) for r in run.ranks if np.isfinite(r.steps["step_s"]).any()]
    least_s = max(run.seconds / points, 1.5 * max(slowest_s, default=0.0), 1e-3)
    power = 10.0 ** math.floor(math.log10(least_s))
    width_s = next(f * power for f in (1, 2, 5, 10) if f * power >= least_s * (1 - 1e-9))
    return Grid(width_s, max(1, math.ceil(run.seconds / width_s)))


def nanmean(values: Array) -> Floats:
    """Average the finite values over the last axis; NaN where there are none."""
    usable = np.isfinite(values)
    counts = usable.sum(axis=-1)
    sums = np.where(usable, values, 0.0).sum(axis=-1)
    return np.divide(sums, counts, out=np.full(counts.shape, np.nan), where=counts > 0)
