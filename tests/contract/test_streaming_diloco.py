"""Streaming DiLoCo: the schedule of fragments, overlap and mixing, against a calculation by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion_mpi.algorithms.outer import fragments, nesterov
from dlion_mpi.errors import UserError
from dlion_mpi.strategies.streaming_diloco import StreamingDiloco
from dlion_mpi.strategies.types import Inbox
from dlion_mpi.vector.layout import Layout
from tests.contract.exchanging import Exchanging, drawn

LAYOUT = Layout.of([(3, 2), (6,), (2,), (4,), (6,)])
PARTS = [slice(0, 6), slice(6, 12), slice(12, 18), slice(18, 24)]


@pytest.mark.parametrize(("h", "tau"), [(8, 1), (8, 3), (4, 2), (6, 6), (2, 1), (1, 1)])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_it_is_what_the_formulas_say(h: int, tau: int, alpha: float) -> None:
    """In float64: what is sent before step t is of the weights of then, and applied after step t + tau - 1."""
    n, eta, mu = 3, 0.7, 0.9
    workers = Exchanging(
        "streaming-diloco", n, LAYOUT, start=1.0, h=h, fragments=4, overlap=tau, alpha=alpha, value_type="float32"
    )
    w, theta, m = np.ones((n, 24)), np.ones(24), np.zeros(24)
    in_flight: dict[int, list[tuple[slice, np.ndarray]]] = {}
    for t in range(3 * h + 2):
        for p, part in enumerate(PARTS):
            if t > 0 and t % h == p * h // 4:
                in_flight.setdefault(t + tau - 1, []).append((part, np.mean(theta[part] - w[:, part], axis=0)))
        movements = drawn(t, n, 24)
        workers.advance(movements)
        w += movements
        for part, moved in in_flight.pop(t, []):
            m[part] = mu * m[part] + moved
            theta[part] -= eta * (moved + mu * m[part])
            w[:, part] = alpha * w[:, part] + (1 - alpha) * theta[part]
        for k in range(n):
            np.testing.assert_allclose(workers.weights[k], w[k], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(workers.states[k].anchor, theta, rtol=1e-4, atol=1e-4)
            assert workers.states[k].anchor.tobytes() == workers.states[0].anchor.tobytes()


def test_fragments_are_sent_in_turn_at_even_distances_with_four_bits() -> None:
    workers = Exchanging("streaming-diloco", 2, LAYOUT, h=8, fragments=4)
    sent = []
    for step in range(17):
        workers.advance(drawn(step, 2, 24))
        for message in workers.sent[0].values():
            assert message.entries is not None
            assert message.value_type == "int4"
            sent.append((step, int(message.entries.indices[0]) // 6, len(message.entries)))  # type: ignore[index]
    assert sent == [(2, 1, 6), (4, 2, 6), (6, 3, 6), (8, 0, 6), (10, 1, 6), (12, 2, 6), (14, 3, 6), (16, 0, 6)]


def test_the_sender_applies_what_the_others_decode() -> None:
    """Values of 4 bits are rounded; the anchors are the same bits everywhere nevertheless."""
    workers = Exchanging("streaming-diloco", 3, LAYOUT, h=4, fragments=2, overlap=2)
    for step in range(20):
        workers.advance(drawn(step, 3, 24))
    assert len({state.anchor.tobytes() for state in workers.states}) == 1
    assert len({weights.tobytes() for weights in workers.weights}) == 3


def test_a_worker_waits_only_where_a_fragment_is_applied() -> None:
    workers = Exchanging("streaming-diloco", 2, LAYOUT, h=8, fragments=2, overlap=3)
    strategy, state = workers.strategies[0], workers.states[0]
    # sent before steps 4, 8, 12, ...; applied after steps 6, 10, 14, ...
    assert [step for step in range(12) if not strategy.may_advance(state, step, Inbox({1: 3}))] == [6, 10]
    assert [step for step in range(12) if not strategy.may_advance(state, step, Inbox({1: 4}))] == [10]


def test_a_message_is_sent_once_though_the_loop_asks_again() -> None:
    workers = Exchanging("streaming-diloco", 2, LAYOUT, h=2, fragments=1)
    for step in range(2):
        workers.advance(drawn(step, 2, 24))
    strategy, state = workers.strategies[0], workers.states[0]
    first = strategy.before_compute(state, 2, workers.weights[0].copy, {})
    kept = state.arrived.vectors[0].copy()
    assert first == {}, "there is no link"
    strategy.before_compute(state, 2, workers.weights[0].copy, {})
    np.testing.assert_array_equal(state.arrived.vectors[0], kept)


@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=8), count=st.integers(1, 10))
def test_fragments_are_whole_variables_and_all_of_them(sizes: list[int], count: int) -> None:
    layout = Layout.of([(size,) for size in sizes])
    found = fragments(layout, count)
    assert len(found) <= count
    assert [part.start for part in found[1:]] == [part.stop for part in found[:-1]]
    assert sum(part.stop - part.start for part in found) == layout.size
    assert {part.start for part in found} <= set(layout.starts)


def test_equal_variables_make_equal_fragments() -> None:
    assert fragments(LAYOUT, 4) == PARTS
    assert fragments(Layout.of([(2,)] * 6), 3) == [slice(0, 4), slice(4, 8), slice(8, 12)]


def test_nesterov_by_hand() -> None:
    anchor, momentum = np.array([8], np.float32), np.array([4], np.float32)
    nesterov(anchor, momentum, np.array([2], np.float32), learning_rate=0.5, decay=0.5)
    assert (anchor[0], momentum[0]) == (8 - 0.5 * (2 + 0.5 * 4), 4)


def test_a_resumed_worker_continues_with_the_same_bits() -> None:
    options: dict[str, Any] = {"h": 4, "fragments": 2, "overlap": 3}
    whole = Exchanging("streaming-diloco", 3, LAYOUT, **options)
    for step in range(6):  # a fragment is in flight
        whole.advance(drawn(step, 3, 24))
    again = whole.resumed(**options)
    kept = whole.strategies[0].to_arrays(whole.states[0]).keys()
    assert kept == {"anchor", "momentum", "posted", "arrived/0", "arrived/1", "arrived/2"}
    for step in range(6):
        for workers in (whole, again):
            workers.advance(drawn(50 + step, 3, 24))
        assert whole.weights[1].tobytes() == again.weights[1].tobytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"overlap": 0}, "--streaming-diloco.overlap 0: must be at least 1"),
        ({"h": 4, "overlap": 5}, "--streaming-diloco.overlap 5: must be at most --streaming-diloco.h 4"),
        ({"alpha": 1}, "--streaming-diloco.alpha 1: must be in "),
        ({"fragments": 0}, "--streaming-diloco.fragments 0: must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        StreamingDiloco(**options)
