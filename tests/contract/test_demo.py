"""DeMo: a cosine transform of tiles, the largest coefficients, and the sign of the mean, each by its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dlion_mpi.algorithms.cosine import Cosine, basis
from dlion_mpi.algorithms.tiles import Tiles
from dlion_mpi.errors import UserError
from dlion_mpi.strategies.demo import Demo
from dlion_mpi.vector.layout import Layout
from tests.contract.exchanging import Exchanging, drawn

LAYOUT = Layout.of([(70, 20), (130,), (3, 3, 2, 5)])


def cosine_by_definition(matrix: np.ndarray) -> np.ndarray:
    """Sum by sum, in float64."""
    rows, columns = matrix.shape
    result = np.zeros(matrix.shape)
    for p in range(rows):
        for q in range(columns):
            i, j = np.arange(rows)[:, None], np.arange(columns)
            wave = np.cos(np.pi * (2 * i + 1) * p / (2 * rows)) * np.cos(np.pi * (2 * j + 1) * q / (2 * columns))
            scale = np.sqrt((1 if p == 0 else 2) / rows) * np.sqrt((1 if q == 0 else 2) / columns)
            result[p, q] = scale * (matrix * wave).sum()
    return result


def test_a_transform_is_that_of_each_tile() -> None:
    (vector,) = drawn(1, 1, LAYOUT.size)
    found = Cosine(Tiles(LAYOUT, row=64)).transform(vector)
    matrix, coefficients = vector[:1400].reshape(70, 20), found[:1400].reshape(70, 20)
    for part in (slice(0, 64), slice(64, 70)):
        np.testing.assert_allclose(coefficients[part], cosine_by_definition(matrix[part]), rtol=1e-4, atol=1e-5)
    for part in (slice(1400, 1464), slice(1464, 1528), slice(1528, 1530)):
        np.testing.assert_allclose(found[part], cosine_by_definition(vector[None, part])[0], rtol=1e-4, atol=1e-5)
    kernel = vector[1530:].reshape(18, 5)
    np.testing.assert_allclose(found[1530:].reshape(18, 5), cosine_by_definition(kernel), rtol=1e-4, atol=1e-5)


def test_the_inverse_gives_the_vector_back() -> None:
    (vector,) = drawn(2, 1, LAYOUT.size)
    cosine = Cosine(Tiles(LAYOUT))
    np.testing.assert_allclose(cosine.inverse(cosine.transform(vector)), vector, rtol=1e-4, atol=1e-5)
    for size in (1, 2, 64):
        np.testing.assert_allclose(basis(size) @ basis(size).T, np.eye(size), atol=1e-6)


def test_a_step_is_what_the_formulas_say() -> None:
    n, beta = 3, 0.9
    workers = Exchanging("demo", n, LAYOUT, entries=256, decay=beta)
    tiles = Tiles(LAYOUT, row=64)
    cosine, momentum = Cosine(tiles), np.zeros((n, LAYOUT.size), np.float32)
    for step in range(4):
        gradients = drawn(step, n, LAYOUT.size)
        effects = workers.advance(gradients, [8, 16, 8])
        total = np.zeros(LAYOUT.size, np.float32)
        for k in range(n):
            momentum[k] = np.float32(beta) * momentum[k] + np.float32((8, 16, 8)[k] / 32) * gradients[k]
            coefficients = cosine.transform(momentum[k])
            sent = np.zeros(LAYOUT.size, np.float32)
            for group in tiles.groups:
                for tile in group.reshape(len(group), -1):
                    count = -(-256 * len(tile) // 4096)
                    chosen = tile[np.argsort(-np.abs(coefficients[tile]))[:count]]
                    sent[chosen] = coefficients[chosen]
            momentum[k] -= cosine.inverse(sent)
            total += sent
            np.testing.assert_allclose(workers.states[k].momentum, momentum[k], rtol=1e-3, atol=1e-4)
        mean = cosine.inverse(total)
        clear = np.abs(mean) > 1e-4  # where rounding does not decide
        assert clear.mean() > 0.9
        for k in range(n):
            gradient = effects[k].gradient
            assert gradient is not None
            np.testing.assert_array_equal(gradient[clear], np.sign(mean)[clear])
            assert set(np.unique(gradient)) <= {-1.0, 0.0, 1.0}
            assert workers.weights[k].tobytes() == workers.weights[0].tobytes()


@pytest.mark.parametrize("value_type", ["float32", "bfloat16"])
def test_without_decay_what_was_sent_and_what_is_kept_is_what_was_computed(value_type: str) -> None:
    workers = Exchanging("demo", 2, LAYOUT, decay=1.0, value_type=value_type)
    cosine = Cosine(Tiles(LAYOUT, row=64))
    computed, sent = np.zeros(LAYOUT.size), np.zeros(LAYOUT.size)
    for step in range(6):
        gradients = drawn(step, 2, LAYOUT.size)
        workers.advance(gradients)
        computed += gradients[0] / 2
        coefficients = np.zeros(LAYOUT.size, np.float32)
        workers.states[0].sent.add_to(coefficients, 1.0)
        sent += cosine.inverse(coefficients)
    assert np.abs(workers.states[0].momentum).max() > 0.1
    np.testing.assert_allclose(sent + workers.states[0].momentum, computed, rtol=1e-3, atol=1e-4)


def test_a_gradient_of_zeros_moves_nothing() -> None:
    workers = Exchanging("demo", 2, LAYOUT)
    workers.advance([np.zeros(LAYOUT.size, np.float32)] * 2)
    assert not workers.weights[0].any()


def test_a_resumed_worker_continues_with_the_same_bits() -> None:
    whole = Exchanging("demo", 2, LAYOUT)
    for step in range(3):
        whole.advance(drawn(step, 2, LAYOUT.size))
    again = whole.resumed()
    assert whole.strategies[0].to_arrays(whole.states[0]).keys() == {"momentum"}
    for step in range(3):
        for workers in (whole, again):
            workers.advance(drawn(50 + step, 2, LAYOUT.size))
        assert whole.weights[1].tobytes() == again.weights[1].tobytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [({"entries": 0}, "--demo.entries 0: must be in 1..4096"), ({"decay": -1}, "--demo.decay -1: must be in ")],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Demo(**options)
