"""Data by path: a file of HDF5 or Parquet, or a folder of Parquet or NumPy files."""

from __future__ import annotations

import os

from dlion_mpi.errors import UserError
from dlion_mpi.learner import hdf5, npy, parquet
from dlion_mpi.learner.source import Source


def open_path(path: str, name: str) -> Source:
    """The data set at this path, under this name. Raises UserError.

    A folder with `x_train.npy` or `train.parquet`, a file `*.parquet` without test rows, or an HDF5 file.
    """
    if os.path.isdir(path):
        files = os.listdir(path)
        if any(file.startswith("x_train") and file.endswith(".npy") for file in files):
            return npy.open_folder(path, name)
        if any(file.startswith("train") and file.endswith(".parquet") for file in files):
            return parquet.open_folder(path, name)
        raise UserError(f"{path} is a folder without x_train.npy and train.parquet: put data there, or name a file")
    if path.endswith(".parquet"):
        return parquet.open_file(path, name)
    return hdf5.open_file(path, name)


def open_shard(spec: str, rank: int, ranks: int) -> Source:
    """The file or folder of one rank; ``spec`` is a path with ``{rank}`` in it. Raises UserError."""
    path = os.path.expanduser(spec.replace("{rank}", str(rank)))
    if not os.path.exists(path):
        raise UserError(f"shard file {path} is missing: {ranks} ranks need one each, 0 to {ranks - 1}")
    if not os.path.isdir(path) and not path.endswith(".parquet"):
        hdf5.check_ranks(path, ranks)
    return open_path(path, os.path.basename(spec))
