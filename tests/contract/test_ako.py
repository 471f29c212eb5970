"""What makes Ako Ako: every entry reaches every peer once in P steps, and nothing is lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion_mpi.config.options import Config
from dlion_mpi.errors import UserError
from dlion_mpi.strategies.ako import Ako, partitions
from dlion_mpi.strategies.registry import resolve
from dlion_mpi.strategies.types import LinkView, Outgoing, Plan
from dlion_mpi.vector.layout import Vector
from dlion_mpi.wire import HEADER_BYTES, encoded_bytes
from tests.contract.problem import LAYOUT, OPTIMUM, SIZE, arrival, config, gradients, local, trained
from tests.inmemory import Weather
from tests.options import config as options_config

FREE, BUSY = LinkView(True, 1e9), LinkView(False, 1e9)


def start(ranks: int = 3, **options: Any) -> tuple[Any, Any]:
    strategy, resolved = resolve(options_config(strategy="ako", **options))
    return strategy, strategy.start(Plan(config=resolved, rank=0, ranks=tuple(range(ranks)), layout=LAYOUT))


def sent_entries(message: Outgoing) -> tuple[slice, Vector]:
    """Where the message's entries lie, which follow one upon another, and their values."""
    assert message.entries is not None
    assert message.entries.indices is not None
    first, last = (int(message.entries.indices[i]) for i in (0, -1))
    np.testing.assert_array_equal(message.entries.indices, np.arange(first, last + 1))
    return slice(first, last + 1), message.entries.values


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 13, SIZE - 1, SIZE, SIZE + 9])
def test_the_gradient_is_cut_into_p_parts_of_about_equal_size(parts: int) -> None:
    strategy, state = start(partitions=parts)
    seen = []
    for step in range(2 * min(parts, SIZE)):
        messages = strategy.outgoing(state, local(OPTIMUM, step=step), {1: FREE, 2: FREE})
        assert messages[1].entries is messages[2].entries, "the same partition to every peer"
        seen.append(sent_entries(messages[1])[0])
    cycle = seen[: min(parts, SIZE)]
    assert seen == cycle * 2, "partition t mod P at step t"
    assert [i for part in cycle for i in range(part.start, part.stop)] == list(range(SIZE))
    lengths = [part.stop - part.start for part in cycle]
    assert max(lengths) - min(lengths) <= 1


@given(seed=st.integers(0, 1000), parts=st.integers(1, 12), cycles=st.integers(1, 3))
def test_over_p_steps_what_was_sent_is_what_was_computed_bit_for_bit(seed: int, parts: int, cycles: int) -> None:
    """Of any float32: each entry's sum since it was last sent, added up in the order of the steps."""
    strategy, state = start(partitions=parts)
    owed = np.zeros(SIZE, np.float32)
    times_sent = np.zeros(SIZE, int)
    for step, gradient in enumerate(gradients(seed, cycles * parts, whole=False)):
        owed += gradient
        messages = strategy.outgoing(state, local(gradient, step=step), {1: FREE, 2: FREE})
        for message in messages.values():
            part, values = sent_entries(message)
            assert values.tobytes() == owed[part].tobytes()
        owed[part] = 0
        times_sent[part] += 1
        assert state.accumulated.tobytes() == owed.tobytes(), "what is sent is zeroed, what is not is kept"
    assert (times_sent == cycles).all(), "every entry exactly once in P steps"


@given(
    seed=st.integers(0, 1000),
    parts=st.sampled_from([0, 1, 4, 7]),
    offers=st.lists(st.tuples(st.booleans(), st.booleans(), st.floats(0, 400)), min_size=1, max_size=30),
)
def test_a_busy_link_misses_its_turn_and_nothing_is_lost(
    seed: int, parts: int, offers: list[tuple[bool, bool, float]]
) -> None:
    """Whole numbers add up exactly: sent + missed + accumulated == computed, with P fixed or changing."""
    strategy, state = start(partitions=parts)
    sent = {peer: np.zeros(SIZE) for peer in (1, 2)}
    own = gradients(seed, len(offers), whole=True)
    for step, (gradient, (*ready, budget)) in enumerate(zip(own, offers, strict=True)):
        links = {peer: LinkView(free, budget) for peer, free in zip((1, 2), ready, strict=True)}
        messages = strategy.outgoing(state, local(gradient, step=step), links)
        assert messages.keys() == {peer for peer, link in links.items() if link.ready}
        for peer, message in messages.items():
            part, values = sent_entries(message)
            sent[peer][part] += values
    for peer in (1, 2):
        kept = state.accumulated + state.missed.vectors.get(peer, np.float32(0))
        np.testing.assert_array_equal(sent[peer] + kept, np.sum(own, axis=0, dtype=np.float64))


def test_what_a_busy_link_missed_comes_when_the_partition_comes_round() -> None:
    strategy, state = start(partitions=2)
    own = gradients(3, 4, whole=True)
    seen = []
    for gradient, link in zip(own, (BUSY, FREE, FREE, FREE), strict=True):
        messages = strategy.outgoing(state, local(gradient), {1: link, 2: FREE})
        seen.append(messages)
    assert 1 not in seen[0]
    np.testing.assert_array_equal(sent_entries(seen[1][1])[1], (own[0] + own[1])[SIZE // 2 :])
    np.testing.assert_array_equal(sent_entries(seen[2][1])[1], (own[0] + own[1] + own[2])[: SIZE // 2])
    np.testing.assert_array_equal(sent_entries(seen[2][2])[1], (own[1] + own[2])[: SIZE // 2])


def test_a_partition_needs_next_to_no_bytes_for_its_indices() -> None:
    strategy, state = start(partitions=2)
    messages = strategy.outgoing(state, local(OPTIMUM), {1: FREE})
    entries = messages[1].entries
    assert entries is not None
    assert encoded_bytes(entries.indices, SIZE) == HEADER_BYTES + 4 * SIZE // 2 + 4


# ---- P


@pytest.mark.parametrize("peers", [1, 2, 5])
@pytest.mark.parametrize("share", [0.9, 1.0, 2.5, 40.0])
def test_p_is_what_makes_the_updates_fit_the_links(peers: int, share: float) -> None:
    """P = ceil(gamma m (n - 1) / B): m bytes over what a link carries in a step, the links together."""
    size, mean_bytes = 100_000, 400_000 / share
    links = {k: LinkView(True, mean_bytes * (1 + (k - (peers - 1) / 2) / 10)) for k in range(peers)}
    assert partitions(0, size, links) == int(np.ceil(share - 1e-9))
    assert partitions(7, size, links) == 7


def test_p_is_at_least_one_and_at_most_the_entries() -> None:
    assert partitions(0, 50, {1: LinkView(True, 1e12)}) == 1
    assert partitions(0, 50, {1: LinkView(True, 0.0)}) == 50
    assert partitions(99, 50, {1: LinkView(True, 1.0)}) == 50


def test_in_a_run_slower_links_get_smaller_parts() -> None:
    def mean_sent(low: float, high: float) -> float:
        weather = Weather(seed=1, budget=(low, high))
        result = trained(config("ako", "async", steps=60), weather=weather)
        return float(np.mean([n for own in result.sent for step in own for _, n in step.values() if n is not None]))

    assert mean_sent(160, 200) == SIZE
    assert mean_sent(20, 26) < SIZE / 5


@pytest.mark.parametrize("parts", [1, 5])
def test_no_entry_is_more_than_p_steps_late(parts: int) -> None:
    """A gradient that is not zero in one step only has been sent whole after P steps, not one later."""
    strategy, state = start(partitions=parts)
    nothing = np.zeros(SIZE, np.float32)
    for phase in range(parts):
        for _ in range(phase):
            strategy.outgoing(state, local(nothing), {1: FREE})
        total = np.zeros(SIZE, np.float32)
        for gradient in [OPTIMUM, *[nothing] * (parts - 1)]:
            messages = strategy.outgoing(state, local(gradient), {1: FREE})
            messages[1].entries.add_to(total, 1.0)
        assert total.tobytes() == OPTIMUM.tobytes()


# ---- what comes


def test_what_comes_is_added_at_once_each_worker_s_with_the_same_weight() -> None:
    a, b, c = gradients(2, 3, whole=True)
    strategy, state = start()
    strategy.outgoing(state, local(a), {1: FREE, 2: FREE})
    arrived = [arrival(1, b, lbs=8, step=3), arrival(1, c, lbs=8, step=4)]
    effect = strategy.incoming(state, local(a), OPTIMUM.copy, arrived)
    assert effect.weights is None
    np.testing.assert_allclose(effect.gradient, (a + b + c) / 3, rtol=1e-5, atol=1e-3)


def test_it_says_which_modes_and_options_it_has() -> None:
    with pytest.raises(UserError, match="ako does not support --sync sync: it supports async, bounded"):
        resolve(Config(strategy="ako", sync="sync"))
    with pytest.raises(UserError, match="--staleness has no effect with --sync async"):
        resolve(Config(strategy="ako", staleness=3))
    with pytest.raises(UserError, match=r"--gaia\.threshold belongs to --strategy gaia, not to --strategy ako"):
        resolve(Config.of({"strategy": "ako", "gaia.threshold": 0.1}))
    with pytest.raises(UserError, match=r"--ako\.partitions belongs to --strategy ako, not to --strategy dlion"):
        resolve(Config.of({"ako.partitions": 4}))
    with pytest.raises(UserError, match=r"--ako\.partitions -1: must be at least 0"):
        Ako(partitions=-1)
