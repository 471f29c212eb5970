"""The lock of a run's folder: two jobs in one folder would remove each other's checkpoints."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import time
from pathlib import Path
from types import TracebackType

from dlion_mpi.errors import UserError

NAME = "lock"
WAIT_S, LOOK_S = 10.0, 0.2
"""A job that ends now gives its lock back soon; seconds to wait for that, and between two looks."""
HELD = (errno.EAGAIN, errno.EACCES)


class FolderLock:
    """The lock of the folder in which this process writes a run, until the end of the block.

    The file system holds it, also between machines, and gives it back when the process ends in whatever way. On one
    that has no locks there is none.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._path = Path()

    def take(self, run: Path) -> None:
        """Lock the folder. Raises UserError if another process has it, or it cannot be written."""
        self._path = run / NAME
        deadline_s = time.monotonic() + WAIT_S
        while not self._try():
            if time.monotonic() > deadline_s:
                raise UserError(f"{run}: {self._holder()} is writing a run there: wait for its end")
            time.sleep(LOOK_S)

    def _try(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"{self._path.parent}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            return error.errno not in HELD  # a file system without locks
        try:
            is_current = os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            is_current = False
        if not is_current:  # removed by the job before, which has just ended
            os.close(descriptor)
            return False
        with contextlib.suppress(OSError):  # a full disk needs no name
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        self._descriptor = descriptor
        return True

    def _holder(self) -> str:
        try:
            return self._path.read_text(encoding="utf-8", errors="replace") or "another job"
        except OSError:
            return "another job"

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give the lock back, if this process has it."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
            os.close(self._descriptor)
            self._descriptor = None
