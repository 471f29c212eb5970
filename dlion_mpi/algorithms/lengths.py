"""The length of the mean of all workers' movements, relative to that of one movement. Pure numpy.

An optimizer that normalises its gradient, such as Adam, moves the weights by about the same length whatever the noise
of its batch. The mean of n such movements is shorter: by nothing if they agree, by sqrt(n) if all is noise. The same
optimizer would have moved by its usual length for the mean gradient. So what was averaged has to be lengthened again.
Which it is depends on model, data and progress, and is measured on a sample of entries. Source: ours.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dlion_mpi.vector.layout import Vector
from dlion_mpi.vector.named_arrays import Array, Arrays, number, numbers

ENTRIES = 256
"""Entries in a sample; each round draws others."""
SMOOTHING = 0.3
"""Weight of the newest round."""


def sampled(movement: Vector, step: int) -> Vector:
    """A sample of a movement, (ENTRIES + 1,) float32: entries at places that depend on the step, their energy last."""
    places = np.random.default_rng(step).integers(0, len(movement), ENTRIES)
    entries = movement[places]
    return np.append(entries, entries @ entries)


class Lengths:
    """The energy of one worker's movements and that of their mean, as of late."""

    def __init__(self) -> None:
        self._of_one = self._of_mean = 0.0

    @property
    def shortened(self) -> float:
        """The length of the mean as a share of one worker's length, in (0, 1]. 1 before anything was measured."""
        return min(1.0, (self._of_mean / self._of_one) ** 0.5) if self._of_mean > 0 else 1.0

    def take(self, mean: Vector) -> None:
        """Take the mean of the samples of all workers."""
        entries, energy = mean[:-1], float(mean[-1])
        if not np.isfinite(mean).all() or energy <= 0:
            return
        weight = SMOOTHING if self._of_one else 1.0
        self._of_one += weight * (energy - self._of_one)
        self._of_mean += weight * (float(entries @ entries) - self._of_mean)

    def to_arrays(self) -> Arrays:
        """The measurements by name."""
        return numbers(length_of_one=self._of_one, length_of_mean=self._of_mean)

    def from_arrays(self, arrays: Mapping[str, Array]) -> None:
        """Restore what `to_arrays` gave. Raises StateError."""
        self._of_one, self._of_mean = number(arrays, "length_of_one"), number(arrays, "length_of_mean")
