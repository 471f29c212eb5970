"""A gradient or a movement as one flat vector, with the loss that it belongs to."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dlion_mpi.vector.layout import Vector


@dataclass(frozen=True, slots=True)
class Gradient:
    """The mean loss of a batch and its gradient or movement, (P,) float32, read-only."""

    loss: float
    vector: Vector

    @property
    def finite(self) -> bool:
        """Whether the loss and every entry are finite numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.vector.max()) and math.isfinite(self.vector.min())
