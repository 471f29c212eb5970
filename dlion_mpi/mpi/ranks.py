"""The ranks of a run, and what they tell each other before and after training.

Every method waits for the other ranks, and `mpi.stall` watches the wait. Nothing is pickled: ranks tell each other
numbers and text.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from dlion_mpi.config.fields import Every
from dlion_mpi.errors import Stalled, UserError
from dlion_mpi.mpi import jobenv
from dlion_mpi.mpi.presence import Presence
from dlion_mpi.mpi.stall import StallWatch
from dlion_mpi.mpi.startup import MPI, abort_at_exit
from dlion_mpi.vector.layout import Vector

T = TypeVar("T")

LOOKS = 100
"""Looks at a request without a pause between them."""
PAUSE_S = (50e-6, 1e-3)
"""The shortest and the longest pause between two later looks. Pauses grow by a twentieth, as the wait does."""


def agreed(action: Callable[[], T], stall_limit: Every | None = None) -> T:
    """Call ``action`` on every rank, before a run has a communicator. A UserError of one rank is raised on all."""
    ranks = Ranks(stall_limit=stall_limit)
    try:
        return ranks.together(action)
    finally:
        ranks.free()


class Ranks:
    """A run's private communicator, and this rank's place in it. Every method is called by all ranks.

    ``local_rank``, ``local_size``: among the ranks of this node. ``communicator``: for the modules of `mpi` alone.
    ``stall``: watches the waits of this rank, ``presence``: tells who waits.
    """

    def __init__(self, communicator: MPI.Intracomm | None = None, *, stall_limit: Every | None = None) -> None:
        """Duplicate ``communicator`` (COMM_WORLD), so that the run's messages are kept apart from all others.

        ``stall_limit``: ``--stall-limit``. Raises UserError if a launcher started several processes and MPI knows of
        one.
        """
        if problem := jobenv.alone_by_mistake(os.environ, MPI.COMM_WORLD.Get_size()):
            place = jobenv.place(os.environ)
            raise UserError(problem, quiet=place is not None and place.rank != 0)
        parent = communicator or MPI.COMM_WORLD
        self.rank, self.size = parent.Get_rank(), parent.Get_size()
        self.stall = StallWatch(self.rank, self.size, stall_limit)
        self.communicator = self.duplicate(parent)
        self.presence = self.stall.presence = Presence(self.duplicate(self.communicator))
        node = self.communicator.Split_type(MPI.COMM_TYPE_SHARED, self.rank)
        self.local_rank, self.local_size = node.Get_rank(), node.Get_size()
        node.Free()

    def duplicate(self, communicator: MPI.Intracomm) -> MPI.Intracomm:
        """Return a duplicate of a communicator."""
        copy, request = communicator.Idup()
        self.wait(request)
        return copy

    def wait(self, request: MPI.Request) -> None:
        """Wait for a request. Raises Stalled after ``--stall-limit``."""
        if any(request.Test() for _ in range(LOOKS)):
            return
        presence, pause_s = self.stall.presence, PAUSE_S[0]
        try:
            with self.stall.waiting() as look:
                while not (request.Test() or look()):
                    if isinstance(presence, Presence):
                        presence.progress()
                    time.sleep(pause_s)
                    pause_s = min(1.05 * pause_s, PAUSE_S[1])
        except Stalled:
            abort_at_exit(1)
            raise

    def gather_text(self, text: str) -> list[str]:
        """Return every rank's text, by rank."""
        own = np.frombuffer(text.encode(), dtype=np.uint8)
        lengths = np.empty(self.size, dtype=np.int64)
        self.wait(self.communicator.Iallgather(np.array([len(own)], dtype=np.int64), lengths))
        padded = np.zeros(max(1, int(lengths.max())), dtype=np.uint8)
        padded[: len(own)] = own
        texts = np.empty((self.size, len(padded)), dtype=np.uint8)
        self.wait(self.communicator.Iallgather(padded, texts))
        return [row[:length].tobytes().decode(errors="replace") for row, length in zip(texts, lengths, strict=True)]

    def gather_numbers(self, *numbers: float) -> npt.NDArray[np.float64]:
        """Return every rank's numbers: (n, k), row r from rank r."""
        own = np.array(numbers, dtype=np.float64)
        table = np.empty((self.size, len(own)), dtype=np.float64)
        self.wait(self.communicator.Iallgather(own, table))
        return table

    def together(self, action: Callable[[], T]) -> T:
        """Call ``action`` on every rank. A UserError of one rank is raised on all, and one rank prints it.

        The message names the rank if it is the error of one that is not rank 0.
        """
        result, problem = None, ""
        try:
            result = action()
        except UserError as error:
            problem = str(error)
        problems = self.gather_text(problem)
        first = next((rank for rank, text in enumerate(problems) if text), None)
        if first is not None:
            name = f"rank {first}: " if first and not all(problems) else ""  # rank 0 speaks for all
            raise UserError(f"{name}{problems[first]}", quiet=self.rank != first)
        return result  # type: ignore[return-value]

    def agree(self, description: str) -> None:
        """Check that ``description``, one ``name = value`` per line, is the same on all ranks.

        Raises UserError naming the first line that differs, and the rank.
        """
        texts = self.gather_text(description)
        for rank, text in enumerate(texts):
            if text != texts[0]:
                pairs = zip([*text.splitlines(), ""], [*texts[0].splitlines(), ""], strict=False)
                mine, theirs = next((a, b) for a, b in pairs if a != b)
                raise UserError(
                    f"rank {rank} has '{mine}' where rank 0 has '{theirs}': "
                    "start all ranks with the same options and versions",
                    quiet=self.rank != 0,
                )

    def share(self, vector: Vector, root: int = 0) -> Vector:
        """Overwrite ``vector`` (K,) float32 with rank ``root``'s, and return it."""
        self.wait(self.communicator.Ibcast(vector, root=root))
        return vector

    def mean(self, vector: Vector) -> Vector:
        """Return the mean of all ranks' ``vector`` (K,) float32."""
        total = np.empty_like(vector)
        self.wait(self.communicator.Iallreduce(vector, total))
        return total / np.float32(self.size)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.wait(self.communicator.Ibarrier())

    def free(self) -> None:
        """Free the communicators, on all ranks together."""
        self.presence.close(self.wait)
        self.communicator.Free()
