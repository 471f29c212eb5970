"""Data in HDF5 files: one file for all ranks, or one per rank."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import h5py
import numpy as np

from dlion_mpi.errors import UserError
from dlion_mpi.learner.source import DATASETS, Pixels, Rows, Source, check, first_line, labels, read_rows


def open_file(path: str, name: str) -> Source:
    """The data set in this file, under this name. Raises UserError."""
    with _opened(path) as file:
        parts = {part: file.get(part) for part in DATASETS}
        for part, dataset in parts.items():
            if not isinstance(dataset, h5py.Dataset):
                raise UserError(f"{path} has no dataset {part}: it needs {', '.join(DATASETS)}")
        check(parts, path)
        declared = file.attrs.get("classes", parts["y_train"].attrs.get("classes"))
        y_train, y_test, classes = labels(parts, declared, path)
        x_test = read_rows(parts["x_test"], np.arange(len(y_test)), "x_test", path)

    def read_train(rows: Rows) -> Pixels:
        with _opened(path) as file:
            return read_rows(file["x_train"], rows, "x_train", path)

    return Source(name, path, classes, y_train, x_test, y_test, read_train)


def open_shard(spec: str, rank: int, ranks: int) -> Source:
    """The shard file of one rank; ``spec`` is a path with ``{rank}`` in it. Raises UserError."""
    path = os.path.expanduser(spec.replace("{rank}", str(rank)))
    if not os.path.exists(path):
        raise UserError(f"shard file {path} is missing: {ranks} ranks need one each, 0 to {ranks - 1}")
    with _opened(path) as file:
        written_for = file.attrs.get("ranks", ranks)
    if written_for != ranks:  # fewer ranks would silently train on a part of the data
        raise UserError(f"{path} is one of {written_for} shards: start {written_for} ranks, or split again")
    return open_file(path, os.path.basename(spec))


@contextlib.contextmanager
def _opened(path: str) -> Iterator[h5py.File]:
    """The open file. Raises UserError for a file that HDF5 cannot read."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError) as error:
        if "file signature not found" in str(error):
            raise UserError(f"{path} is not an HDF5 file: write one with {', '.join(DATASETS)}") from error
        reason = first_line(error)
        raise UserError(f"{path} cannot be read ({reason}): if it is damaged, write it again") from error
