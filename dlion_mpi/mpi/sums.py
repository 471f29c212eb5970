"""Sums over all ranks: by a ring over MPI, or by Horovod; see `Strategy.summed_by`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from dlion_mpi.errors import UserError
from dlion_mpi.loop.ports import Ticket
from dlion_mpi.loop.sums import SUM
from dlion_mpi.mpi import horovod
from dlion_mpi.mpi.collectives import Collectives
from dlion_mpi.mpi.ranks import Ranks
from dlion_mpi.vector.layout import Vector
from dlion_mpi.wire import ValueType

LIBRARIES = ("mpi", "horovod")


class Summer(Protocol):
    """Sums vectors over all ranks."""

    def reduce(self, vector: Vector | None, value_type: ValueType = "float32") -> Ticket:
        """Sum all ranks' vectors; see `mpi.collectives.Collectives.reduce`."""

    def close(self) -> None:
        """Free what the sums needed, on all ranks together."""


class Ring:
    """A ring over MPI, on its own channel."""

    def __init__(self, collectives: Collectives) -> None:
        self.reduce = partial(collectives.reduce, SUM)

    def close(self) -> None:
        """The collectives close the channel."""


def check(ranks: Ranks, summed_by: str) -> None:
    """Check on all ranks that there is such a library. Raises UserError."""
    if summed_by not in LIBRARIES:
        raise UserError(f"the strategy is summed by {summed_by!r}: known are {', '.join(LIBRARIES)}")
    if summed_by == "horovod":
        ranks.together(horovod.require)


def summer(
    ranks: Ranks, summed_by: str, collectives: Collectives, size: int, carried: Callable[[int, int, int], None]
) -> Summer:
    """Set up the sums. ``size``: entries of the gradient vector (P); ``carried``: see `loop.links.Links.carried`."""
    if summed_by == "horovod":
        return horovod.HorovodSums(ranks.together(horovod.load), ranks, size, carried)
    return Ring(collectives)
