"""Outer steps on pseudo-gradients: the momentum, and the fragments of a model that they may be cut into. Pure."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from dlion_mpi.vector.layout import Layout, Vector


def nesterov(anchor: Vector, momentum: Vector, moved: Vector, *, learning_rate: float, decay: float) -> None:
    """``m <- mu m + D``, ``theta <- theta - eta (D + mu m)``, in place.

    ``anchor``: theta. ``momentum``: m. ``moved``: D, the mean pseudo-gradient. (K,) float32 each. ``learning_rate``:
    eta. ``decay``: mu.
    """
    momentum *= np.float32(decay)
    momentum += moved
    anchor -= np.float32(learning_rate) * (moved + np.float32(decay) * momentum)


def fragments(layout: Layout, count: int) -> list[slice]:
    """Cut a layout between variables into at most ``count`` parts, as near to equal sizes as that allows."""
    ideal = [layout.size * k / count for k in range(1, count)]
    borders = {min(layout.starts, key=lambda start: abs(start - border)) for border in ideal}
    bounds = sorted({0, layout.size} | borders)
    return [slice(start, stop) for start, stop in pairwise(bounds)]
