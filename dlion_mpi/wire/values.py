"""Values on the wire: float32, float16, bfloat16, or of few bits."""

from __future__ import annotations

import numpy as np

from dlion_mpi.vector.layout import Entries, Vector, blocks
from dlion_mpi.wire import quantize
from dlion_mpi.wire.format import BLOCK, VALUE_DTYPE, Bytes, ValueType, values_bytes
from dlion_mpi.wire.quantize import BITS

LARGEST: dict[ValueType, float] = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38}


def rounded(values: Vector, value_type: ValueType) -> Vector:
    """Return the float32 values that the receiver decodes, bit for bit: ``values`` itself for float32.

    The 16-bit types round to nearest, ties to even. Finite values beyond a type's range become its largest number.
    Values of few bits are off by up to a step (`wire/quantize.py`). Values that are not finite become NaN or infinite,
    which ``decode`` rejects.
    """
    if value_type == "float32":
        return values
    stream = np.empty(values_bytes(len(values), value_type), np.uint8)
    to_wire(values, stream, value_type)
    return from_wire(stream, len(values), value_type, copy=True)


def rounded_entries(entries: Entries, value_type: ValueType) -> Entries:
    """Return the entries as the receiver decodes them, whichever way they are sent; ``entries`` itself for float32."""
    if value_type not in BITS:
        values = rounded(entries.values, value_type)
        return entries if values is entries.values else Entries(entries.size, values, entries.indices)
    if entries.stream is not None:
        return entries
    stream = np.empty(values_bytes(len(entries), value_type), np.uint8)
    to_wire(entries.values, stream, value_type)
    return Entries(entries.size, from_wire(stream, len(entries), value_type, copy=True), entries.indices, stream)


def to_wire(values: Vector, stream: Bytes, value_type: ValueType) -> None:
    """Write ``values`` (K,) into ``stream``, of `values_bytes`."""
    if value_type in BITS:
        quantize.write(values, stream, BITS[value_type])
        return
    out = stream.view(VALUE_DTYPE[value_type])
    if value_type == "float32":
        out[:] = values
        return
    values = _saturated(values, LARGEST[value_type])
    if value_type == "float16":
        out[:] = values
        return
    bits = values.view(np.uint32)
    for block in blocks(slice(0, len(values)), BLOCK):
        half = bits[block] >> 16
        half &= 1  # ties to even
        half += 0x7FFF
        half += bits[block]
        half >>= 16
        out[block] = half


def from_wire(stream: Bytes, count: int, value_type: ValueType, copy: bool) -> Vector:
    """Return the ``count`` float32 values of a stream. Without ``copy`` they may lie in it."""
    if value_type in BITS:
        return quantize.read(stream, count, BITS[value_type])
    slots = stream.view(VALUE_DTYPE[value_type])
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
