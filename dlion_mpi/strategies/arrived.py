"""Entries that have arrived before their time, for strategies that apply them some steps later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from dlion_mpi.vector.layout import Entries, Vector
from dlion_mpi.vector.named_arrays import Array, Arrays, vectors_by_rank


@dataclass(slots=True)
class Arrived:
    """By sender a vector of ``size`` entries, float32, made when it is first needed."""

    size: int
    vectors: dict[int, Vector] = field(default_factory=dict)

    def add(self, sender: int, entries: Entries) -> None:
        """Keep entries of a sender."""
        entries.add_to(self.vectors.setdefault(sender, np.zeros(self.size, np.float32)), 1.0)

    def take(self, part: slice) -> Vector:
        """Take out a part of all vectors, and return the sum of it, float32.

        In the order of senders, so that the sum does not depend on which message arrived first.
        """
        total = np.zeros(part.stop - part.start, np.float32)
        for _, vector in sorted(self.vectors.items()):
            total += vector[part]
            vector[part] = 0
        return total

    def to_arrays(self) -> Arrays:
        """The vectors by sender, for a checkpoint."""
        return {str(sender): vector for sender, vector in self.vectors.items()}

    def from_arrays(self, arrays: Mapping[str, Array], name: str, ranks: Iterable[int]) -> None:
        """Restore what `to_arrays` gave, stored under ``name``. Raises StateError."""
        self.vectors = vectors_by_rank(arrays, name, ranks, self.size)
