"""The lead of a worker: its weights minus those that all workers have in common. Pure numpy.

A worker's residual r has the movements that it has not sent, each weighted by its batch. Its weights are

    common weights + factor * r

With a factor of 1 its own movement counts at once with the weight that it will have everywhere. That is a small part of
a step, and the next steps ask for the rest again, the more so with momentum or Adam. A larger factor makes its own
movement count whole until it is sent, as in local steps. What is sent counts with its weight, at the sender too.
Source: local steps as in local SGD (Stich 2019, arXiv 1805.09767); by entry, and until it is sent, ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain

import numpy as np

from dlion_mpi.vector.layout import Entries, Vector
from dlion_mpi.vector.named_arrays import Array, Arrays, number, numbers, part, vector


class Lead:
    """The factor of one worker, for vectors of ``size`` entries, and the changes of its weights that are due.

    What a step sends may be selected while the step is applied, so its change is due with the next step; or
    ``at_once``, with that step.
    """

    def __init__(self, size: int, *, at_once: bool = False) -> None:
        self.factor = 1.0
        self._size, self._delay = size, 0 if at_once else 1
        self._due: dict[int, list[Entries]] = {}

    def follow(self, step: int, factor: float, residual: Vector) -> None:
        """Take the factor of ``step``. ``residual``: (P,) float32, before the movement of this step is added."""
        if factor != self.factor:
            change = residual * np.float32(factor - self.factor)
            self._due.setdefault(step, []).append(Entries(self._size, change))
            self.factor = factor

    def sent(self, step: int, entries: Entries) -> None:
        """Note the entries that have left the residual."""
        if self.factor != 1:
            back = Entries(self._size, entries.values * np.float32(1 - self.factor), entries.indices)
            self._due.setdefault(step, []).append(back)

    def settle(self, step: int, movement: Vector) -> None:
        """Add the changes that are due to a movement, (P,) float32."""
        for then in [then for then in list(self._due) if then <= step - self._delay]:
            for change in self._due.pop(then):
                change.add_to(movement, 1.0)

    def over(self, residual: Vector) -> Vector:
        """Return the lead, (P,) float32."""
        ahead = residual * np.float32(self.factor)
        for change in chain(*self._due.values()):
            change.add_to(ahead, -1.0)
        return ahead

    def to_arrays(self) -> Arrays:
        """The state by name, for a checkpoint."""
        due = np.zeros(self._size, np.float32)
        for change in chain(*self._due.values()):
            change.add_to(due, 1.0)
        return {"due": due, **numbers(factor=self.factor)} if self.factor != 1 or self._due else {}

    def from_arrays(self, arrays: Mapping[str, Array], name: str, ranks: Iterable[int]) -> None:
        """Restore what `to_arrays` gave, stored under ``name``. Raises StateError."""
        arrays = part(arrays, name)
        if arrays:
            self.factor = number(arrays, "factor")
            self._due = {-1: [Entries(self._size, vector(arrays, "due", self._size))]}
