"""Measure the cost of a message: bytes per sent entry, and milliseconds to encode and decode it.

Prints one JSON object. Positions are random and values normally distributed. Each time is the median of the repeats.

    python benchmarks/wire.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from heading import heading

from dlion_mpi import wire
from dlion_mpi.vector.layout import Entries, Vector

SIZES = (1_040_000, 25_000_000)  # the Cipher CNN, and a model of 100 MB
DENSITIES = (0.0001, 0.001, 0.01, 0.1, 0.5, 1.0)
HEADER = wire.Header(kind=wire.Kind.GRADIENT, sender=0, epoch=0, step=0, sequence=0, acknowledged=0)


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """Return the median milliseconds of ``repeats`` calls, after one call to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return round(1e3 * statistics.median(times), 4)


def measured(entries: Entries, value_type: wire.ValueType, out: wire.Bytes, repeats: int) -> dict[str, Any]:
    """Measure the size and times of one message."""
    message = out[: wire.encode(HEADER, entries, out, value_type)]
    return {
        "parameters": entries.size,
        "entries": len(entries),
        "value_type": value_type,
        "encoding": wire.Encoding(int(message[5])).name,
        "message_bytes": len(message),
        "bytes_per_entry": round(len(message) / len(entries), 3),
        "encode_ms": median_ms(lambda: wire.encode(HEADER, entries, out, value_type), repeats),
        "decode_ms": median_ms(lambda: wire.decode(message, size=entries.size), repeats),
        "decode_in_place_ms": median_ms(lambda: wire.decode(message, size=entries.size, copy=False), repeats),
    }


def selections(size: int) -> list[tuple[float, Entries]]:
    """Return nested random selections of each density from one vector."""
    random = np.random.default_rng(1)
    values: Vector = random.standard_normal(size, dtype=np.float32)
    chances = random.random(size, dtype=np.float32)
    chosen = [(density, np.flatnonzero(chances < density).astype(np.uint32)) for density in DENSITIES[:-1]]
    sparse = [(density, Entries(size, values[indices], indices)) for density, indices in chosen]
    return [*sparse, (1.0, Entries(size, values))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the cost of a message; prints JSON.")
    parser.add_argument("--repeats", type=int, default=51, help="per measurement; a tenth above 10 M parameters")
    repeats = parser.parse_args().repeats
    about, results = heading("wire"), []
    for size in SIZES:
        out = np.zeros(wire.capacity_bytes(size), np.uint8)
        for density, entries in selections(size):
            for value_type in wire.VALUE_TYPES:
                times = repeats if size < 10_000_000 else max(1, repeats // 10)
                results.append({"density": density} | measured(entries, value_type, out, times))
    print(json.dumps(about | {"results": results}))


if __name__ == "__main__":
    main()
