"""SparseLoCo: local steps, tiles, 2-bit messages and error feedback, against a calculation by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dlion_mpi.algorithms.tiles import Tiles
from dlion_mpi.errors import UserError
from dlion_mpi.strategies.sparseloco import SparseLoco
from dlion_mpi.strategies.types import Inbox
from dlion_mpi.vector.layout import Layout
from dlion_mpi.wire import HEADER_BYTES
from tests.contract.exchanging import Exchanging, drawn

LAYOUT = Layout.of([(4, 5), (6,), ()])
LARGE = Layout.of([(256, 256), (64, 128)])


def test_workers_apply_their_own_steps_until_the_outer_one() -> None:
    workers = Exchanging("sparseloco", 2, LAYOUT, start=8.0, h=3, entries=4096, value_type="float32")
    for own in ((1, 2), (1, 2)):
        workers.advance([np.full(LAYOUT.size, -x) for x in own])
        assert workers.sent == [{}, {}]
    assert [w[0] for w in workers.weights] == [6, 4]
    workers.advance([np.full(LAYOUT.size, -x) for x in (1, 6)])
    # moved: -3 and -10; the mean is -6.5
    for weights in workers.weights:
        np.testing.assert_array_equal(weights, 8 - 6.5)


def test_an_outer_step_is_what_the_formulas_say() -> None:
    """In float64, with the largest 5 of the 20 entries of the first variable, and 2 of 6, and the scalar."""
    n, beta, h, entries = 3, 0.5, 2, 1024
    workers = Exchanging("sparseloco", n, LAYOUT, h=h, entries=entries, decay=beta, value_type="float32")
    theta, e = np.zeros(LAYOUT.size), np.zeros((n, LAYOUT.size))
    lbs = [8, 16, 8]
    for outer in range(4):
        moved = np.zeros((n, LAYOUT.size))
        for inner in range(h):
            vectors = drawn(10 * outer + inner, n, LAYOUT.size)
            workers.advance(vectors, lbs)
            moved += vectors
        total = np.zeros(LAYOUT.size)
        for k in range(n):
            e[k] = beta * e[k] + lbs[k] / 32 * moved[k]
            for part, count in ((slice(0, 20), 5), (slice(20, 26), 2), (slice(26, 27), 1)):
                places = np.argsort(-np.abs(e[k][part]))[:count] + part.start
                total[places] += e[k][places]
                e[k][places] = 0
        theta += total
        for k in range(n):
            np.testing.assert_allclose(workers.weights[k], theta, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(workers.states[k].error, e[k], rtol=1e-4, atol=1e-6)
            assert workers.weights[k].tobytes() == workers.weights[0].tobytes()


def test_without_decay_nothing_is_lost_by_few_entries_of_two_bits() -> None:
    workers = Exchanging("sparseloco", 3, LARGE, h=2, decay=1.0)
    total = np.zeros(LARGE.size)
    for step in range(8):
        vectors = drawn(step, 3, LARGE.size)
        workers.advance(vectors)
        total += np.mean(vectors, axis=0)
    kept = sum(state.error for state in workers.states)
    assert np.abs(kept).max() > 1
    np.testing.assert_allclose(workers.weights[0] + kept, total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("entries", [32, 64])
def test_a_message_has_two_bits_and_less_than_twelve_for_an_entry(entries: int) -> None:
    workers = Exchanging("sparseloco", 2, LARGE, h=1, entries=entries)
    workers.advance(drawn(1, 2, LARGE.size))
    count = entries * LARGE.size // 4096
    message = workers.sent[0][1]
    assert message.entries is not None
    assert len(message.entries) == count
    bits = 8 * (workers.bytes[0][1] - HEADER_BYTES) / count
    assert 2 + 8 <= bits < 2 + 12
    values = np.unique(np.abs(message.entries.values[:1024]))
    assert len(values) == 2, "two magnitudes and a sign"
    assert values[1] == pytest.approx(3 * values[0])


def test_every_tile_sends_its_largest() -> None:
    """Also one in which all entries are small; the tiles of the second variable are two next to each other."""
    vector = drawn(3, 1, LARGE.size)[0]
    matrix = vector[: 256 * 256].reshape(256, 256)
    matrix[64:128, 192:] *= 1e-4
    chosen = np.zeros(LARGE.size, bool)
    chosen[Tiles(LARGE).largest(vector, 32)] = True
    tiles = [chosen[: 256 * 256].reshape(256, 256)[r : r + 64, c : c + 64] for r in (0, 64) for c in (0, 128, 192)]
    assert [int(tile.sum()) for tile in tiles] == [32] * 6
    small = np.abs(matrix[64:128, 192:])
    assert small[tiles[-1]].min() >= small[~tiles[-1]].max()
    second = chosen[256 * 256 :].reshape(64, 128)
    assert (int(second[:, :64].sum()), int(second[:, 64:].sum())) == (32, 32)


@pytest.mark.parametrize("shape", [(1,), (5000,), (3, 3, 5, 7), (65, 130), (), (0, 4)])
def test_the_tiles_of_any_variable_are_all_of_it_once(shape: tuple[int, ...]) -> None:
    layout = Layout.of([(2, 2), shape, (3,)])
    places = np.concatenate([group.ravel() for group in Tiles(layout).groups])
    np.testing.assert_array_equal(np.sort(places), np.arange(layout.size))
    np.testing.assert_array_equal(Tiles(layout).largest(np.ones(layout.size, np.float32), 4096), np.sort(places))


def test_only_an_outer_step_waits() -> None:
    workers = Exchanging("sparseloco", 2, LAYOUT, h=3)
    strategy, state = workers.strategies[0], workers.states[0]
    behind = Inbox({1: -1})
    assert [strategy.may_advance(state, step, behind) for step in range(6)] == [True, True, False] * 2
    assert strategy.may_advance(state, 2, Inbox({1: 2}))


def test_a_resumed_worker_continues_with_the_same_bits() -> None:
    options: dict[str, Any] = {"h": 3, "entries": 1000}
    whole = Exchanging("sparseloco", 2, LAYOUT, **options)
    for step in range(5):
        whole.advance(drawn(step, 2, LAYOUT.size))
    again = whole.resumed(**options)
    kept = whole.strategies[0].to_arrays(whole.states[0]).keys()
    assert kept == {"anchor", "moved", "error", "samples", "all_samples"}
    for step in range(5):
        for workers in (whole, again):
            workers.advance(drawn(50 + step, 2, LAYOUT.size))
        assert whole.weights[1].tobytes() == again.weights[1].tobytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"h": 0}, "--sparseloco.h 0: must be at least 1"),
        ({"entries": 0}, "--sparseloco.entries 0: must be in 1..4096"),
        ({"decay": 1.5}, "--sparseloco.decay 1.5: must be in "),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        SparseLoco(**options)
