"""Data in Parquet files, read with pyarrow: a file, or a folder with `train*.parquet` and `test*.parquet`.

The columns `y` and `y.NAME` are targets, `sample_weight` weights, `group` the group of a row. All others are inputs:
`x` alone is an array, other columns are a dict by their names, where `x.NAME` stands for NAME. A column has numbers, or
lists of numbers of equal length.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from dlion_mpi.errors import UserError
from dlion_mpi.learner.batch import Batch, RowNumbers, joined
from dlion_mpi.learner.source import Source, check_finite, checked, converted, first_line, opened, structure

Columns = dict[str, Any]


def open_file(path: str, name: str) -> Source:
    """The training rows of a file, under this name; there are no test rows. Raises UserError."""
    return _open(path, name, [path], [])


def open_folder(path: str, name: str) -> Source:
    """The data set in this folder, under this name. Raises UserError."""
    files = sorted(os.path.join(path, file) for file in os.listdir(path) if file.endswith(".parquet"))
    parts = {part: [f for f in files if os.path.basename(f).startswith(part)] for part in ("train", "test")}
    return _open(path, name, parts["train"], parts["test"])


def _open(path: str, name: str, train: list[str], test: list[str]) -> Source:
    parts = [_Rows(files) for files in (train, test) if files]
    batches = [checked(part.like(), path) for part in parts]
    opened_parts = [(batch, part.read) for batch, part in zip(batches, parts, strict=True)]
    return opened(name, path, opened_parts[0], opened_parts[1] if test else None, groups=parts[0].group())


class _Rows:
    """The rows of some files, one after the other."""

    def __init__(self, files: list[str]) -> None:
        self._files = {file: _file(file) for file in files}
        self._groups = [(f, group) for f, open_file in self._files.items() for group in range(open_file.num_row_groups)]
        sizes = [self._files[file].metadata.row_group(group).num_rows for file, group in self._groups]
        self._starts = np.cumsum([0, *sizes])
        if not self._starts[-1]:
            raise UserError(f"{files[0]} has no rows: write at least one")
        self._names = self._files[files[0]].schema_arrow.names

    def like(self) -> Batch:
        """Stand-ins for the arrays of all rows, of which only targets that may be classes have values."""
        rows = int(self._starts[-1])
        first = self._parts(next(self._read_groups([0])))
        example = first.map(lambda array: np.broadcast_to(array[:1], (rows, *array.shape[1:])))
        y = first.y
        if isinstance(y, np.ndarray) and y.dtype.kind in "iu" and y.shape[1:] in ((), (1,)):
            example = example._replace(y=self._whole("y"))
        return example

    def group(self) -> Any:
        """The group of every row, (m,); None without such a column."""
        return self._whole("group") if "group" in self._names else None

    def read(self, rows: RowNumbers) -> Batch:
        """These rows (ascending). Raises UserError unless they are finite."""
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        pieces = []
        for number in np.unique(numbers):
            wanted = rows[numbers == number]
            batch = self._parts(next(self._read_groups([int(number)])))
            start = self._starts[number]
            batch = batch.map(partial(np.take, indices=wanted - start, axis=0))
            for place, array in batch.named().items():
                check_finite(array, self._groups[number][0], place, wanted)
            pieces.append(converted(batch))
        return joined(pieces)

    def _whole(self, column: str) -> Any:
        return np.concatenate([found[column] for found in self._read_groups(range(len(self._groups)), [column])])

    def _read_groups(self, numbers: Any, columns: list[str] | None = None) -> Iterator[Columns]:
        """The columns of these row groups."""
        for number in numbers:
            file, group = self._groups[number]
            try:
                table = self._files[file].read_row_group(group, columns)
            except (OSError, ValueError) as error:
                raise UserError(f"{file} cannot be read ({first_line(error)}): write it again") from error
            yield {name: _array(table.column(name), name, file) for name in table.column_names}

    @staticmethod
    def _parts(columns: Columns) -> Batch:
        """Columns as a batch, by their names."""
        columns = {name: array for name, array in columns.items() if name != "group"}
        weight = columns.pop("sample_weight", None)
        y = {name: columns.pop(name) for name in list(columns) if name == "y" or name.startswith("y.")}
        return Batch(_named(columns, "x"), _named(y, "y") if y else None, weight)


def _named(columns: Columns, field: str) -> Any:
    """The column of that name if it is the only one, else all by their names."""
    if set(columns) == {field}:
        return columns[field]
    return structure({name.removeprefix(f"{field}."): array for name, array in columns.items()})


def _file(path: str) -> Any:
    """The open file. Raises UserError."""
    try:
        from pyarrow import ArrowInvalid
        from pyarrow import parquet as arrow
    except ImportError:
        raise UserError(f"{path} needs pyarrow: pip install 'dlion-mpi[parquet]'") from None
    try:
        return arrow.ParquetFile(path, memory_map=True)
    except (ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): write it again") from error


def _array(column: Any, name: str, path: str) -> Any:
    """A column as an array, (rows,) or (rows, length). Raises UserError for values that are no numbers."""
    from pyarrow import types

    values, shape = column.combine_chunks(), [len(column)]
    while types.is_list(values.type) or types.is_large_list(values.type) or types.is_fixed_size_list(values.type):
        _check_filled(values, name, path)
        flat = values.flatten()
        is_fixed = types.is_fixed_size_list(values.type)
        lengths = [values.type.list_size] if is_fixed else values.value_lengths().unique().to_pylist()
        if len(lengths) != 1:
            raise UserError(f"{path}: the column {name} has lists of different lengths: make all equally long")
        values, shape = flat, [*shape, lengths[0]]
    _check_filled(values, name, path)
    kind = values.type
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
        raise UserError(f"{path}: the column {name} is {kind}: store numbers")
    return values.to_numpy(zero_copy_only=False).reshape(shape)


def _check_filled(values: Any, name: str, path: str) -> None:
    if values.null_count:
        raise UserError(
            f"{path}: the column {name} has {values.null_count} empty values: fill them, or drop those rows"
        )
