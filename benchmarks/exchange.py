"""Measure the processor time of an exchange: accumulating, selecting, encoding and decoding, for one and many links.

Prints one JSON object; each time is the median over steps on one core. `alike`: all links have equal rates. `slack`:
rates down to half of the widest, and each link gets the widest link's entries (default). `spread`: rates down to a
sixteenth (default). `unlike`: rates down to half, and each link gets what it can carry. `handling`: the costs that the
simulator uses.

    python benchmarks/exchange.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from heading import heading

from dlion_mpi import wire
from dlion_mpi.algorithms.error_feedback import Budget, Residuals, Rules
from dlion_mpi.strategies.dlion import SLACK
from dlion_mpi.vector.layout import Entries, Layout, Vector

SIZES = (1_040_000, 25_000_000)  # the Cipher CNN, and a model of 100 MB
SHARES = (0.0134, 0.08)  # message size over dense gradient: about 1 % and 6 % of the entries
LINKS = (1, 5, 16)
WIDTHS = (("alike", 1.0, 1.0), ("slack", 0.5, SLACK), ("spread", 1 / 16, SLACK), ("unlike", 0.5, 1.0))
"""Name, rate of the narrowest link over the widest, and the factor by which a link may exceed its budget to be served
together with a wider one."""
HEADER = wire.Header(kind=wire.Kind.GRADIENT, sender=0, epoch=0, step=0, sequence=0, acknowledged=0)


def gradients(size: int) -> list[Vector]:
    """Return three gradients whose entries differ widely in scale, like those of a network."""
    random = np.random.default_rng(1)
    scale = np.exp(random.standard_normal(size, dtype=np.float32))
    return [random.standard_normal(size, dtype=np.float32) * scale for _ in range(3)]


class Sending(NamedTuple):
    """Milliseconds per step."""

    whole: float
    """Accumulating a gradient, and selecting and encoding for all links."""
    select_encode: float
    numpy_max: float
    """`numpy.max` of the same gradient."""


def sending_ms(own: Sequence[Vector], shares: Sequence[float], slack: float, steps: int) -> Sending:
    """Measure the cost of sending over links with these shares. Returns medians."""
    size = len(own[0])
    unsent = Residuals(Layout.of([(size // 100,), (size - size // 100,)]), Rules(None, 0.85, "float32"))
    buffers = [np.zeros(wire.capacity_bytes(size), np.uint8) for _ in shares]
    times = []
    for step in range(steps):
        gradient = own[step % len(own)]
        start = time.perf_counter()
        unsent.add(gradient)
        remembered = time.perf_counter()
        encoded: dict[int, wire.Bytes] = {}
        budgets = [4 * size * share for share in shares]
        choices = unsent.take({link: Budget(budget, slack * budget) for link, budget in enumerate(budgets)})
        for buffer, choice in zip(buffers, choices.values(), strict=True):
            if id(choice.entries) in encoded:
                wire.encode_again(HEADER, encoded[id(choice.entries)], buffer)
            else:
                encoded[id(choice.entries)] = buffer[: wire.encode(HEADER, choice.entries, buffer)]
        encoded_at = time.perf_counter()
        gradient.max()
        times.append((encoded_at - start, encoded_at - remembered, time.perf_counter() - encoded_at))
    return Sending(*(1e3 * statistics.median(column) for column in zip(*times[2:], strict=True)))


def receiving_ms(entries: Entries, steps: int) -> float:
    """Measure the milliseconds to decode a message and add it to a vector."""
    buffer = np.zeros(wire.capacity_bytes(entries.size), np.uint8)
    message = buffer[: wire.encode(HEADER, entries, buffer)]
    vector = np.zeros(entries.size, np.float32)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        wire.decode(message, size=entries.size).entries.add_to(vector, 0.5)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def measured(size: int, share: float, steps: int) -> dict[str, Any]:
    """Measure everything for one size and share."""
    own = gradients(size)
    result: dict[str, Any] = {"parameters": size, "share": share}
    for name, least, slack in WIDTHS:
        for links in LINKS:
            shares = [share * float(part) for part in np.geomspace(1.0, least, links)]
            ms = sending_ms(own, shares, slack, steps)
            result[f"{name}_{links}_ms"] = round(ms.whole, 3)
            result[f"{name}_{links}_over_one"] = round(ms.whole / result[f"{name}_1_ms"], 2)
            if links == 1:
                result["over_numpy_max"] = round(ms.whole / ms.numpy_max, 1)
                result["select_encode_over_numpy_max"] = round(ms.select_encode / ms.numpy_max, 1)
    count = int(size * share / 1.3)
    indices = np.sort(np.random.default_rng(2).choice(size, count, replace=False)).astype(np.uint32)
    receive_ms = receiving_ms(Entries(size, own[0][indices], indices), steps)
    further_ms = (result["unlike_5_ms"] - result["unlike_1_ms"]) / 4
    result["handling"] = {
        "select_ns_per_parameter": round(1e6 * (result["unlike_1_ms"] - further_ms) / size, 2),
        "send_ns_per_entry": round(1e6 * further_ms / count, 1),
        "receive_ns_per_entry": round(1e6 * receive_ms / count, 1),
        "dense_ns_per_entry": round(1e6 * receiving_ms(Entries(size, own[0]), steps) / size, 2),
    }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the processor time of an exchange; prints JSON.")
    parser.add_argument("--steps", type=int, default=30, help="repeats per measurement; a third above 10 M parameters")
    steps = parser.parse_args().steps
    about = heading("exchange")
    results = [measured(size, share, steps if size < 1e7 else steps // 3) for size in SIZES for share in SHARES]
    print(json.dumps(about | {"results": results}))


if __name__ == "__main__":
    main()
