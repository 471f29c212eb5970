"""Messages as bytes. `wire.format` has the layout."""

from __future__ import annotations

from dlion_mpi.wire.decode import decode
from dlion_mpi.wire.encode import encode, encode_again
from dlion_mpi.wire.format import (
    HEADER_BYTES,
    VALUE_TYPES,
    Bytes,
    Encoding,
    Header,
    Kind,
    Message,
    ValueType,
    WireError,
    bytes_for_count,
    capacity_bytes,
    encoded_bytes,
)
from dlion_mpi.wire.values import rounded, rounded_entries

__all__ = [
    "HEADER_BYTES",
    "VALUE_TYPES",
    "Bytes",
    "Encoding",
    "Header",
    "Kind",
    "Message",
    "ValueType",
    "WireError",
    "bytes_for_count",
    "capacity_bytes",
    "decode",
    "encode",
    "encode_again",
    "encoded_bytes",
    "rounded",
    "rounded_entries",
]
