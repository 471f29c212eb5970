"""Sources of batches as streams: those that can be read again, those with batches by number, and generators."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dlion_mpi.errors import RunError, UserError
from dlion_mpi.learner.batch import Batch
from dlion_mpi.learner.stream import failure, with_rows


class Repeated:
    """A source of batches that can be read again from its start. See `stream.Stream`."""

    def __init__(
        self,
        start: Callable[[], Iterator[Any]],
        convert: Callable[[Any], Batch],
        where: str,
        batches: int | None = None,
        most: int | None = None,
    ) -> None:
        """``batches``: how many there are; ``most``: an upper limit of all rows; None if they are not known."""
        self.where = where
        self._start, self._convert, self._batches, self._most = start, convert, batches, most
        self._first: Batch | None = None

    @property
    def rows(self) -> int | None:
        """Rows of all batches, if all are as large as the first; those of a `DataLoader` are known."""
        if self._batches is None:
            return None
        rows = self._batches * self.example().rows
        return rows if self._most is None else min(rows, self._most)

    def example(self) -> Batch:
        """See `stream.Stream`."""
        if self._first is None:
            self._first = _first(self._start, self._convert, self.where)
        return self._first

    def pieces(self, order: np.random.Generator, skip: int) -> Iterator[Batch]:
        """See `stream.Stream`."""
        return _without(map(self._convert, self._start()), skip, self.where)


class Indexed:
    """A `keras.utils.PyDataset`: batches by number, in a new order every epoch. See `stream.Stream`."""

    def __init__(self, data: Any, convert: Callable[[Any], Batch], where: str) -> None:
        self.where = where
        self._data, self._convert = data, convert
        self._first: Batch | None = None

    @property
    def rows(self) -> int | None:
        """Rows of all batches, if all but the last are as large as the first."""
        batches = self._batches()
        if batches is None:
            return None
        return (batches - 1) * self.example().rows + self._convert(self._data[batches - 1]).rows

    def example(self) -> Batch:
        """See `stream.Stream`."""
        if self._first is None:
            numbers = range(self._batches() or 1)
            self._first = _first(lambda: (self._data[number] for number in numbers), self._convert, self.where)
        return self._first

    def pieces(self, order: np.random.Generator, skip: int) -> Iterator[Batch]:
        """See `stream.Stream`."""
        batches = self._batches()
        numbers = itertools.count() if batches is None else map(int, order.permutation(batches))
        self._data.on_epoch_begin()
        yield from _without((self._convert(self._data[number]) for number in numbers), skip, self.where)
        self._data.on_epoch_end()

    def _batches(self) -> int | None:
        try:
            number: int | None = self._data.num_batches
        except NotImplementedError:
            return None
        return number


class Once:
    """A generator of batches, which gives each of them once and must not end. See `stream.Stream`."""

    rows = None

    def __init__(self, data: Iterator[Any], convert: Callable[[Any], Batch], where: str) -> None:
        self.where = where
        self._data, self._convert = data, convert
        self._first: Batch | None = None
        self._is_first_given = False

    def example(self) -> Batch:
        """See `stream.Stream`."""
        if self._first is None:
            self._first = _first(lambda: self._data, self._convert, self.where)
        return self._first

    def pieces(self, order: np.random.Generator, skip: int) -> Iterator[Batch]:
        """See `stream.Stream`. It continues with the next batch, whatever ``skip`` is."""
        if not self._is_first_given:
            self._is_first_given = True
            yield self.example()
        yield from map(self._convert, self._data)
        raise RunError(
            f"{self.where} is a generator that has ended: let it run without end, or give a function that returns one"
        )


def _first(start: Callable[[], Iterator[Any]], convert: Callable[[Any], Batch], where: str) -> Batch:
    """The first batch. Raises UserError if there is none, or reading it fails."""
    try:
        for batch in with_rows(map(convert, start()), where):
            return batch
    except UserError:
        raise
    except Exception as error:
        raise UserError(failure(where, error)) from error
    raise UserError(f"{where} has no rows: give at least one")


def _without(pieces: Iterator[Batch], skip: int, where: str) -> Iterator[Batch]:
    """The pieces without the first ``skip`` rows."""
    for piece in with_rows(pieces, where):
        if skip < piece.rows:
            yield piece.part(skip, piece.rows) if skip else piece
        skip = max(0, skip - piece.rows)
