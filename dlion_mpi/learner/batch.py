"""Rows as Keras takes them: a nested structure of arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import optree

RowNumbers = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """Rows to compute on, as Keras takes them.

    Each part is an array (b, ...) or a nested structure (tuple, list, dict) of such arrays. ``y`` is None if there are
    no targets, ``sample_weight`` if all rows weigh the same.
    """

    x: Any
    y: Any = None
    sample_weight: Any = None

    @property
    def rows(self) -> int:
        """Number of rows (b)."""
        return len(optree.tree_leaves(self.x)[0])

    def part(self, start: int, stop: int) -> Batch:
        """The rows from ``start`` up to ``stop``."""
        return self.map(lambda array: array[start:stop])

    def chosen(self, rows: RowNumbers) -> Batch:
        """The rows of these numbers, a copy."""
        return self.map(lambda array: array[rows])

    def map(self, function: Callable[[Any], Any]) -> Batch:
        """The same structure with the result of ``function`` in place of every array."""
        structure: Any = self
        mapped: Any = optree.tree_map(function, structure)
        return Batch(*mapped)

    def paths(self) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """Every array after its place: the position of the part in the batch, then keys inside it."""
        structure: Any = self
        found: Any = optree.tree_flatten_with_path(structure)
        return zip(found[0], found[1], strict=True)

    def named(self, suffix: str = "") -> dict[str, Any]:
        """Every array by its place, such as ``x``, ``x['age']`` or ``y[0]``; with a ``suffix``, ``x_train['age']``."""
        return {_place(path, suffix): array for path, array in self.paths()}

    def kinds(self) -> dict[str, str]:
        """Shape of a row and type of every array, by its place."""
        return {place: f"{array.shape[1:]} {array.dtype}" for place, array in self.named().items()}

    def kind(self) -> str:
        """Structure, shapes of a row and types, for people and to compare."""
        return ", ".join(f"{place} {kind}" for place, kind in self.kinds().items())


def _place(path: tuple[Any, ...], suffix: str) -> str:
    """``(0, 'age')`` -> ``x['age']``; the first is the position in a `Batch`."""
    return Batch._fields[path[0]] + suffix + "".join(f"[{key!r}]" for key in path[1:])


def as_float32(leaf: Any) -> npt.NDArray[Any]:
    """An array as a model takes it: float64 as float32, as Keras does it."""
    array = np.asarray(leaf)
    return array.astype(np.float32) if array.dtype == np.float64 else array


def joined(batches: Sequence[Batch]) -> Batch:
    """The rows of all batches, one after the other. Raises ValueError unless they have one structure and row shape."""
    if len(batches) == 1:
        return batches[0]
    structures: Sequence[Any] = batches
    result: Any = optree.tree_map(lambda *arrays: np.concatenate(arrays), *structures)
    return Batch(*result)
