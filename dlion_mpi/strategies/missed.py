"""A residual per peer, for strategies that send the same entries to all peers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from dlion_mpi.vector.layout import Entries, Vector
from dlion_mpi.vector.named_arrays import Array, Arrays, vectors_by_rank


@dataclass(slots=True)
class Missed:
    """Entries due to peers whose links were not ready: by peer a vector of ``size`` entries, float32.

    A vector is made when it is first needed, so entries that all peers get at once are stored once, not per link.
    """

    size: int
    vectors: dict[int, Vector] = field(default_factory=dict)

    def due(self, peer: int, entries: Entries, ready: bool, *, everything: bool = False) -> Entries | None:
        """Return what ``peer`` gets when ``entries`` go to all: these, plus what it has missed of them.

        ``everything``: plus what it has missed of all others. None if its link is not ``ready``: then all is kept.
        """
        waiting = self.vectors.get(peer)
        if waiting is None:
            if ready or not len(entries):
                return entries if ready else None
            waiting = self.vectors[peer] = np.zeros(self.size, np.float32)
        entries.add_to(waiting, 1.0)
        if not ready:
            return None
        if everything:
            del self.vectors[peer]
            indices = np.flatnonzero(waiting).astype(np.uint32)
            return Entries(self.size, waiting[indices], indices)
        places = entries.places()
        values = waiting[places].copy()
        waiting[places] = 0
        return Entries(self.size, values, entries.indices)

    def to_arrays(self) -> Arrays:
        """The vectors by peer, for a checkpoint."""
        return {str(peer): waiting for peer, waiting in self.vectors.items()}

    def from_arrays(self, arrays: Mapping[str, Array], name: str, ranks: Iterable[int]) -> None:
        """Restore what `to_arrays` gave, stored under ``name``. Raises StateError."""
        self.vectors = vectors_by_rank(arrays, name, ranks, self.size)
