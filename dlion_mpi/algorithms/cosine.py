"""The discrete cosine transform of the tiles of a vector. Pure numpy.

Source: Ahmed, Natarajan, Rao, "Discrete Cosine Transform", 1974, in the form that is orthonormal.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from dlion_mpi.algorithms.tiles import Tiles
from dlion_mpi.vector.layout import Vector


class Cosine:
    """Transform every tile separately, rows and columns. A coefficient takes the place of an entry."""

    def __init__(self, tiles: Tiles) -> None:
        self._tiles = tiles

    def transform(self, vector: Vector) -> Vector:
        """The coefficients of a vector, (P,) float32, which have the same energy."""
        coefficients = np.empty_like(vector)
        for places in self._tiles.groups:
            coefficients[places] = basis(places.shape[1]) @ vector[places] @ basis(places.shape[2]).T
        return coefficients

    def inverse(self, coefficients: Vector) -> Vector:
        """The vector that has these coefficients, (P,) float32."""
        vector = np.empty_like(coefficients)
        for places in self._tiles.groups:
            vector[places] = basis(places.shape[1]).T @ coefficients[places] @ basis(places.shape[2])
        return vector


@cache
def basis(size: int) -> npt.NDArray[np.float32]:
    """The orthonormal basis of cosines, one a row, (size, size) float32."""
    rows = np.arange(size)[:, None]
    cosines = np.cos(np.pi * rows * (np.arange(size) + 0.5) / size) * np.sqrt(2 / size)
    cosines[:1] *= np.sqrt(0.5)
    return cosines.astype(np.float32)
