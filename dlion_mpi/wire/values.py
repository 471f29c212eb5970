"""Values on the wire: float32, float16 or bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dlion_mpi.vector.layout import Vector, blocks
from dlion_mpi.wire.format import BLOCK, ValueType, dtype_of

LARGEST: dict[ValueType, float] = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38}


def rounded(values: Vector, value_type: ValueType) -> Vector:
    """Return the float32 values that the receiver decodes, bit for bit: ``values`` itself for float32.

    The 16-bit types round to nearest, ties to even. Finite values beyond a type's range become its largest number.
    Values that are not finite become NaN, which ``decode`` rejects.
    """
    if value_type == "float32":
        return values
    return from_wire(to_wire(values, np.empty(len(values), dtype_of(value_type)), value_type), value_type, copy=True)


def to_wire(values: Vector, out: npt.NDArray[Any], value_type: ValueType) -> npt.NDArray[Any]:
    """Write ``values`` (K,) into ``out`` (K,), which has the dtype of the value type, and return ``out``."""
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
        half &= 1  # ties to even
        half += 0x7FFF
        half += bits[block]
        half >>= 16
        out[block] = half
    return out


def from_wire(slots: npt.NDArray[Any], value_type: ValueType, copy: bool) -> Vector:
    """Return the float32 values of ``slots`` (K,). Without ``copy`` they may be ``slots`` itself."""
    if value_type != "bfloat16":
        return slots.astype(np.float32, copy=copy)
    words = slots.astype(np.uint32)
    words <<= 16
    return words.view(np.float32)


def _saturated(values: Vector, largest: float) -> Vector:
    """Clip finite values to +-largest, and make all others the one NaN that survives rounding."""
    with np.errstate(invalid="ignore"):  # some versions of NumPy warn of a signalling NaN
        if not len(values) or (values.max() <= largest and values.min() >= -largest):
            return values  # NaN fails both comparisons
        return np.where(np.isfinite(values), np.clip(values, -largest, largest), np.float32(np.nan))
