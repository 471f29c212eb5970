"""Sums as a strategy asks for them: of any size, any number of them, in every mode; and the end of a run in each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest

from dlion_mpi.config.options import Config
from dlion_mpi.errors import RunError, UserError
from dlion_mpi.loop.worker import Worker
from dlion_mpi.strategies.contract import Strategy
from dlion_mpi.strategies.registry import resolve
from dlion_mpi.strategies.state import State
from dlion_mpi.strategies.types import Effect, LinkView, LocalUpdate, Outgoing, Sum, Sums, Weights
from dlion_mpi.wire import Message
from tests.contract.problem import OPTIMUM, SIZE, config, trained
from tests.inmemory import Network, Weather

MODES = ("sync", "bounded", "async")
NAME = f"{__name__}:Several"


@dataclass(slots=True)
class SeveralState(State):
    """``totals``: the sums in the order in which they were computed."""

    totals: list[float] = field(default_factory=list)


class Several(Strategy):
    """The mean gradient by as many sums as the step's number says, in pieces of unequal size; then another two."""

    name = "several"
    modes = MODES
    uses: ClassVar[Mapping[str, object]] = {"staleness": 1000}

    def start(self, plan: Any) -> SeveralState:
        return SeveralState(plan)

    def outgoing(self, state: Any, local: LocalUpdate, links: Mapping[int, LinkView]) -> dict[int, Outgoing]:
        return {peer: Outgoing() for peer in links}

    def incoming(
        self, state: SeveralState, local: LocalUpdate, weights: Weights, messages: Sequence[Message]
    ) -> Sums[Effect]:
        pieces = np.array_split(local.vector / np.float32(len(state.plan.ranks)), local.step % 4 + 1)
        pieces.insert(1, np.empty(0, np.float32))
        totals = []
        for piece in pieces:
            total = yield Sum(piece.copy())
            assert len(total) == len(piece)
            totals.append(total)
        return Effect(gradient=np.concatenate(totals))

    def between(self, state: SeveralState, local: LocalUpdate, weights: Weights) -> Sums[None]:
        if local.step % 3:
            return
        for factor in (1, 10):
            total = yield Sum(np.full(1, factor * (state.plan.rank + 1), np.float32))
            state.totals.append(float(total[0]))


def settings(mode: str, **options: Any) -> Config:
    return dataclasses.replace(config("baseline", "sync", **options), strategy=NAME, sync=mode)


@pytest.mark.parametrize("mode", MODES)
def test_all_sums_of_a_step_are_whole_and_in_order(mode: str) -> None:
    result = trained(settings(mode, steps=120), weather=Weather(seed=1, delay=30, slow=1, slowness=10))
    np.testing.assert_allclose(result.weights, np.tile(OPTIMUM, (3, 1)), atol=0.02)
    for worker in result.workers:
        assert worker.state.totals == [6.0, 60.0] * 40
    calls = result.collectives.calls["sum"]
    expected = sum(step % 4 + 1 + (0 if step % 3 else 2) for step in range(120))
    assert len(calls) == expected + 1, "one more, in which all tell that they have ended"
    assert calls[-1].parts == dict.fromkeys(range(3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(4))
def test_by_the_clock_all_end_in_order(mode: str, seed: int) -> None:
    weather = Weather(seed=seed, delay=60, slow=seed % 3, slowness=15)
    result = trained(settings(mode, steps=None, seconds=0.5), weather=weather)
    steps = [len(records) for records in result.records]
    assert min(steps) > 0
    assert max(steps) - min(steps) <= 1, "nobody completes a step whose sums one has not taken part in"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("last", [7, 8, 9])
def test_a_worker_that_ends_early_ends_all(mode: str, last: int) -> None:
    """Also where its last step is one after which there is a sum."""

    def end_early(worker: Worker, network: Network) -> None:
        if worker.rank == 1 and worker.step == last:  # steps done
            worker.end_step = last + 1

    result = trained(settings(mode, steps=60), weather=Weather(seed=2, delay=40), on_step=end_early)
    assert [len(records) for records in result.records] == [last + 1] * 3
    assert len({weights.tobytes() for weights in result.weights}) == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_signal_on_one_worker_ends_all(mode: str) -> None:
    def stop(worker: Worker, network: Network) -> None:
        if worker.rank == 1 and worker.step == 10:
            worker.stop_reason = "SIGTERM"

    result = trained(settings(mode, steps=1000), weather=Weather(seed=3, delay=30), on_step=stop)
    assert result.workers[1].stop_reason == "SIGTERM"
    assert [len(records) for records in result.records] == [10] * 3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sums", [0, 1, 2])
def test_a_worker_that_fails_between_two_sums_of_a_step_holds_nobody(
    mode: str, sums: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it has taken part in that many sums of step 10, of three."""
    incoming = Several.incoming

    def failing(
        self: Several, state: SeveralState, local: LocalUpdate, weights: Weights, messages: Sequence[Message]
    ) -> Sums[Effect]:
        whole = incoming(self, state, local, weights, messages)
        request = next(whole)
        done = 0
        while True:
            if state.plan.rank == 2 and local.step == 10 and done == sums:
                raise RunError("planted")
            try:
                request = whole.send((yield request))
            except StopIteration as stop:
                effect: Effect = stop.value
                return effect
            done += bool(len(request.vector))

    monkeypatch.setattr(Several, "incoming", failing)
    taken: dict[int, int] = {}

    def watch(worker: Worker, network: Network) -> None:
        taken[worker.rank] = worker.step

    with pytest.raises(RunError, match="planted"):
        trained(settings(mode, steps=60), weather=Weather(seed=4, delay=30), on_step=watch)
    assert taken == dict.fromkeys(range(3), 10)


def test_one_worker_alone_sums_nothing() -> None:
    result = trained(settings("sync", steps=20), workers=1)
    assert "sum" not in result.collectives.calls
    assert result.workers[0].state.totals == []
    assert result.weights.shape == (1, SIZE)


@pytest.mark.parametrize("name", ["allreduce", "local-sgd", "diloco"])
@pytest.mark.parametrize("value_type", ["float32", "float16", "bfloat16"])
def test_sums_travel_as_the_chosen_type_and_leave_all_replicas_equal(name: str, value_type: str) -> None:
    result = trained(config(name, "sync", steps=250, value_type=value_type))
    summed = [part for call in result.collectives.calls["sum"] for part in call.parts.values() if part is not None]
    assert {own for _, own in summed} == {value_type}
    assert len({weights.tobytes() for weights in result.weights}) == 1
    np.testing.assert_allclose(result.weights, np.tile(OPTIMUM, (3, 1)), atol=0.02)


@pytest.mark.parametrize("value_type", ["sign", "int8"])
def test_values_of_few_bits_are_not_summed(value_type: str) -> None:
    with pytest.raises(UserError, match=f"--value-type {value_type}: --strategy allreduce has float32, float16, bfloa"):
        resolve(config("allreduce", "sync", value_type=value_type))
