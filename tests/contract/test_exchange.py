"""What a strategy sends to whom, what it keeps for later, and what it makes of what arrives."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion_mpi import wire
from dlion_mpi.algorithms.bandwidth import MEASURABLE_BYTES, SMALL_BYTES
from dlion_mpi.config.options import Config
from dlion_mpi.loop import budget
from dlion_mpi.loop.budget import MOST_STEPS_APART, STEPS_APART
from dlion_mpi.loop.worker import Worker
from dlion_mpi.strategies import dlion
from dlion_mpi.strategies.dlion import FEW, LEAST, MOST
from dlion_mpi.strategies.registry import STRATEGIES, resolve
from dlion_mpi.strategies.types import LinkView, LocalUpdate, Outgoing, Plan
from dlion_mpi.vector.layout import Layout, Vector
from dlion_mpi.wire import Header, Kind, Message, ValueType
from tests.contract.problem import (
    LAYOUT,
    OPTIMUM,
    SIZE,
    arrival,
    config,
    effect_of,
    every_message_mode,
    gradients,
    local,
    trained,
)
from tests.inmemory import Network, Weather


def first_messages(settings: Config, links: dict[int, LinkView]) -> dict[int, Outgoing]:
    strategy, resolved = resolve(settings)
    state = strategy.start(Plan(config=resolved, rank=0, ranks=(0, *links), layout=LAYOUT))
    messages: dict[int, Outgoing] = {}
    if strategy.sends_first():
        strategy.before_compute(state, 0, OPTIMUM.copy, links)
        strategy.outgoing(state, local(OPTIMUM), links)
        effect_of(strategy.incoming(state, local(OPTIMUM), OPTIMUM.copy, []))
        messages = strategy.before_compute(state, 1, lambda: OPTIMUM * np.float32(2), links)
    return messages | strategy.outgoing(state, local(OPTIMUM), links)


def dense(message: Outgoing) -> Vector:
    """What the receiver adds, (P,): after the wire."""
    vector = np.zeros(SIZE, np.float32)
    assert message.entries is not None
    header = Header(kind=Kind.GRADIENT, sender=0, epoch=0, step=0, sequence=1, acknowledged=0)
    buffer = np.empty(wire.capacity_bytes(SIZE), np.uint8)
    length = wire.encode(header, message.entries, buffer, message.value_type)
    wire.decode(buffer[:length], size=SIZE).entries.add_to(vector, 1.0)
    return vector


@every_message_mode
def test_what_a_link_gets_when_it_takes_no_message(name: str, mode: str) -> None:
    """In async nothing; else at least a header, since a rank may wait for this worker's step."""
    at_every_step = {"h": 1} if name == "sparseloco" else {}
    messages = first_messages(config(name, mode, **at_every_step), {1: LinkView(False, 1e9), 2: LinkView(True, 1e9)})
    assert messages[2].entries is not None
    assert (1 in messages) == (mode != "async")
    if mode == "bounded":
        assert messages[1].entries is None
        assert messages[1].kind is Kind.GRADIENT


def unweighted(gradient: Vector, *, step: int = 0) -> LocalUpdate:
    """The only worker's, so that its weight is 1."""
    return local(gradient, step=step, lbs=8, gbs=8)


def start_dlion(value_type: ValueType = "float32", mode: str = "async", **options: Any) -> tuple[Any, Any]:
    """Messages may take all that the links offer, which is little in these tests."""
    if "max_n" not in options:
        options.setdefault("link_share", 1.0)
    strategy, resolved = resolve(config("dlion", mode, value_type=value_type, **options))
    return strategy, strategy.start(Plan(config=resolved, rank=0, ranks=(0, 1, 2), layout=LAYOUT))


OFFERS = st.lists(
    st.tuples(*[st.tuples(st.booleans(), st.floats(0, 400))] * 2), min_size=1, max_size=12
)  # per step, per peer: ready, budget


@given(seed=st.integers(0, 1000), offers=OFFERS)
def test_accumulate_loses_nothing_bit_for_bit(seed: int, offers: list[Any]) -> None:
    """Whole numbers add up exactly, so over a run sent + unsent must equal the sum of all gradients."""
    strategy, state = start_dlion(unsent="accumulate")
    sent = {peer: np.zeros(SIZE, np.float64) for peer in (1, 2)}
    own = gradients(seed, len(offers), whole=True)
    for step, (gradient, offer) in enumerate(zip(own, offers, strict=True)):
        views = {peer: LinkView(*view) for peer, view in zip((1, 2), offer, strict=True)}
        messages = strategy.outgoing(state, unweighted(gradient, step=step), views)
        for peer, message in messages.items():
            sent[peer] += dense(message)
    for peer in (1, 2):
        np.testing.assert_array_equal(sent[peer] + state.residuals.of(peer), np.sum(own, axis=0, dtype=np.float64))


def test_what_a_worker_computes_when_all_have_left_is_kept_for_the_end() -> None:
    """It is no longer ahead of peers that will send nothing, and what they lack is exactly what it has added."""
    strategy, state = start_dlion("float32", "bounded", unsent="accumulate")
    sent = np.zeros(SIZE)
    movements = gradients(5, 20, whole=True)
    for step, movement in enumerate(movements):
        messages = strategy.outgoing(state, unweighted(movement), {1: LinkView(True, 130.0)} if step < 10 else {})
        assert bool(messages) == (step < 10)
        sent += dense(messages[1]) if messages else 0
        assert strategy.ahead(state).any() == (step < 10)
    lacked = np.sum(movements, axis=0, dtype=np.float64) - sent
    np.testing.assert_array_equal(state.residuals.of(1), lacked)
    np.testing.assert_array_equal(strategy.lacking(state), lacked + np.sum(movements, axis=0))  # 2 was never there


@given(seed=st.integers(0, 1000), offers=OFFERS)
def test_an_entry_is_sent_whole_or_kept_whole(seed: int, offers: list[Any]) -> None:
    """Of any numbers: what leaves the common memory in a step reaches each link or its residual, to the last bit."""
    strategy, state = start_dlion(unsent="accumulate")
    nothing = np.zeros(SIZE, np.float32)
    for step, (gradient, offer) in enumerate(zip(gradients(seed, len(offers), whole=False), offers, strict=True)):
        accumulated = state.residuals.common + gradient
        owed = {peer: state.residuals.by_peer.get(peer, nothing).copy() for peer in (1, 2)}
        views = {peer: LinkView(*view) for peer, view in zip((1, 2), offer, strict=True)}
        messages = strategy.outgoing(state, unweighted(gradient, step=step), views)
        left = accumulated - state.residuals.common
        np.testing.assert_array_equal(left[left != 0], accumulated[left != 0])
        for peer in (1, 2):
            sent = dense(messages[peer]) if peer in messages else nothing
            still_owed = state.residuals.by_peer.get(peer, nothing)
            assert not (sent * still_owed).any()
            assert (sent + still_owed).tobytes() == (owed[peer] + left + np.float32(0)).tobytes()


@pytest.mark.parametrize("value_type", ["float16", "bfloat16"])
@given(seed=st.integers(0, 1000), offers=OFFERS)
def test_with_16_bit_values_the_rounding_error_is_kept(value_type: ValueType, seed: int, offers: list[Any]) -> None:
    strategy, state = start_dlion(unsent="accumulate", value_type=value_type)
    total = np.zeros(SIZE, np.float64)
    sent = {peer: np.zeros(SIZE, np.float64) for peer in (1, 2)}
    rounding = 0.0
    for step, (gradient, offer) in enumerate(zip(gradients(seed, len(offers), whole=False), offers, strict=True)):
        views = {peer: LinkView(*view) for peer, view in zip((1, 2), offer, strict=True)}
        messages = strategy.outgoing(state, unweighted(gradient, step=step), views)
        total += gradient
        rounding += 1e-6 * float(np.abs(total).max())
        for peer, message in messages.items():
            seen = dense(message)
            assert message.entries is not None
            np.testing.assert_array_equal(wire.rounded(message.entries.values, value_type), message.entries.values)
            sent[peer] += seen
        for peer in (1, 2):
            np.testing.assert_allclose(sent[peer] + state.residuals.of(peer), total, rtol=0, atol=rounding)


def test_a_link_that_was_blocked_gets_all_its_residual_of_what_is_sent_next() -> None:
    strategy, state = start_dlion(unsent="accumulate", max_n=100.0)
    own = gradients(3, 3, whole=True)
    blocked, open_ = LinkView(False, 1e9), LinkView(True, 1e9)
    for gradient in own[:2]:
        strategy.outgoing(state, unweighted(gradient), {1: blocked, 2: open_})
    messages = strategy.outgoing(state, unweighted(own[2]), {1: open_, 2: open_})
    np.testing.assert_array_equal(dense(messages[1]), own[0] + own[1] + own[2])


def test_a_slow_link_next_to_a_fast_one_gets_the_largest_of_its_residual() -> None:
    """Over many steps nothing starves: what a slow link has not been sent stays a few steps' worth."""
    strategy, state = start_dlion(unsent="accumulate")
    links = {1: LinkView(True, 140.0), 2: LinkView(True, 400.0)}
    own = np.random.default_rng(5).normal(size=(200, SIZE)).astype(np.float32)
    for gradient in own:
        messages = strategy.outgoing(state, unweighted(gradient), links)
        sent, owed = dense(messages[1]), state.residuals.by_peer[1]
        shared = dense(messages[2]) != 0
        for start, stop in zip(LAYOUT.starts, LAYOUT.starts[1:], strict=False):
            part = slice(start, stop)
            passed_over = np.abs(owed[part][shared[part]])
            if sent[part].any() and len(passed_over):
                assert np.abs(sent[part]).max() >= passed_over.max()
    assert np.abs(state.residuals.of(1)).max() < 0.1 * np.abs(own).sum(axis=0).max()


def test_what_a_blocked_link_misses_comes_later() -> None:
    strategy, state = start_dlion(unsent="accumulate")
    own = gradients(3, 3, whole=True)
    blocked, open_ = LinkView(False, 1e9), LinkView(True, 1e9)
    for gradient in own[:2]:
        messages = strategy.outgoing(state, unweighted(gradient), {1: blocked, 2: open_})
        np.testing.assert_array_equal(dense(messages[2]), gradient)
    messages = strategy.outgoing(state, unweighted(own[2]), {1: open_, 2: open_})
    np.testing.assert_array_equal(dense(messages[1]), own[0] + own[1] + own[2])
    np.testing.assert_array_equal(dense(messages[2]), own[2])


def test_a_message_does_not_change_after_it_was_made() -> None:
    """It is encoded later than the residual is taken from, and the next step reuses the buffers."""
    for unsent in ("accumulate", "drop"):
        strategy, state = start_dlion(unsent=unsent)
        for budget_bytes in (1e9, 150.0):
            messages = strategy.outgoing(state, unweighted(OPTIMUM), {1: LinkView(True, budget_bytes)})
            values = messages[1].entries.values.copy()
            strategy.outgoing(state, unweighted(np.zeros(SIZE, np.float32)), {1: LinkView(True, 100)})
            np.testing.assert_array_equal(messages[1].entries.values, values)


def test_drop_forgets() -> None:
    strategy, state = start_dlion(unsent="drop")
    large, small = OPTIMUM * np.float32(1000), OPTIMUM[::-1].copy()
    link = {1: LinkView(True, 150.0)}
    strategy.outgoing(state, unweighted(large), link)
    strategy.outgoing(state, unweighted(large), {1: LinkView(False, 150.0)})
    messages = strategy.outgoing(state, unweighted(small), link)
    sent = dense(messages[1])
    assert 0 < np.count_nonzero(sent) < SIZE
    np.testing.assert_array_equal(sent[sent != 0], small[sent != 0])


@pytest.mark.parametrize("unsent", ["drop", "accumulate"])
@pytest.mark.parametrize("quality", [0.85, 10.0, 50.0, 99.0, 100.0])
def test_a_fixed_n_selects_by_definition_in_every_variable(unsent: str, quality: float) -> None:
    strategy, state = start_dlion(unsent=unsent, max_n=quality)
    gradient = gradients(7, 1, whole=True)[0]
    links = {1: LinkView(True, 0.0), 2: LinkView(True, 1e9)}  # whatever they can carry
    messages = strategy.outgoing(state, unweighted(gradient), links)
    for message in messages.values():
        assert message.quality == quality
        expected = np.zeros(SIZE, np.float32)
        for start, stop in zip(LAYOUT.starts, LAYOUT.starts[1:], strict=False):
            magnitudes = [abs(float(g)) for g in gradient[start:stop]]
            for i, magnitude in enumerate(magnitudes):
                if magnitude >= (1 - quality / 100) * max(magnitudes):
                    expected[start + i] = gradient[start + i]
        np.testing.assert_array_equal(dense(message), expected)


@given(budgets=st.tuples(st.floats(88, 400), st.floats(88, 400)), seed=st.integers(0, 100))
def test_every_link_gets_its_own_n_and_a_slower_one_a_subset(budgets: tuple[float, float], seed: int) -> None:
    strategy, state = start_dlion(unsent="drop")
    gradient = gradients(seed, 1, whole=False)[0]
    views = {peer: LinkView(True, budget) for peer, budget in zip((1, 2), sorted(budgets), strict=True)}
    messages = strategy.outgoing(state, unweighted(gradient), views)
    slow, fast = (dense(messages[peer]) for peer in (1, 2))
    assert messages[1].quality <= messages[2].quality
    np.testing.assert_array_equal(slow[slow != 0], fast[slow != 0])
    alone = [strategy.outgoing(state, unweighted(gradient), {peer: views[peer]})[peer] for peer in (1, 2)]
    np.testing.assert_array_equal(dense(alone[0]), slow)
    np.testing.assert_array_equal(dense(alone[1]), fast)


@pytest.fixture
def any_size_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a smallest message that measures its link: else none of so small a model would be small enough."""
    for module in (budget, dlion):
        monkeypatch.setattr(module, "MEASURABLE_BYTES", 1)


@pytest.mark.usefixtures("any_size_tells")
@pytest.mark.parametrize("mode", STRATEGIES["dlion"].modes)
@pytest.mark.parametrize("unsent", ["drop", "accumulate"])
def test_a_message_takes_its_share_of_what_the_link_offers(unsent: str, mode: str) -> None:
    wide = {1: LinkView(True, 240.0), 2: LinkView(True, 240.0, room_bytes=170.0)}
    narrow = {1: LinkView(True, 180.0), 2: LinkView(True, 180.0, room_bytes=127.5)}
    settings = config("dlion", mode, unsent=unsent, link_share=1.0, value_type="float32")
    parts = first_messages(config("dlion", mode, unsent=unsent, link_share=0.75, value_type="float32"), wide)
    wholes = first_messages(settings, narrow)
    full = first_messages(settings, wide)
    for peer in wide:
        np.testing.assert_array_equal(dense(parts[peer]), dense(wholes[peer]))
        assert 0 < np.count_nonzero(dense(parts[peer])) < np.count_nonzero(dense(full[peer]))


@pytest.mark.usefixtures("any_size_tells")
def test_links_of_about_the_same_width_get_the_same_entries() -> None:
    """Where messages leave links most of their time, unequal budgets are no reason for unequal replicas."""
    strategy, state = start_dlion(unsent="accumulate", link_share=0.2)
    wide, narrower, narrow = LinkView(True, 1000.0), LinkView(True, 300.0), LinkView(True, 150.0)
    messages = strategy.outgoing(state, unweighted(OPTIMUM), {1: wide, 2: narrower})
    np.testing.assert_array_equal(dense(messages[1]), dense(messages[2]))
    assert not state.residuals.by_peer
    messages = strategy.outgoing(state, unweighted(OPTIMUM), {1: wide, 2: narrow})
    assert np.count_nonzero(dense(messages[2])) < np.count_nonzero(dense(messages[1]))
    assert list(state.residuals.by_peer) == [2]


def test_messages_are_made_neither_very_small_nor_very_large_where_links_have_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dlion, "N_MIN", 1e-6)

    def sent(size: int, budget_bytes: float, **options: Any) -> int:
        layout = Layout.of([(size,)])
        gradient = np.random.default_rng(3).normal(size=size).astype(np.float32)
        strategy, resolved = resolve(config("dlion", "bounded", value_type="float32", **options))
        state = strategy.start(Plan(config=resolved, rank=0, ranks=(0, 1), layout=layout))
        messages = strategy.outgoing(state, unweighted(gradient), {1: LinkView(True, budget_bytes)})
        entries = messages[1].entries
        assert entries is not None
        return wire.encoded_bytes(entries.indices, size, "float32")

    size = 1_000_000
    least = LEAST * 4 * size
    for budget_bytes, expected in ((60 * least, 3 * least), (10 * least, least), (1.2 * least, 1.2 * MOST * least)):
        assert sent(size, budget_bytes) == pytest.approx(expected, rel=0.04)
    assert sent(size, 10 * least, link_share=0.5) == pytest.approx(5 * least, rel=0.04)
    few = FEW * 4 * size
    assert sent(size, 1000 * least) == pytest.approx(few, rel=0.04)
    assert sent(size, 20 * 4.1 * size) > 4 * size, "all entries are no few"
    assert sent(size, 1000 * least, link_share=0.05) == pytest.approx(50 * least, rel=0.04), "no limit"
    monkeypatch.setattr(dlion, "FEW", 1e-3)
    assert sent(size, 10 * least) == pytest.approx(4e-3 * size, rel=0.04), "a limit is a limit"
    monkeypatch.setattr(dlion, "FEW", 1e-6)
    assert sent(size, 10 * least) == pytest.approx(MEASURABLE_BYTES, rel=0.04)


@pytest.mark.parametrize(("budget_bytes", "least_bytes"), [(40_000, SMALL_BYTES), (4_000, SMALL_BYTES), (900, 800)])
def test_messages_are_large_enough_to_tell_how_fast_a_link_is(
    budget_bytes: float, least_bytes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of a small model: what has less than SMALL_BYTES counts neither as measured nor as in flight."""
    monkeypatch.setattr(dlion, "N_MIN", 1e-6)
    layout = Layout.of([(5_000,)])
    gradient = np.random.default_rng(3).normal(size=5_000).astype(np.float32)
    strategy, resolved = resolve(config("dlion", "bounded", value_type="float32"))
    state = strategy.start(Plan(config=resolved, rank=0, ranks=(0, 1), layout=layout))
    messages = strategy.outgoing(state, unweighted(gradient), {1: LinkView(True, budget_bytes)})
    entries = messages[1].entries
    assert entries is not None
    assert least_bytes <= wire.encoded_bytes(entries.indices, 5_000, "float32") <= budget_bytes


@pytest.mark.parametrize("unsent", ["drop", "accumulate"])
def test_a_message_has_no_more_bytes_than_the_processor_affords(unsent: str) -> None:
    afforded = {1: LinkView(True, 1e9, affordable_bytes=120.0), 2: LinkView(True, 120.0, affordable_bytes=1e9)}
    settings = config("dlion", "bounded", unsent=unsent, link_share=1.0, value_type="float32")
    messages = first_messages(settings, afforded)
    np.testing.assert_array_equal(dense(messages[1]), dense(messages[2]))
    assert 0 < np.count_nonzero(dense(messages[1])) < SIZE


@pytest.mark.usefixtures("any_size_tells")
def test_messages_get_smaller_where_the_exchange_costs_too_much_and_larger_again() -> None:
    """A tenth of 8 ms is granted per step, so 3.2 ms in four. A message costs 0.4 ms and 32 us a byte, then 1 us."""
    sizes: list[float] = []

    def cost(worker: Worker, _: Network) -> None:
        if worker.budget.exchanged_step == worker.step - 1:
            worker.budget.charge(4e-4 + 32e-6 * worker.budget.message_bytes if worker.step < 240 else 1e-6)
        if worker.rank == 0:
            sizes.append(worker.budget.message_bytes)

    settings = config("dlion", "async", steps=360, exchange_share=0.1, batching="fixed", transfer="none")
    trained(settings, on_step=cost)
    assert sizes[0] == 4 * SIZE
    assert np.mean(sizes[120:240]) == pytest.approx((STEPS_APART * 8e-4 - 4e-4) / 32e-6, rel=0.25)
    assert sizes[-1] == 4 * SIZE


DECODING_S = 0.05


def decodes_slowly(worker: Worker) -> None:
    """Receiving a gradient takes the loop DECODING_S of its time and of a processor's."""
    now_s, poll, spent_s = worker.clock.now_s, worker.links.poll, [0.0]

    def slow_poll() -> list[Message]:
        messages = poll()
        spent_s[0] += DECODING_S * sum(len(message.entries) > 0 for message in messages)
        return messages

    worker.clock.now_s = lambda: now_s() + spent_s[0]
    worker.clock.cpu_s = lambda: spent_s[0]
    worker.links.poll = slow_poll  # type: ignore[method-assign]


@pytest.mark.parametrize("mode", ["bounded", "sync"])
def test_decoding_is_no_waiting(mode: str) -> None:
    """Though the loop decodes while it waits. Else messages would be sized for steps that are shorter than they are."""
    share = {} if mode == "sync" else {"exchange_share": 0.0}
    settings = config("dlion", mode, steps=40, batching="fixed", transfer="none", **share)
    result, quick = trained(settings, prepare=decodes_slowly), trained(settings)
    for records, quick_records in zip(result.records, quick.records, strict=True):
        expected_s = DECODING_S * (len(result.workers) - 1) * len(records)
        assert sum(record.apply_s for record in records) == pytest.approx(expected_s, rel=0.1)
        waits_s = sum(record.wait_s for record in quick_records)
        assert sum(record.wait_s for record in records) < waits_s + 0.2 * expected_s


def test_decoding_is_charged_to_the_exchange() -> None:
    """A tenth of 8 ms of computing is granted per step, and receiving the others' messages takes 100 ms."""
    settings = config("dlion", "async", steps=60, exchange_share=0.1, batching="fixed", transfer="none")
    for own in trained(settings, prepare=decodes_slowly).sent:
        steps = [i for i, step in enumerate(own) if any(entries is not None for _, entries in step.values())]
        assert len(steps) < 20


def test_slow_links_get_less_over_a_whole_run() -> None:
    weather = Weather(seed=1, budget=(100, 330))
    settings = config("dlion", "bounded", steps=50, link_share=1.0, exchange_share=0.0, value_type="bfloat16")
    result = trained(settings, weather=weather)
    offered = [(view.budget_bytes, sent) for own in result.sent for step in own for view, sent in step.values()]
    tight = [sent for budget, sent in offered if budget < 150 and sent is not None]
    wide = [sent for budget, sent in offered if budget > 250 and sent is not None]
    assert np.mean(wide) > 3 * np.mean(tight)


def test_in_sync_gradients_are_exchanged_at_every_step_whatever_that_costs() -> None:
    result = trained(config("dlion", "sync", steps=60, batching="fixed", transfer="none"), message_cpu_s=0.5)
    assert all(entries is not None for own in result.sent for step in own for _, entries in step.values())


@pytest.mark.parametrize("mode", ["bounded", "async"])
def test_an_exchange_that_costs_too_much_is_done_every_few_steps(mode: str) -> None:
    """A tenth of 8 ms of computing is granted per step, and two messages take 4 ms: every fifth step."""
    own = {"patience": 0.0} if mode == "bounded" else {}  # a step takes no longer than computing
    settings = config("dlion", mode, steps=60, exchange_share=0.1, batching="fixed", transfer="none", **own)
    result = trained(settings, message_cpu_s=0.002)
    sent = [entries is not None for own in result.sent for step in own for _, entries in step.values()]
    assert np.mean(sent) == pytest.approx(0.2, abs=0.06)
    free = trained(dataclasses.replace(settings, exchange_share=0.0), message_cpu_s=0.002)
    assert all(entries is not None for own in free.sent for step in own for _, entries in step.values())


def test_what_an_exchange_may_cost_grows_with_the_processors_that_compute() -> None:
    """A tenth of 8 ms on six processors is more than two messages take."""
    settings = config("dlion", "bounded", steps=60, exchange_share=0.1, batching="fixed", transfer="none")

    def prepare(worker: Worker) -> None:
        worker.budget.processors = 6

    result = trained(settings, message_cpu_s=0.002, prepare=prepare)
    sent = [entries is not None for own in result.sent for step in own for _, entries in step.values()]
    assert np.mean(sent) > 0.95


def test_an_exchange_that_costs_more_than_all_its_credit_is_not_put_off_for_ever() -> None:
    settings = config("dlion", "async", steps=60, exchange_share=1e-6, batching="fixed", transfer="none")
    for own in trained(settings, message_cpu_s=10.0).sent:
        steps = [i for i, step in enumerate(own) if any(entries is not None for _, entries in step.values())]
        assert steps[0] == 0
        assert max(np.diff(steps)) == MOST_STEPS_APART


# ---- what arrives


def applied(settings: Config, own: LocalUpdate, messages: list[Message]) -> Vector:
    """The gradient or movement that a step of rank 0 of 3 applies."""
    strategy, resolved = resolve(settings)
    state = strategy.start(Plan(config=resolved, rank=0, ranks=(0, 1, 2), layout=LAYOUT))
    strategy.outgoing(state, own, {1: LinkView(True, 1e9), 2: LinkView(True, 1e9)})
    effect = effect_of(strategy.incoming(state, own, lambda: np.zeros(SIZE, np.float32), messages))
    vector = effect.gradient if strategy.exchanges == "gradients" else effect.movement
    assert vector is not None
    return vector


def test_a_movement_has_its_weight_when_it_is_sent() -> None:
    """The share of the batch that computed it in the global batch of then; the receiver adds it as it is."""
    a, b, c = gradients(2, 3, whole=True)
    settings = config("dlion", "bounded", weighting="global", max_n=100)
    strategy, resolved = resolve(settings)
    state = strategy.start(Plan(config=resolved, rank=0, ranks=(0, 1, 2), layout=LAYOUT))
    messages = strategy.outgoing(state, local(a, lbs=6, gbs=24), {1: LinkView(True, 1e9)})
    np.testing.assert_allclose(dense(messages[1]), a / 4, rtol=1e-2, atol=1e-3)
    effective = applied(settings, local(a, lbs=6, gbs=24), [arrival(1, b, lbs=4), arrival(2, c, lbs=12)])
    whole = 3 / 4  # a batch below the mean: as much of it as there are workers times its share
    np.testing.assert_allclose(effective, whole * a + b + c, rtol=1e-5, atol=1e-3)


def test_the_papers_weight_depends_on_the_receiver() -> None:
    a, b, c = gradients(2, 3, whole=True)
    arrived = [arrival(1, b, lbs=4), arrival(2, c, lbs=12)]
    settings = config("dlion", "bounded", weighting="paper", unsent="accumulate")
    effective = applied(settings, local(a, lbs=8), arrived)
    np.testing.assert_allclose(effective, (8 * a + 4 * b + 12 * c) / (3 * 8), rtol=1e-5, atol=1e-3)


@given(seed=st.integers(0, 1000), sizes=st.lists(st.sampled_from([1, 2, 4, 8, 16]), min_size=2, max_size=12))
def test_what_is_applied_is_what_was_computed_however_batches_change(seed: int, sizes: list[int]) -> None:
    """Sent late, a movement keeps the weight of its own batch: sent and unsent add up to sum LBS / GBS u.

    The worker itself counts it whole at once, and knows how far it is ahead of its peers.
    """
    strategy, state = start_dlion("float32", "bounded", unsent="accumulate")
    sent, applied_here, computed = np.zeros(SIZE), np.zeros(SIZE), np.zeros(SIZE)
    for step, (movement, lbs) in enumerate(zip(gradients(seed, len(sizes), whole=True), sizes, strict=True)):
        own = local(movement, step=step, lbs=lbs, gbs=16)
        sent += dense(strategy.outgoing(state, own, {1: LinkView(True, 140.0)})[1])
        applied_here += strategy.incoming(state, own, OPTIMUM.copy, []).movement
        computed += lbs / 16 * movement.astype(np.float64)
    np.testing.assert_allclose(sent + state.residuals.common, computed, rtol=1e-6, atol=1e-3)
    np.testing.assert_allclose(applied_here - strategy.ahead(state), sent, rtol=1e-5, atol=1e-2)
    assert np.abs(strategy.ahead(state)).max() > 1


@pytest.mark.parametrize("unsent", ["accumulate", "drop"])
def test_in_sync_a_late_acknowledgement_puts_no_gradient_off(unsent: str) -> None:
    """With N = 100 a step is then that of SGD on the joint batch, whatever the links look like."""
    views = {1: LinkView(False, 0, room_bytes=0), 2: LinkView(True, 1e9, room_bytes=0)}
    exact = {"max_n": 100, "value_type": "float32", "transfer": "none"}
    for outgoing in first_messages(config("dlion", "sync", unsent=unsent, **exact), views).values():
        np.testing.assert_array_equal(dense(outgoing), OPTIMUM * np.float32(8 / 24))


def test_baseline_takes_the_mean_of_all_workers() -> None:
    a, b, c = gradients(2, 3, whole=True)
    arrived = [arrival(1, b, lbs=8), arrival(2, c, lbs=8)]
    effective = applied(config("baseline", "sync"), local(a), arrived)
    np.testing.assert_allclose(effective, (a + b + c) / 3, rtol=1e-5, atol=1e-3)


def test_baseline_sends_everything_to_all_workers() -> None:
    messages = first_messages(config("baseline", "sync"), {1: LinkView(False, 0), 2: LinkView(True, 90)})
    for outgoing in messages.values():
        np.testing.assert_array_equal(dense(outgoing), OPTIMUM)
