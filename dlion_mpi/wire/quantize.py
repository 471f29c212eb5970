"""Values of few bits: a step size for each block of values, and a code of 1, 2, 4 or 8 bits for each value.

A value v becomes ``(code + 1/2) step`` with ``code = floor(v / step)``, limited to the codes of its bits. So one bit is
a sign, and the step is twice the mean magnitude of the block, which leaves the smallest squared error behind. The error
stays with the sender (`algorithms.error_feedback`).
Source: Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014; steps for 2 and 4 bits between those of Max
(1960) for normal values and those for Laplace's distribution.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from dlion_mpi.vector.layout import Vector

BITS = {"int8": 8, "int4": 4, "int2": 2, "sign": 1}
"""Bits of a code, by value type."""
BLOCK = 1024
"""Values that share a step."""
PER_MAGNITUDE = {1: 2.0, 2: 1.4, 4: 0.56}
"""Step per mean magnitude, by bits. With 8 bits the largest value decides instead."""

Bytes = npt.NDArray[np.uint8]


def stream_bytes(count: int, bits: int) -> int:
    """Bytes of ``count`` values: the steps as float32, then the codes."""
    return 4 * -(-count // BLOCK) + -(-count * bits // 8)


def write(values: Vector, out: Bytes, bits: int) -> None:
    """Write ``values`` (K,) as steps and codes into ``out``, of `stream_bytes`."""
    with np.errstate(divide="ignore", invalid="ignore"):  # values that are not finite give such a step
        steps = _steps(values, bits)
        split = 4 * len(steps)
        out[:split] = steps.view(np.uint8)
        out[split:] = np.packbits(values >= 0, bitorder="little") if bits == 1 else _codes(values, steps, bits)


def read(stream: Bytes, count: int, bits: int) -> Vector:
    """Return the ``count`` values of a stream, (K,) float32. Steps that are not finite give such values."""
    blocks = -(-count // BLOCK)
    steps = np.frombuffer(stream[: 4 * blocks].tobytes(), "<f4")
    values: Vector = _table(bits).take(stream[4 * blocks :], axis=0).reshape(-1)[:count]
    whole = count // BLOCK * BLOCK
    with np.errstate(invalid="ignore"):
        values[:whole].reshape(-1, BLOCK)[...] *= steps[: whole // BLOCK, None]
        values[whole:] *= steps[-1] if blocks else 1
    return values


def _codes(values: Vector, steps: npt.NDArray[np.float32], bits: int) -> Bytes:
    """The codes of values, the first in the lowest bits of a byte."""
    half = 1 << bits - 1
    scaled = values / np.repeat(steps, BLOCK)[: len(values)]
    codes = np.clip(np.nan_to_num(np.floor(scaled, out=scaled), copy=False), -half, half - 1) + half
    packed: Bytes = codes.astype(np.uint8)
    if bits == 8:
        return packed
    per_byte = 8 // bits
    packed = np.append(packed, np.zeros(-len(packed) % per_byte, np.uint8))
    together = packed[::per_byte].copy()
    for place in range(1, per_byte):
        together |= packed[place::per_byte] << bits * place
    return together


def _steps(values: Vector, bits: int) -> npt.NDArray[np.float32]:
    """The step of each block of values, float32."""
    magnitudes = np.abs(values)
    whole = len(values) // BLOCK * BLOCK
    parts: list[Any] = [magnitudes[:whole].reshape(-1, BLOCK)]
    if whole < len(values):
        parts.append(magnitudes[None, whole:])
    if bits == 8:
        steps = [part.max(axis=1).astype(np.float64) / 127.5 for part in parts]
    else:
        steps = [PER_MAGNITUDE[bits] * part.mean(axis=1, dtype=np.float64) for part in parts]
    found = np.concatenate(steps) if len(values) else np.empty(0)
    most = 2 * float(np.finfo(np.float32).max) / (1 << bits)  # so that every code is a finite value
    return np.where(np.isfinite(found), np.minimum(found, most), np.nan).astype("<f4")


@cache
def _table(bits: int) -> npt.NDArray[np.float32]:
    """The values of every byte's codes at a step of 1, (256, values of a byte) float32."""
    codes = np.arange(256, dtype=np.int32)[:, None] >> bits * np.arange(8 // bits) & (1 << bits) - 1
    return (codes - (1 << bits - 1) + 0.5).astype(np.float32)
