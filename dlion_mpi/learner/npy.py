"""Data in a folder of NumPy files, which are mapped into memory and never read as a whole.

The files are `x_train.npy`, `y_train.npy`, `sample_weight_train.npy`, `group_train.npy`, `x_test.npy`, `y_test.npy` and
`sample_weight_test.npy`. Several inputs are `x_train.NAME.npy` for each name.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from dlion_mpi.errors import UserError
from dlion_mpi.learner.batch import Batch, RowNumbers
from dlion_mpi.learner.source import Source, check_finite, checked, converted, first_line, opened, structure


def open_folder(path: str, name: str) -> Source:
    """The data set in this folder, under this name. Raises UserError."""
    files = sorted(file for file in os.listdir(path) if file.endswith(".npy"))
    arrays = {file.removesuffix(".npy"): _mapped(os.path.join(path, file)) for file in files}

    def part(suffix: str) -> Batch:
        found = (_part(arrays, f"{field}{suffix}", path) for field in Batch._fields)
        return checked(Batch(*found), path, suffix)

    train = part("_train")
    test = part("_test") if any(key.startswith("x_test") for key in arrays) else None
    return opened(
        name,
        path,
        (train, _reader(train, path, "_train")),
        None if test is None else (test, _reader(test, path, "_test")),
        groups=arrays.get("group_train"),
    )


def _mapped(path: str) -> Any:
    """The array of a file. Raises UserError for a file that is damaged, or has Python objects."""
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): write it again with numpy.save") from error


def _part(arrays: dict[str, Any], field: str, path: str) -> Any:
    """The array ``FIELD``, or the structure of all ``FIELD.NAME``; None if there is none. Raises UserError for both."""
    named = {key.removeprefix(f"{field}."): array for key, array in arrays.items() if key.startswith(f"{field}.")}
    if named and field in arrays:
        raise UserError(f"{path} has both {field}.npy and {field}.NAME.npy: keep one of them")
    return structure(named) if named else arrays.get(field)


def _reader(part: Batch, path: str, suffix: str) -> Any:
    """A function that reads rows of the training or test part."""

    def read(rows: RowNumbers) -> Batch:
        batch = part.map(lambda array: array[rows])
        for place, array in batch.named(suffix).items():
            check_finite(array, path, place, rows)
        return converted(batch)

    return read
