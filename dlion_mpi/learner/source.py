"""A data set that is open: what its rows are, and the checks that all kinds of data share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dlion_mpi.errors import UserError
from dlion_mpi.learner.batch import Batch, RowNumbers

Labels = npt.NDArray[np.integer[Any]]
BLOCK_BYTES = 16 << 20
MOST_CLASSES = 2**31 - 1
"""Larger whole numbers are no class labels: those are int32."""


@dataclass(frozen=True, eq=False)
class Table:
    """Rows that can be read by number.

    ``rows``: how many there are. ``read``: row numbers to those rows, in memory in any order, from a file ascending.
    ``row_bytes``: size of one row. ``in_memory``: whether reading costs no more than copying.
    """

    rows: int
    read: Callable[[RowNumbers], Batch]
    row_bytes: int
    in_memory: bool = False

    @classmethod
    def of(cls, batch: Batch) -> Table:
        """Rows of arrays, which may be memory-mapped files: they are converted when they are read."""

        def read(rows: RowNumbers) -> Batch:
            if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
                return converted(batch.part(int(rows[0]), int(rows[-1]) + 1))
            return converted(batch.map(lambda array: array[rows]))

        return cls(batch.rows, read, row_bytes(batch), in_memory=True)

    def part(self, rows: RowNumbers) -> Table:
        """Only these rows (ascending); they are read when they are asked for."""
        return Table(len(rows), lambda numbers: self.read(rows[numbers]), self.row_bytes)

    def loaded(self) -> Table:
        """All rows, read now."""
        return self if self.in_memory else Table.of(self.read(np.arange(self.rows)))


@dataclass(frozen=True, eq=False)
class Source:
    """An open data set.

    ``source``: where it was read from, for people. ``test``: None without test rows. ``labels``: (m,) one number per
    training row by which the Dirichlet partition deals: its class, or another group; None if rows have none.
    ``classes``: number of classes; None if the targets are not classes.
    """

    name: str
    source: str
    train: Table
    test: Table | None
    labels: Labels | None
    classes: int | None


def labelled(x: Any, y: Any) -> Batch:
    """Images (m, H, W) or (m, H, W, C) and labels -> images with channels and int32 labels."""
    return Batch(x if x.ndim == 4 else x[..., None], y.astype(np.int32))


def of_images(name: str, source: str, classes: int, train: Batch, test: Batch) -> Source:
    """A data set of images with labels in memory."""
    return Source(name, source, Table.of(train), Table.of(test), train.y, classes)


Reader = Callable[[RowNumbers], Batch]


def opened(
    name: str,
    path: str,
    train: tuple[Batch, Reader],
    test: tuple[Batch, Reader] | None,
    *,
    declared: Any = None,
    groups: Any = None,
) -> Source:
    """An open data set in files.

    ``train``, ``test``: its arrays or open data sets, which are not read yet, and the function that reads rows of them.
    ``declared``: the number of classes that the file names. ``groups``: a group for every training row, (m,). Raises
    UserError if these do not fit together.
    """
    parts = [train[0]] if test is None else [train[0], test[0]]
    if test is not None:
        check_alike_parts(train[0], test[0], path)
    labels, classes = _classes(parts, declared, path)
    if groups is not None:
        if getattr(groups, "shape", None) != (train[0].rows,) or groups.dtype.kind not in "iu":
            raise UserError(f"{path}: group_train must have one whole number for each of {train[0].rows} training rows")
        labels = groups[()]

    def table(part: Batch, read: Reader) -> Table:
        if classes is None or not may_be_classes(part.y):
            return Table(part.rows, read, row_bytes(part))
        return Table(part.rows, lambda rows: with_class_labels(read(rows)), row_bytes(part))

    return Source(name, path, table(*train), None if test is None else table(*test), labels, classes)


def _classes(parts: Sequence[Batch], declared: Any, path: str) -> tuple[Labels | None, int | None]:
    """Labels of the training rows, (m,), and the number of classes; None for targets that are not classes.

    ``declared``: the file's number of classes, with which labels must agree. Raises UserError.
    """
    if declared is not None and (np.ndim(declared) or np.asarray(declared).dtype.kind not in "iu"):
        raise UserError(f"{path}: the attribute classes is {declared!r}: store one integer")
    if not all(may_be_classes(part.y) for part in parts):
        return None, None if declared is None else int(declared)
    labels = [part.y[()].reshape(-1) for part in parts]
    smallest, largest = min(int(y.min()) for y in labels), max(int(y.max()) for y in labels)
    if declared is None:
        is_class = smallest >= 0 and largest < MOST_CLASSES
        return (labels[0], largest + 1) if is_class else (None, None)
    if smallest < 0:
        raise UserError(f"{path}: label {smallest} is negative: count labels from 0")
    if largest >= declared:
        raise UserError(f"{path}: label {largest} is too large: {declared} classes go from 0 to {declared - 1}")
    return labels[0], int(declared)


def row_bytes(batch: Batch) -> int:
    """Size of one row."""
    return sum(int(np.prod(array.shape[1:])) * array.dtype.itemsize for array in batch.named().values())


def converted(batch: Batch) -> Batch:
    """Floats as float32, as Keras has them; all others as they are, in the machine's order of bytes."""
    return batch.map(_converted)


def _converted(array: Any) -> Any:
    with np.errstate(over="ignore"):  # a float64 beyond float32 is found as infinite
        return np.asarray(array, kept_type(array.dtype))


def checked(batch: Batch, where: str, part: str = "") -> Batch:
    """The batch, if every array has numbers and all have equally many rows, at least one. Raises UserError.

    ``part``: ``_train`` or ``_test``, which the message adds to the names of the arrays.
    """
    places = batch.named(part)
    if not any(place[0] == "x" for place in places):
        raise UserError(f"{where}: there are no inputs x{part}: give at least one array")
    for place, array in places.items():
        if not array.size:
            raise UserError(f"{where}: {place} is empty, shape {array.shape}: give at least one row")
        if array.dtype.kind not in "biuf":
            raise UserError(f"{where}: {place} is {array.dtype}: give numbers")
        if array.ndim == 0:
            raise UserError(f"{where}: {place} is a single number: give one row per sample")
    rows = {place: len(array) for place, array in places.items()}
    first, *others = rows
    for place in others:
        if rows[place] != rows[first]:
            raise UserError(f"{where}: {first} has {rows[first]} rows, {place} {rows[place]}: give equally many rows")
    return batch


def check_alike_parts(train: Batch, test: Batch, where: str) -> None:
    """Raise UserError unless test rows are like training rows. Arrays may be open data sets.

    Weights may be missing in one of them, and labels may be whole numbers of two types.
    """
    kinds = []
    are_labels = may_be_classes(train.y) and may_be_classes(test.y)
    for part in (train, test):
        places = part._replace(y=None if are_labels else part.y, sample_weight=None).named()
        kinds.append({place: (tuple(a.shape[1:]), kept_type(a.dtype)) for place, a in places.items()})
    for place in {**kinds[0], **kinds[1]}:
        ours, theirs = (_text_of(kind.get(place)) for kind in kinds)
        if ours != theirs:
            raise UserError(f"{where}: {place} has {ours} for training, {theirs} for tests: give both alike")


def _text_of(kind: tuple[tuple[int, ...], np.dtype[Any]] | None) -> str:
    return "no data" if kind is None else f"{kind[1]} rows of {kind[0]}"


def kept_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type that `converted` gives."""
    return np.dtype(np.float32) if dtype.kind == "f" else dtype.newbyteorder("=")


def check_finite(array: Any, where: str, place: str, numbers: RowNumbers | None = None) -> None:
    """Raise UserError if a float of the array is not finite as float32. ``numbers``: of its rows, for the message."""
    if array.dtype.kind != "f":
        return
    block = max(1, BLOCK_BYTES * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), block):
        part = array[start : start + block]
        with np.errstate(over="ignore"):
            finite = np.isfinite(np.asarray(part, np.float32)).reshape(len(part), -1).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            place = f"{place} row {row if numbers is None else numbers[row]}"
            raise UserError(f"{where}: {place} has NaN, infinity or more than float32 holds: clean the data")


def may_be_classes(y: Any) -> bool:
    """Whether the targets are one whole number per row. Arrays may be open data sets."""
    return hasattr(y, "dtype") and y.dtype.kind in "iu" and y.shape[1:] in ((), (1,))


def class_labels(y: Any) -> Labels | None:
    """The classes of the rows, (m,), if the targets are one whole number per row that counts from 0; else None."""
    if not may_be_classes(y) or int(y.min()) < 0 or int(y.max()) >= MOST_CLASSES:
        return None
    labels: Labels = np.asarray(y).reshape(-1)
    return labels


def with_class_labels(batch: Batch) -> Batch:
    """The batch with its whole numbers y as int32 labels, (b,)."""
    return batch._replace(y=batch.y.reshape(-1).astype(np.int32))


def structure(named: dict[str, Any]) -> Any:
    """Named arrays as a dict; as a tuple if the names are 0, 1, 2 and so on."""
    if set(named) == {str(k) for k in range(len(named))}:
        return tuple(named[str(k)] for k in range(len(named)))
    return named


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
