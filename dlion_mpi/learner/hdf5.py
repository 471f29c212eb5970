"""Data in HDF5 files: one file for all ranks, or one per rank.

The data sets are `x_train`, `y_train`, `sample_weight_train`, `group_train`, `x_test`, `y_test`, `sample_weight_test`.
Each may be a group of named data sets instead, for models with several inputs or outputs. Only `x_train` must exist.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import h5py
import numpy as np

from dlion_mpi.errors import UserError
from dlion_mpi.learner.batch import Batch, RowNumbers
from dlion_mpi.learner.source import (
    BLOCK_BYTES,
    Source,
    Table,
    check_finite,
    checked,
    first_line,
    kept_type,
    opened,
    structure,
)

LAYOUT = "x_train, y_train, x_test, y_test"
SELECTION_ROWS = 256
"""Rows of one HDF5 selection. h5py's time grows with the square of an index list: 4 s for 15,000 rows at once."""


def open_file(path: str, name: str) -> Source:
    """The data set in this file, under this name. Raises UserError."""
    with _opened(path) as file:
        if "x_train" not in file:
            raise UserError(f"{path} has no dataset x_train: it needs {LAYOUT}")
        if "x_test" not in file and "y_test" in file:
            raise UserError(f"{path} has y_test, but no dataset x_test: it needs {LAYOUT}")
        return opened(
            name,
            path,
            (_part(file, "_train", path), _reader(path, "_train")),
            (_part(file, "_test", path), _reader(path, "_test")) if "x_test" in file else None,
            declared=file.attrs.get("classes", file["y_train"].attrs.get("classes") if "y_train" in file else None),
            groups=_structure(file, "group_train", path),
        )


def check_ranks(path: str, ranks: int) -> None:
    """Raise UserError for a shard file of another number of ranks: fewer would train on a part of the data only."""
    with _opened(path) as file:
        written_for = file.attrs.get("ranks", ranks)
    if written_for != ranks:
        raise UserError(f"{path} is one of {written_for} shards: start {written_for} ranks, or split again")


@contextlib.contextmanager
def _opened(path: str) -> Iterator[h5py.File]:
    """The open file. Raises UserError for a file that HDF5 cannot read."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError) as error:
        if "file signature not found" in str(error):
            raise UserError(f"{path} is not an HDF5 file: write one with {LAYOUT}") from error
        reason = first_line(error)
        raise UserError(f"{path} cannot be read ({reason}): if it is damaged, write it again") from error


def _part(file: h5py.File, suffix: str, path: str) -> Batch:
    """The training or test data sets as a batch of open data sets, checked. Raises UserError."""
    return checked(Batch(*(_structure(file, f"{name}{suffix}", path) for name in Batch._fields)), path, suffix)


def _structure(parent: h5py.Group, name: str, path: str) -> Any:
    """A data set, or a group as a dict (as a tuple if its members are 0, 1, ...); None if there is none."""
    link = parent.get(name, getlink=True) if name in parent or parent.get(name, getlink=True) is not None else None
    if link is None:
        return None
    where = f"{parent.name}/{name}".lstrip("/")
    if isinstance(link, h5py.ExternalLink):
        raise UserError(f"{path}: {where} is a link to {link.filename}: copy the data into this file")
    item = parent.get(name)
    if isinstance(item, h5py.Group):
        return structure({key: _structure(item, key, path) for key in item})
    if not isinstance(item, h5py.Dataset):
        raise UserError(f"{path} has no dataset {where}: it is a link to nothing, or not data")
    _check_stored(item, where, path)
    return item


def _check_stored(dataset: h5py.Dataset, where: str, path: str) -> None:
    """Raise UserError unless the values are all in this file: HDF5 would show zeros in place of those that are not."""
    if dataset.is_virtual:
        raise UserError(f"{path}: {where} is a virtual data set, with values in other files: copy them into this file")
    if dataset.external:
        raise UserError(f"{path}: {where} has its values in {dataset.external[0][0]}: copy them into this file")
    if dataset.shape is None or not dataset.size:
        return  # refused as empty
    stored, declared = dataset.id.get_storage_size(), dataset.size * dataset.dtype.itemsize
    if dataset.chunks is None:
        is_whole = stored >= declared
    else:
        chunks = math.prod(-(-length // chunk) for length, chunk in zip(dataset.shape, dataset.chunks, strict=True))
        is_whole = dataset.id.get_num_chunks() >= chunks
    if not is_whole:
        raise UserError(
            f"{path}: {where} declares {dataset.shape} of {dataset.dtype} ({declared:,} bytes), but the file has "
            f"{stored:,} bytes of it: write all rows"
        )


def _reader(path: str, suffix: str) -> Callable[[RowNumbers], Batch]:
    """A function that reads rows of the training or test part. It opens the file and closes it again."""

    def read(rows: RowNumbers) -> Batch:
        with _opened(path) as file:
            found = Batch(*(_structure(file, f"{name}{suffix}", path) for name in Batch._fields))
            names = iter(found.named(suffix))
            return found.map(lambda dataset: read_rows(dataset, rows, next(names), path))

    return read


def read_rows(dataset: Any, rows: RowNumbers, name: str, path: str) -> Any:
    """Read these rows (ascending) of a data set, floats as float32. Raises UserError unless they are finite.

    Rows of other ranks are skipped. Chunked storage is read block by block instead: HDF5 reads whole chunks anyway.
    """
    array = np.empty((len(rows), *dataset.shape[1:]), kept_type(dataset.dtype))
    span = max(1, BLOCK_BYTES * len(dataset) // (dataset.dtype.itemsize * dataset.size))
    is_chunked = dataset.chunks is not None
    at = 0
    while at < len(rows):
        piece = rows[at : np.searchsorted(rows, rows[at] + span)]
        if not is_chunked:
            piece = piece[:SELECTION_ROWS]
        first, last = piece[0], piece[-1]
        with np.errstate(over="ignore"):  # a float64 beyond float32 is found as infinite
            if is_chunked or last - first == len(piece) - 1:
                array[at : at + len(piece)] = dataset[first : last + 1][piece - first]
            else:
                array[at : at + len(piece)] = dataset[piece]
        at += len(piece)
    check_finite(array, path, name, rows)
    return array


def write(file: h5py.File, table: Table, suffix: str) -> None:
    """Write all rows as training (``_train``) or test (``_test``) data sets, block by block."""
    block = max(1, BLOCK_BYTES // max(1, table.row_bytes))
    made: list[h5py.Dataset] = []
    for start in range(0, table.rows, block):
        batch = table.read(np.arange(start, min(table.rows, start + block)))
        if not made:
            made = _create(file, batch, suffix, table.rows)
        for dataset, array in zip(made, batch.named().values(), strict=True):
            dataset[start : start + len(array)] = array


def _create(file: h5py.File, batch: Batch, suffix: str, rows: int) -> list[h5py.Dataset]:
    """Create the data sets for such rows, in the order of `Batch.named`. Nested structures become groups."""
    made = []
    for path, array in batch.paths():
        name = "/".join([f"{Batch._fields[path[0]]}{suffix}", *map(str, path[1:])])
        made.append(file.create_dataset(name, (rows, *array.shape[1:]), array.dtype))
    return made
