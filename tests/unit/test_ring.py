"""The ring all-reduce on paper: the sum that all ranks get, and what moves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion_mpi.algorithms.ring import chunk_bounds, chunk_sent, ring_bytes, ring_sum
from dlion_mpi.wire import ValueType, rounded


def drawn(ranks: int, size: int) -> list[np.ndarray]:
    return [np.random.default_rng(k).normal(size=size).astype(np.float32) for k in range(ranks)]


@given(ranks=st.integers(1, 6), size=st.integers(0, 40), value_type=st.sampled_from(["float32", "bfloat16", "float16"]))
def test_the_sum_is_that_of_the_turns_one_by_one(ranks: int, size: int, value_type: ValueType) -> None:
    """All ranks as they are told: send a rounded chunk, add what arrives, then replace chunks by finished ones."""
    vectors, bounds = drawn(ranks, size), chunk_bounds(size, ranks)
    held = [vector.copy() for vector in vectors]
    for turn in range(2 * (ranks - 1)):
        parts = [slice(*bounds[chunk_sent(k, turn, ranks) :][:2]) for k in range(ranks)]
        if turn == ranks - 1:
            for own, part in zip(held, parts, strict=True):
                own[part] = rounded(own[part], value_type)
        sent = [rounded(own[part].copy(), value_type) for own, part in zip(held, parts, strict=True)]
        for k, own in enumerate(held):
            part, arrived = parts[k - 1], sent[k - 1]
            own[part] = own[part] + arrived if turn < ranks - 1 else arrived
    total = ring_sum(vectors, value_type)
    for own in held if ranks > 1 else []:
        np.testing.assert_array_equal(own, total)


def test_each_addition_is_of_float32_and_each_transfer_of_16_bits() -> None:
    """bfloat16 has 8 bits: 257 becomes 256 on its way, but what it is added to is not rounded before."""
    vectors = [np.full(2, value, np.float32) for value in (257, 1.5)]
    # chunk 0 begins at rank 0: 256 + 1.5 becomes 258; chunk 1 at rank 1: 1.5 + 257 = 258.5 becomes 258
    np.testing.assert_array_equal(ring_sum(vectors, "bfloat16"), [258, 258])
    np.testing.assert_array_equal(ring_sum(vectors, "float32"), [258.5, 258.5])


@pytest.mark.parametrize(("value_type", "size"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_narrow_values_halve_the_bytes(value_type: ValueType, size: int) -> None:
    assert ring_bytes(300, 1, 3, value_type) == (4 * 100 * size, 4 * 100 * size)
