"""The metrics files in the folder of a run: their names, and reading one that may be incomplete."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from dlion_mpi.errors import UserError

Array = npt.NDArray[Any]

FORMAT = 1
"""Version of the file format."""
FILE_NAME = re.compile(r"metrics-(\d{5,})(?:\.(\d+))?\.h5")
"""Rank and part. The files of a run that was never resumed have no part."""
UNREADABLE = (OSError, RuntimeError, KeyError, ValueError)
"""What h5py raises for a file that is truncated, is just being written, or is not HDF5."""
_GIVE = "give the --out folder of a run"
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_WRITER = 4
"""The bit of a superblock of version 3 that a SWMR writer sets when it opens the file and clears when it closes it."""
_ATTEMPTS = 4
"""A file that is shorter than it should be may be growing at this moment."""


def file_name(rank: int, part: int = 0) -> str:
    """Name of the metrics file of a rank. ``part``: how often the run had been resumed."""
    return f"metrics-{rank:05d}.{part}.h5" if part else f"metrics-{rank:05d}.h5"


def next_part(folder: Path) -> int:
    """Number of the part after those in the folder; 0 for the first. Raises OSError."""
    matches = [FILE_NAME.fullmatch(path.name) for path in folder.iterdir()]
    return max((int(match[2] or 0) + 1 for match in matches if match), default=0)


def find_files(folder: Path) -> dict[int, dict[int, Path]]:
    """The metrics files of a folder by rank and part. Raises UserError if there are none."""
    if not folder.exists():
        raise UserError(f"{folder}: no such folder; {_GIVE}")
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; {_GIVE}")
    try:
        matches = {path: FILE_NAME.fullmatch(path.name) for path in folder.iterdir()}
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
    found: dict[int, dict[int, Path]] = {}
    for path, match in matches.items():
        if match:
            found.setdefault(int(match[1]), {})[int(match[2] or 0)] = path
    if not found:
        inside = sorted(path.parent.name for path in folder.glob("*/metrics-*.h5"))
        hint = f"but there is one in {folder / inside[0]}" if inside else _GIVE
        raise UserError(f"{folder}: holds no run (no metrics-00000.h5), {hint}")
    return found


def open_file(path: Path) -> h5py.File:
    """Open a metrics file, also while it is written or after its writer was killed. Raises OSError."""
    for _ in range(_ATTEMPTS):
        written, size_bytes = _superblock(path)
        if path.stat().st_size >= size_bytes:
            return h5py.File(path, "r", swmr=written, locking="best-effort")
        if not written:
            break
        time.sleep(0.05)
    raise OSError("truncated")


def is_closed(path: Path) -> bool:
    """Whether the writer has closed the file, at the end of the run or before. Raises OSError."""
    written, _ = _superblock(path)
    return not written


def _superblock(path: Path) -> tuple[bool, int]:
    """Whether a SWMR writer has the file open or was killed, and how many bytes the file must have."""
    with open(path, "rb") as file:
        head = file.read(36)
    if len(head) < 36 or not head.startswith(_SIGNATURE) or head[8] != 3:
        return False, 0
    return bool(head[11] & _WRITER), int.from_bytes(head[28:36], "little")


def attributes_of(file: h5py.File) -> dict[str, Any]:
    """The attributes as text and Python numbers."""
    return {name: _plain(value) for name, value in file.attrs.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.item() if isinstance(value, np.generic) else value


def read_column(file: h5py.File, name: str, dimensions: int, rows: slice = slice(None)) -> Array | None:
    """Rows of a data set, as int64 or floating point; None if it is missing or is something else.

    Also None for a ``time_s`` with a value that is not finite: its rows cannot be placed in time.
    """
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset) or dataset.ndim != dimensions or dataset.dtype.kind not in "iuf":
        return None
    values = dataset[rows] if dimensions else dataset[()]
    if dataset.dtype.kind in "iu":
        return np.asarray(values).astype(np.int64)
    if name.endswith("/time_s") and not np.isfinite(values).all():
        return None
    return np.asarray(values)


def last_rows(file: h5py.File, columns: Sequence[str], count: int) -> slice:
    """The last ``count`` rows that all these columns have."""
    found = [file.get(name) for name in columns]
    length = min((len(column) for column in found if isinstance(column, h5py.Dataset) and column.ndim), default=0)
    return slice(max(0, length - count), length)


def fitted(values: Array | None, shape: tuple[int, ...]) -> Array:
    """The values in this shape: the first rows, or NaN for rows and columns that are missing."""
    if values is None or values.shape[1:] != shape[1:]:
        return np.broadcast_to(np.float64(np.nan), shape)  # takes no memory
    if len(values) >= shape[0]:
        return values[: shape[0]]
    longer = np.full(shape, np.nan)
    longer[: len(values)] = values
    return longer


def reason_of(error: Exception) -> str:
    """Say in a few words why a file cannot be read."""
    text = getattr(error, "strerror", None) or str(error)
    if "lock" in text or "already open" in text:
        return "its run is just beginning, or another program has it open"
    if "signature" in text or "truncated" in text:
        return "it is not an HDF5 file, or is truncated"
    return (text.splitlines() or [type(error).__name__])[0]
