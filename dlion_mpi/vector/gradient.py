"""A gradient or a movement as one flat vector, with the loss that it belongs to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from dlion_mpi.vector.layout import Vector


@dataclass(frozen=True, slots=True)
class Gradient:
    """The mean loss of a batch and its gradient, or the movement of a training step, (P,) float32, read-only.

    ``logs``: all that Keras's ``train_step`` returned.
    """

    loss: float
    vector: Vector
    logs: Mapping[str, float] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether the loss and every entry are finite numbers."""
        if not len(self.vector):
            return math.isfinite(self.loss)
        return math.isfinite(self.loss) and math.isfinite(self.vector.max()) and math.isfinite(self.vector.min())

    def applied(self) -> Gradient:
        """Only the loss, after the vector was applied; NaN if it was not finite."""
        return Gradient(self.loss if self.finite else math.nan, self.vector[:0], self.logs)
