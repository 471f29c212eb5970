"""Write messages."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from dlion_mpi.vector.layout import Entries, Indices, Vector, blocks
from dlion_mpi.wire.format import (
    BLOCK,
    CHECKSUM,
    GAP_DTYPE,
    HEADER,
    HEADER_BYTES,
    HEADER_ONLY,
    MAGIC,
    VALUE_DTYPE,
    VALUE_TYPES,
    VERSION,
    Bytes,
    Encoding,
    Header,
    Kind,
    Plan,
    ValueType,
    bitmap_bytes,
    checksum,
    escape_of,
    plan_encoding,
    values_bytes,
)
from dlion_mpi.wire.values import to_wire


def encode(header: Header, entries: Entries | None, out: Bytes, value_type: ValueType = "float32") -> int:
    """Write a message into ``out``, a contiguous uint8 buffer, and return its length in bytes.

    ``entries``: None for the kinds of HEADER_ONLY. Values are rounded to ``value_type``, see `wire.rounded`. A sparse
    GRADIENT that would be no smaller is written DENSE, with zeros for the other entries, which adds up to the same.
    Raises ValueError if ``out`` is too small, a header field is out of range, or the entries do not suit the kind.
    """
    parameters, values, indices = _content(header.kind, entries)
    stored = None if header.kind is Kind.INDICES else value_type
    plan = plan_encoding(indices, parameters, stored)
    total = HEADER_BYTES + plan.payload_bytes
    if len(out) < total:
        raise ValueError(f"a message of {total} bytes does not fit a buffer of {len(out)} bytes")
    count = parameters if plan.encoding is Encoding.DENSE else len(values)
    split = HEADER_BYTES + values_bytes(count, stored)
    if plan.encoding is Encoding.DENSE and indices is not None:
        dtype = VALUE_DTYPE[value_type]
        some = np.empty(len(values), dtype)
        to_wire(values, some.view(np.uint8), value_type)
        slots = out[HEADER_BYTES:split].view(dtype)
        slots.fill(0)
        slots[indices] = some
    elif stored and entries is not None and entries.stream is not None:
        out[HEADER_BYTES:split] = entries.stream
    elif stored:
        to_wire(values, out[HEADER_BYTES:split], value_type)
    _write_indices(plan, indices, parameters, out[split:total])
    _write_header(header, plan, VALUE_TYPES.index(value_type), count, parameters, out)
    CHECKSUM.pack_into(out.data, HEADER.size, checksum(out[:total]))
    return total


def encode_again(header: Header, message: Bytes, out: Bytes) -> int:
    """Write an encoded ``message`` into ``out`` with another ``header`` of the same kind. Returns its length in bytes.

    That is a copy, and cheaper than to encode the entries again.
    """
    out[HEADER_BYTES : len(message)] = message[HEADER_BYTES:]
    _, _, encoding, code, *_, count, parameters, payload_bytes = HEADER.unpack_from(message.data)
    _write_header(header, Plan(Encoding(encoding), payload_bytes), code, count, parameters, out)
    CHECKSUM.pack_into(out.data, HEADER.size, checksum(out[: len(message)]))
    return len(message)


def _content(kind: Kind, entries: Entries | None) -> tuple[int, Vector, Indices | None]:
    """Return the number of parameters, the values and the indices. Raises ValueError if they do not suit the kind."""
    if kind in HEADER_ONLY:
        if entries is not None and len(entries):
            raise ValueError(f"a {kind.name} message carries no entries, got {len(entries)}")
        return 0, np.empty(0, np.float32), None
    if entries is None:
        raise ValueError(f"a {kind.name} message needs entries")
    expected = entries.size if entries.indices is None else len(entries.indices)
    if len(entries) != expected:
        raise ValueError(f"{len(entries)} values for {expected} positions")
    if kind is Kind.WEIGHTS and len(entries) != entries.size:
        raise ValueError(f"a WEIGHTS message carries all {entries.size} entries, got {len(entries)}")
    return entries.size, entries.values, entries.indices


def _write_header(header: Header, plan: Plan, code: int, count: int, parameters: int, out: Bytes) -> None:
    if not (math.isfinite(header.quality) and math.isfinite(header.computed_at)):
        raise ValueError(f"quality and computed_at must be finite: {header}")
    fields = [getattr(header, name) for name in Header.__slots__]
    front = (MAGIC, VERSION, plan.encoding, code)
    try:
        HEADER.pack_into(out.data, 0, *front, *fields, count, parameters, plan.payload_bytes)
    except (struct.error, OverflowError) as error:
        raise ValueError(f"a header field is out of range ({error}): {header}") from error


def _write_indices(plan: Plan, indices: Indices | None, size: int, stream: Bytes) -> None:
    if plan.gaps is not None:
        _write_gaps(plan.gaps, stream.view(GAP_DTYPE[plan.encoding]))
    elif indices is not None and plan.encoding is Encoding.PLAIN:
        stream.view("<u4")[:] = indices
    elif indices is not None and plan.encoding is Encoding.RANGE:
        stream.view("<u4")[:] = indices[0]
    elif indices is not None and plan.encoding is Encoding.BITMAP:
        _write_bitmap(indices, size, stream)


def _write_gaps(gaps: Indices, stream: npt.NDArray[Any]) -> None:
    if len(stream) == len(gaps):
        stream[:] = gaps
        return
    escape = escape_of(stream.dtype)
    escapes = gaps // escape
    stream.fill(escape)
    stream[np.cumsum(escapes + 1, dtype=np.int64) - 1] = gaps - escapes * escape


def _write_bitmap(indices: Indices, size: int, stream: Bytes) -> None:
    scratch = np.empty(min(size, BLOCK), np.uint8)
    start = 0
    for block in blocks(slice(0, size), BLOCK):
        flags = scratch[: block.stop - block.start]
        flags.fill(0)
        stop = int(np.searchsorted(indices, np.uint32(block.stop)))
        flags[indices[start:stop] - block.start] = 1
        stream[block.start // 8 : bitmap_bytes(block.stop)] = np.packbits(flags, bitorder="little")
        start = stop
