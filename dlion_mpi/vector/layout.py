"""One float32 vector for all trainable variables, and the layout of its segments.

All code between the model and the wire works on this vector. Selection, encoding and the weighted update see no
variable, only its segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]
Indices = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Layout:
    """The place of each variable in the flat vector.

    ``shapes``: the variables' shapes in order. ``starts``: (V + 1,) offsets, in entries; variable v is
    ``vector[starts[v]:starts[v + 1]]``.
    """

    shapes: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, shapes: Sequence[Sequence[int]]) -> Layout:
        """The layout of variables with these shapes, one after the other."""
        starts = [0]
        for shape in shapes:
            starts.append(starts[-1] + int(np.prod(shape, dtype=np.int64)))
        return cls(tuple(tuple(int(d) for d in shape) for shape in shapes), tuple(starts))

    @property
    def size(self) -> int:
        """Entries of the flat vector (P)."""
        return self.starts[-1]

    def split(self, vector: Vector) -> list[Vector]:
        """The variables that lie in a flat vector, as views of their shapes."""
        pairs = zip(self.starts, self.starts[1:], strict=False)
        return [vector[a:b].reshape(shape) for (a, b), shape in zip(pairs, self.shapes, strict=True)]

    def segments(self) -> Iterator[slice]:
        """The slice of every variable that has entries, in order."""
        for start, stop in zip(self.starts, self.starts[1:], strict=False):
            if stop > start:
                yield slice(start, stop)


@dataclass(frozen=True, slots=True)
class Entries:
    """Some entries of a flat vector of ``size`` entries, or all of them.

    ``values``: (K,) float32. ``indices``: (K,) uint32, strictly ascending, or None for all entries (K = size).
    ``stream``: the values as `wire` writes them, if it has rounded them to few bits. Rounding them again could change
    them, because the step depends on them.
    """

    size: int
    values: Vector
    indices: Indices | None = None
    stream: npt.NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.values)

    def places(self) -> slice | npt.NDArray[np.intp]:
        """The index of these entries in a vector: a slice where they are successive, which NumPy reads fastest."""
        if self.indices is None:
            return slice(None)
        if len(self) and int(self.indices[-1]) - int(self.indices[0]) == len(self) - 1:
            return slice(int(self.indices[0]), int(self.indices[-1]) + 1)
        return self.indices.astype(np.intp)  # NumPy reads and writes through these much faster

    def add_to(self, vector: Vector, scale: float) -> None:
        """``vector[indices] += scale * values``, in place; (P,) float32."""
        scaled = self.values if scale == 1.0 else self.values * np.float32(scale)
        places = self.places()
        if isinstance(places, slice):
            vector[places] += scaled
        else:
            vector[places] = vector.take(places) + scaled  # indices are unique, so no np.add.at is needed


def blocks(segment: slice, most: int) -> list[slice]:
    """Cut a segment into slices of at most ``most`` entries."""
    return [slice(k, min(k + most, segment.stop)) for k in range(segment.start, segment.stop, most)]
