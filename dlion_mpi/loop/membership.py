"""Membership of a run as a value: a worker that leaves changes it, and no other code needs a special case."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Membership:
    """The live ranks, ascending, and an epoch that grows with every change."""

    ranks: tuple[int, ...]
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.ranks)

    def __contains__(self, rank: int) -> bool:
        return rank in self.ranks

    def peers(self, rank: int) -> tuple[int, ...]:
        """Return all live ranks except ``rank``."""
        return tuple(r for r in self.ranks if r != rank)

    def without(self, rank: int) -> Membership:
        """Return the membership after ``rank`` has left."""
        return Membership(self.peers(rank), self.epoch + 1)
