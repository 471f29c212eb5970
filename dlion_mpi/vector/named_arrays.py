"""Named arrays: the state that each part of a worker saves in a checkpoint and restores, checked. Pure NumPy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dlion_mpi.vector.layout import Vector

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
"""Arrays by name; a name may have parts, as in ``statistics/3``."""


class StateError(ValueError):
    """Saved state that does not fit; the message names what was found and what was expected."""


def array(arrays: Mapping[str, Array], name: str, dtype: npt.DTypeLike, *shape: int | None) -> Array:
    """The array of that name, if it has this dtype and shape (None: any length). Raises StateError."""
    found = arrays.get(name)
    if found is None:
        raise StateError(f"{name} is missing")
    fits = len(found.shape) == len(shape) and all(n in (None, m) for m, n in zip(found.shape, shape, strict=True))
    if found.dtype != np.dtype(dtype) or not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise StateError(f"{name} is {found.dtype} {found.shape}, expected {np.dtype(dtype)} ({wanted})")
    return found


def vector(arrays: Mapping[str, Array], name: str, size: int) -> Vector:
    """The (``size``,) float32 array of that name. Raises StateError."""
    return array(arrays, name, np.float32, size)


def integer(arrays: Mapping[str, Array], name: str) -> int:
    """The whole number of that name. Raises StateError."""
    return int(array(arrays, name, np.int64))


def number(arrays: Mapping[str, Array], name: str) -> float:
    """The float64 number of that name. Raises StateError."""
    return float(array(arrays, name, np.float64))


def integers(**values: int) -> Arrays:
    """Whole numbers as arrays."""
    return {name: np.array(value, np.int64) for name, value in values.items()}


def numbers(**values: float) -> Arrays:
    """Numbers as arrays of float64."""
    return {name: np.array(value, np.float64) for name, value in values.items()}


def column(values: Iterable[float]) -> Array:
    """Numbers as one (n,) float64 array."""
    return np.array(list(values), np.float64)


def under(prefix: str, arrays: Mapping[Any, Array]) -> Arrays:
    """The same arrays, named ``prefix/name``."""
    return {f"{prefix}/{name}": value for name, value in arrays.items()}


def part(arrays: Mapping[str, Array], prefix: str) -> Arrays:
    """The inverse of `under`."""
    start = f"{prefix}/"
    return {name.removeprefix(start): value for name, value in arrays.items() if name.startswith(start)}


def by_rank(arrays: Mapping[str, Array], prefix: str, ranks: Iterable[int]) -> Arrays:
    """The arrays of `part`; their names must be ranks. Raises StateError."""
    found = part(arrays, prefix)
    strange = set(found) - {str(rank) for rank in ranks}
    if strange:
        raise StateError(f"{prefix}/{min(strange)} belongs to no rank of this run")
    return found


def vectors_by_rank(arrays: Mapping[str, Array], prefix: str, ranks: Iterable[int], size: int) -> dict[int, Vector]:
    """The (``size``,) float32 arrays of the ranks that have one. Raises StateError."""
    found = by_rank(arrays, prefix, ranks)
    return {int(rank): vector(found, rank, size) for rank in found}


def integers_by_rank(arrays: Mapping[str, Array], prefix: str, ranks: Iterable[int]) -> dict[int, int]:
    """The whole numbers of the ranks that have one. Raises StateError."""
    found = by_rank(arrays, prefix, ranks)
    return {int(rank): integer(found, rank) for rank in found}
