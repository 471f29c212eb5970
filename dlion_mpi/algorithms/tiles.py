"""The tiles of a model's matrices, and the largest entries of each. Pure numpy."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dlion_mpi.vector.layout import Indices, Layout, Vector

SIDE = 64
"""Rows and columns of a whole tile."""
Places = npt.NDArray[np.intp]


class Tiles:
    """Cut the variables of a layout into tiles of 64 x 64 entries; those at the borders are smaller.

    A variable is a matrix, its last dimension as columns. A vector is cut into rows of ``row`` entries. Tiles of equal
    shape form a group: ``groups`` has their places in the flat vector, (tiles, rows, columns) each.
    """

    def __init__(self, layout: Layout, row: int = SIDE**2) -> None:
        by_shape: dict[tuple[int, ...], list[Places]] = {}
        for matrix, height, width in _matrices(layout, row):
            for row in range(0, matrix.shape[0], height):
                for column in range(0, matrix.shape[1], width):
                    tile = matrix[row : row + height, column : column + width]
                    by_shape.setdefault(tile.shape, []).append(tile)
        self.groups: list[Places] = [np.stack(tiles) for tiles in by_shape.values()]

    def largest(self, vector: Vector, count: int) -> Indices:
        """Find the ``count`` largest magnitudes of every whole tile, and as large a share of a smaller one.

        ``vector``: (P,) float32. Returns their places, ascending, at least one of each tile.
        """
        found = [np.empty(0, np.intp)]
        for group in self.groups:
            places = group.reshape(len(group), -1)
            entries = places.shape[1]
            kept = min(entries, math.ceil(count * entries / SIDE**2))
            order = np.argpartition(np.abs(vector[places]), entries - kept, axis=1)[:, entries - kept :]
            found.append(np.take_along_axis(places, order, axis=1).ravel())
        return np.sort(np.concatenate(found)).astype(np.uint32)


def _matrices(layout: Layout, row: int) -> Iterator[tuple[Places, int, int]]:
    """The places of every variable that has entries, as a matrix, and the rows and columns of its whole tiles."""
    for shape, start, stop in zip(layout.shapes, layout.starts, layout.starts[1:], strict=False):
        if stop > start:
            places = np.arange(start, stop, dtype=np.intp)
            if len(shape) > 1:
                yield places.reshape(-1, shape[-1]), SIDE, SIDE
            else:
                yield places.reshape(1, -1), 1, row
