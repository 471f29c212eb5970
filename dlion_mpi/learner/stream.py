"""Rows that come in pieces, one after the other, and a thread that reads them ahead of training."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np

from dlion_mpi.errors import RunError, UserError
from dlion_mpi.learner.batch import Batch, joined
from dlion_mpi.plugins import described

AHEAD = 2
"""Batches, and pieces, that wait ready."""
MOST_EMPTY = 10_000
"""Empty batches in a row that are an error of the source."""
LOOK_S = 0.05
"""Seconds between two looks at how long `Prefetcher.take` has waited."""
CLOSE_S = 10.0
"""Seconds that `Prefetcher.close` waits for a source that is reading."""


Waiting = Callable[[str], AbstractContextManager[Callable[[], bool]]]


def unwatched(what: str) -> AbstractContextManager[Callable[[], bool]]:
    """Watch nothing; a `Waiting`."""
    return nullcontext(lambda: False)


class Stream(Protocol):
    """Rows that can be read in one order only, epoch by epoch."""

    where: str
    """The source, for messages."""

    @property
    def rows(self) -> int | None:
        """Rows of one epoch; None if they cannot be counted."""

    def example(self) -> Batch:
        """The first rows, at least one."""

    def pieces(self, order: np.random.Generator, skip: int) -> Iterator[Batch]:
        """The rows of one epoch without the first ``skip``, in pieces of any size.

        ``order``: random numbers of this epoch, for streams that choose an order themselves.
        """


class Prefetcher:
    """Reads a stream in a thread, ahead of `take`, from the row ``skip`` of an ``epoch`` on.

    ``waiting``: watches a wait for what it is given, see `mpi.stall.StallWatch.waiting`.
    """

    def __init__(
        self, stream: Stream, seed: int, rank: int, epoch: int, skip: int, waiting: Waiting = unwatched
    ) -> None:
        self._waiting = waiting
        self._stream, self._seed, self._rank = stream, seed, rank
        self.epoch, self.position = epoch, skip
        self._kind = stream.example().kind()
        self._pieces: deque[tuple[int, Batch]] = deque()
        self._rows, self._wanted = 0, 1
        self._failure: RunError | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, args=(epoch, skip), name="data", daemon=True)
        self._thread.start()

    def take(self, size: int) -> Batch:
        """The next ``size`` rows. Waits until they are there. Raises RunError if the source fails.

        That ends this rank as any failure of a run does, and the others continue: see `run.run`.
        """
        parts: list[Batch] = []
        with self._changed:
            self._wanted = size
            self._changed.notify_all()
            with self._waiting(f"rows of {self._stream.where}") as look:
                while self._rows < size:
                    if self._failure is not None:
                        raise self._failure
                    self._changed.wait(LOOK_S)
                    look()
            while size:
                epoch, piece = self._pieces.popleft()
                taken = min(size, piece.rows)
                if taken < piece.rows:
                    self._pieces.appendleft((epoch, piece.part(taken, piece.rows)))
                    piece = piece.part(0, taken)
                parts.append(piece)
                self.epoch, self.position = epoch, taken + (self.position if epoch == self.epoch else 0)
                self._rows -= taken
                size -= taken
            self._changed.notify_all()
        return joined(parts)

    def close(self) -> None:
        """End the thread. Waits for a source that is reading, but not without end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(CLOSE_S)

    def _run(self, epoch: int, skip: int) -> None:
        try:
            while self._read(epoch, skip):
                epoch, skip = epoch + 1, 0
        except RunError as error:
            self._fail(error)
        except BaseException as error:
            problem = RunError(str(error) if isinstance(error, UserError) else failure(self._stream.where, error))
            problem.__cause__ = error
            self._fail(problem)

    def _read(self, epoch: int, skip: int) -> bool:
        """Read one epoch. Returns whether another is wanted."""
        found = skip
        order = np.random.default_rng(epoch_seed(self._seed, self._rank, epoch))
        for piece in with_rows(self._stream.pieces(order, skip), self._stream.where):
            if (kind := piece.kind()) != self._kind:
                raise RunError(f"{self._stream.where} has rows of {kind} after rows of {self._kind}: make all alike")
            found += piece.rows
            if not self._put(epoch, piece):
                return False
        if not found:
            raise RunError(
                f"{self._stream.where} has no rows in epoch {epoch}: it must give rows every time it is read"
            )
        return True

    def _put(self, epoch: int, piece: Batch) -> bool:
        """Add a piece when there is room. Returns False if the rows are no longer wanted."""
        with self._changed:
            while not self._closed and len(self._pieces) >= AHEAD and self._rows >= AHEAD * self._wanted:
                self._changed.wait()
            if not self._closed:
                self._pieces.append((epoch, piece))
                self._rows += piece.rows
                self._changed.notify_all()
            return not self._closed

    def _fail(self, error: RunError) -> None:
        with self._changed:
            self._failure = error
            self._changed.notify_all()


def failure(where: str, error: BaseException) -> str:
    """One line on an exception that reading the source has raised."""
    return f"{where} fails: {described(error)}"


def epoch_seed(seed: int, rank: int, epoch: int) -> np.random.SeedSequence:
    """The seed of the order of rows in an epoch."""
    # A spawn key keeps this stream apart from the partition's, which the bare seed starts.
    return np.random.SeedSequence(seed, spawn_key=(rank, epoch))


def with_rows(pieces: Iterator[Batch], where: str) -> Iterator[Batch]:
    """The pieces without those that are empty: a source may give one, for example where it filters rows.

    Raises UserError for a source that gives only empty ones: it may have no end.
    """
    empty = 0
    for piece in pieces:
        empty = 0 if piece.rows else empty + 1
        if empty == MOST_EMPTY:
            raise UserError(f"{where} gives only empty batches, {MOST_EMPTY:,} one after the other: give rows")
        if piece.rows:
            yield piece


def in_chunks(pieces: Iterator[Batch], size: int, most: int | None, where: str) -> Iterator[Batch]:
    """The rows of the pieces in batches of ``size``; the last may be smaller. At most ``most`` rows."""
    waiting: list[Batch] = []
    rows, left = 0, most
    for piece in with_rows(pieces, where):
        if left is not None:
            piece = piece.part(0, min(left, piece.rows))
            left -= piece.rows
        waiting.append(piece)
        rows += piece.rows
        if rows >= size:
            whole = joined(waiting)
            for start in range(0, rows - size + 1, size):
                yield whole.part(start, start + size)
            rows %= size
            waiting = [whole.part(whole.rows - rows, whole.rows)]
        if left == 0:
            break
    if rows:
        yield joined(waiting)
