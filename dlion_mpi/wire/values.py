"""Values on the wire: float32, float16 or bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dlion_mpi.vector.layout import Vector, blocks
from dlion_mpi.wire.format import (
    BLOCK,
    LARGEST,
    ValueType,
    dtype_of,
)


def rounded(values: Vector, value_type: ValueType) -> Vector:
    """The float32 values the receiver will see, bit for bit; ``values`` itself for float32, else a new array.

    16-bit types round to nearest, ties to even. Finite values beyond the type's range saturate at its largest
    number instead of overflowing. What is not finite becomes NaN, which ``decode`` refuses.
    """
    if value_type == "float32":
        return values
    halves = np.empty(len(values), dtype_of(value_type))
    return from_wire(to_wire(values, halves, value_type), value_type, copy=True)


def to_wire(values: Vector, out: npt.NDArray[Any], value_type: ValueType) -> npt.NDArray[Any]:
    """Write ``values`` into ``out``, which has the value type's dtype; returns ``out``."""
    if value_type == "float32":
        out[:] = values
        return out
    values = _saturated(values, LARGEST[value_type])
    if value_type == "float16":
        out[:] = values
        return out
    bits = values.view(np.uint32)
    for block in blocks(slice(0, len(values)), BLOCK):
        half = bits[block] >> 16
        half &= 1  # ties go to the even neighbour
        half += 0x7FFF
        half += bits[block]
        half >>= 16
        out[block] = half
    return out


def from_wire(slots: npt.NDArray[Any], value_type: ValueType, copy: bool) -> Vector:
    if value_type != "bfloat16":
        return slots.astype(np.float32, copy=copy)
    words = slots.astype(np.uint32)
    words <<= 16
    return words.view(np.float32)


def _saturated(values: Vector, largest: float) -> Vector:
    """``values`` within +-largest; what is not finite becomes the one NaN that survives rounding."""
    with np.errstate(invalid="ignore"):  # a signalling NaN may warn, depending on numpy
        if not len(values) or (values.max() <= largest and values.min() >= -largest):
            return values  # NaN fails both comparisons
        return np.where(np.isfinite(values), np.clip(values, -largest, largest), np.float32(np.nan))
