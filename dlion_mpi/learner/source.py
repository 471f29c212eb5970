"""A data set that is open: labels and test rows in memory, training rows read when they are asked for; its checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dlion_mpi.errors import UserError

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]
Rows = npt.NDArray[np.int64]

DATASETS = ("x_train", "y_train", "x_test", "y_test")
BLOCK_BYTES = 16 << 20
SELECTION_ROWS = 256
"""Rows of one HDF5 selection. h5py's time grows with the square of an index list: 4 s for 15,000 rows at once."""


@dataclass(frozen=True, eq=False)
class Source:
    """An open data set.

    ``source``: where it was read from, for people. ``y_train``: (m,) and ``y_test``: (t,) integers from 0 to
    ``classes`` - 1. ``x_test``: (t, ...) uint8 or float32. ``read_train``: ascending row numbers to those rows of
    the training set.
    """

    name: str
    source: str
    classes: int
    y_train: npt.NDArray[Any]
    x_test: Pixels
    y_test: npt.NDArray[Any]
    read_train: Callable[[Rows], Pixels]


def of_arrays(x_train: Any, y_train: Any, x_test: Any, y_test: Any) -> Source:
    """Arrays in memory, held to the same rules as an HDF5 file. Raises UserError."""
    where = "arrays in memory"
    parts = {name: np.asarray(part) for name, part in zip(DATASETS, (x_train, y_train, x_test, y_test), strict=True)}
    check(parts, where)
    y_train, y_test, classes = labels(parts, None, where)
    test, train = (read_rows(parts[name], np.arange(len(parts[name])), name, where) for name in ("x_test", "x_train"))
    return Source("arrays", where, classes, y_train, test, y_test, lambda _: train)  # a rank's arrays are its shard


def check(parts: Mapping[str, Any], where: str) -> None:
    """Refuse HDF5 datasets or arrays of the wrong shape or dtype, before any value is read. Raises UserError."""
    for name, part in parts.items():
        if not part.size:
            raise UserError(f"{where}: {name} is empty, shape {part.shape}: store at least one row")
    for x_name, y_name in (("x_train", "y_train"), ("x_test", "y_test")):
        x, y = parts[x_name], parts[y_name]
        if x.ndim not in (2, 3, 4):
            shapes = "(rows, features), (rows, height, width) or (rows, height, width, channels)"
            raise UserError(f"{where}: {x_name} has shape {x.shape}: store {shapes}")
        if x.dtype != np.uint8 and x.dtype.kind != "f":
            raise UserError(f"{where}: {x_name} is {x.dtype}: store it as uint8 (0 to 255) or float32")
        if y.dtype.kind not in "iu" or y.shape not in ((y.size,), (y.size, 1)):
            raise UserError(f"{where}: {y_name} is {y.dtype} of shape {y.shape}: store one integer label per row")
        if len(y) != len(x):
            raise UserError(f"{where}: {x_name} has {len(x)} rows, {y_name} {len(y)}: store one label per row")
    x, other = parts["x_train"], parts["x_test"]
    if x.shape[1:] != other.shape[1:] or x.dtype.kind != other.dtype.kind:
        train, test = (f"{part.dtype} rows of {part.shape[1:]}" for part in (x, other))
        raise UserError(f"{where}: x_train has {train}, x_test {test}: store both alike")


def labels(parts: Mapping[str, Any], declared: Any, where: str) -> tuple[Labels, Labels, int]:
    """Labels for training and test, each (m,), and the classes: ``declared``, else the largest label + 1.

    Raises UserError for a negative label, or one that is too large.
    """
    y_train, y_test = (parts[name][()].reshape(-1) for name in ("y_train", "y_test"))
    smallest, largest = min(int(y_train.min()), int(y_test.min())), max(int(y_train.max()), int(y_test.max()))
    if smallest < 0:
        raise UserError(f"{where}: label {smallest} is negative: count labels from 0")
    if declared is None:
        declared = min(largest + 1, 2**31 - 1)  # labels are kept as int32
    elif np.ndim(declared) or np.asarray(declared).dtype.kind not in "iu":
        raise UserError(f"{where}: the attribute classes is {declared!r}: store one integer")
    if largest >= declared:
        raise UserError(f"{where}: label {largest} is too large: {declared} classes go from 0 to {declared - 1}")
    return y_train.astype(np.int32), y_test.astype(np.int32), int(declared)


def read_rows(part: Any, rows: Rows, name: str, where: str) -> Pixels:
    """Read these rows (ascending) of an HDF5 dataset or array as uint8 or float32. Raises UserError unless finite.

    Rows of other ranks are skipped. Chunked storage is read block by block instead: HDF5 reads whole chunks anyway.
    """
    x = np.empty((len(rows), *part.shape[1:]), np.uint8 if part.dtype == np.uint8 else np.float32)
    span = max(1, BLOCK_BYTES * len(part) // (part.dtype.itemsize * part.size))
    is_chunked = getattr(part, "chunks", None) is not None
    at = 0
    while at < len(rows):
        piece = rows[at : np.searchsorted(rows, rows[at] + span)]
        if not is_chunked:
            piece = piece[:SELECTION_ROWS]
        first, last = piece[0], piece[-1]
        with np.errstate(over="ignore"):  # a float64 beyond float32 is caught as infinite below
            if is_chunked or last - first == len(piece) - 1:
                x[at : at + len(piece)] = part[first : last + 1][piece - first]
            else:
                x[at : at + len(piece)] = part[piece]
        at += len(piece)
    finite = x.dtype == np.uint8 or np.isfinite(x).all(axis=tuple(range(1, x.ndim)))
    if not np.all(finite):
        name = f"{name} row {rows[np.argmin(finite)]}"
        raise UserError(f"{where}: {name} has NaN, infinity or more than float32 holds: clean the data")
    return x


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
