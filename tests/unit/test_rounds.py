"""The rounds beside the exchange: who takes which share of the batch, whose knowledge goes to whom."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from dlion_mpi.config.options import Config
from dlion_mpi.config.target import Target
from dlion_mpi.loop import batch_sizes, knowledge
from dlion_mpi.loop.batch_sizes import BatchSizeRounds
from dlion_mpi.loop.knowledge import KnowledgeRounds
from dlion_mpi.loop.ports import Until
from dlion_mpi.metrics.records import Transfer
from dlion_mpi.strategies.registry import resolve
from dlion_mpi.vector.layout import Vector
from tests.inmemory import MemoryCollectives
from tests.options import grow_soon

WORKERS = 3
SAMPLES = 6000


def resolved(**options: Any) -> Config:
    return resolve(Config(**{"strategy": "dlion", "global_batch": "fixed", "batch_size": 40, **options}))[1]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares are asked for every five steps, and two losses tell who is best."""
    monkeypatch.setattr(batch_sizes, "PERIOD", 5)
    monkeypatch.setattr(knowledge, "LOSSES", 2)


def status_rounds(
    config: Config, workers: int = WORKERS, samples: int = SAMPLES
) -> tuple[list[BatchSizeRounds], MemoryCollectives]:
    shared = MemoryCollectives(workers)
    return [BatchSizeRounds(config, rank, workers, samples, shared.of(rank)) for rank in range(workers)], shared


def timed(rounds: BatchSizeRounds, alpha: float, beta: float) -> BatchSizeRounds:
    """With a fit that says this."""
    for samples in (10, 40, 80):
        rounds.fit.add(samples, alpha + beta * samples)
    return rounds


def waits(events: Iterable[Until | Transfer]) -> list[Until]:
    """Go on whether or not what is waited for has come; what was waited for."""
    return [event for event in events if isinstance(event, Until)]


def first(all_rounds: list[BatchSizeRounds]) -> None:
    """Before the first step, everyone together."""
    loops = [rounds.first(0) for rounds in all_rounds]
    pending = [next(loop) for loop in loops]
    for until, loop in zip(pending, loops, strict=True):
        assert until.ready()
        assert list(loop) == []


# ---- status: shares


def test_before_anything_is_known_everyone_has_the_same_share() -> None:
    rounds, _ = status_rounds(resolved())
    assert [r.lbs for r in rounds] == [40, 40, 40]
    assert [r.gbs for r in rounds] == [120] * 3


def test_the_first_round_balances_before_the_first_step() -> None:
    rounds, _ = status_rounds(resolved())
    for r, beta in zip(rounds, (0.001, 0.002, 0.002), strict=True):
        timed(r, 0.0, beta)
    first(rounds)
    assert [r.lbs for r in rounds] == [60, 30, 30]
    assert [r.started for r in rounds] == [1, 1, 1]


def test_auto_counts_what_every_step_costs_and_proportional_does_not() -> None:
    shares = {}
    for batching in ("auto", "proportional"):
        rounds, _ = status_rounds(resolved(batching=batching), workers=2)
        timed(rounds[0], 0.02, 0.001)
        timed(rounds[1], 0.0, 0.001)
        first(rounds)
        shares[batching] = [r.lbs for r in rounds]
    assert shares == {"auto": [30, 50], "proportional": [40, 40]}


def test_like_workers_of_noisy_timings_keep_equal_batches() -> None:
    """A step costs 2 ms whatever its batch: by these fits alone one worker would get nearly all samples."""
    rounds, _ = status_rounds(resolved())
    for r, alpha in zip(rounds, (0.0020, 0.0021, 0.0021), strict=True):
        timed(r, alpha, 1e-6)
    first(rounds)
    assert [r.lbs for r in rounds] == [40, 40, 40]


def test_no_batch_falls_below_an_eighth_of_an_equal_share() -> None:
    rounds, _ = status_rounds(resolved())
    for r, alpha in zip(rounds, (0.0, 0.2, 0.2), strict=True):
        timed(r, alpha, 0.001)
    first(rounds)
    assert [r.lbs for r in rounds] == [110, 5, 5]


def test_nobody_gets_more_than_batch_size_max() -> None:
    rounds, _ = status_rounds(resolved(batch_size_max=50))
    for r, beta in zip(rounds, (0.001, 0.01, 0.01), strict=True):
        timed(r, 0.0, beta)
    first(rounds)
    assert [r.lbs for r in rounds] == [50, 35, 35]


def test_a_global_batch_beyond_all_limits_is_cut_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    grow_soon(monkeypatch, every=1, samples=100)
    rounds, _ = status_rounds(resolved(global_batch="grow", batch_size_max=60))
    for r in rounds:
        timed(r, 0.0, 0.001)
        list(r.advance(10))
    for r in rounds:
        list(r.advance(12))
    assert [(r.lbs, r.gbs) for r in rounds] == [(60, 180)] * 3


def test_a_round_is_asked_for_every_so_many_steps_and_one_at_a_time() -> None:
    rounds, shared = status_rounds(resolved())
    for step in range(1, 23):
        list(rounds[0].advance(step))
    assert rounds[0].started == 1, "the others have not answered yet"
    for r in rounds[1:]:
        list(timed(r, 0.0, 0.001).advance(5))
    timed(rounds[0], 0.0, 0.001)
    list(rounds[0].advance(23))
    assert rounds[0].started == 1
    list(rounds[0].advance(25))
    assert rounds[0].started == 2
    assert len(shared.calls["status"]) == 2


def test_without_waiting_a_share_changes_when_the_round_is_done() -> None:
    rounds, _ = status_rounds(resolved(sync="async"))
    for r, beta in zip(rounds, (0.001, 0.002, 0.002), strict=True):
        timed(r, 0.0, beta)
    for r in rounds[:2]:
        assert waits(r.advance(5)) == []
    assert waits(rounds[0].advance(6)) == []
    assert rounds[0].lbs == 40
    list(rounds[2].advance(5))
    list(rounds[0].advance(9))
    assert [r.lbs for r in rounds] == [60, 40, 40]  # ranks 1 and 2 have not looked yet
    list(rounds[1].advance(6))
    assert rounds[1].lbs == 40, "before the step at which all are to take it"
    for r in rounds[1:]:
        list(r.advance(7))
    assert [r.lbs for r in rounds] == [60, 30, 30]


def test_shares_of_a_step_add_up_to_the_global_batch_also_if_one_worker_is_behind() -> None:
    rounds, _ = status_rounds(resolved())
    for r, beta in zip(rounds, (0.001, 0.002, 0.002), strict=True):
        timed(r, 0.0, beta)
    after: dict[int, list[int]] = {step: [] for step in range(1, 12)}
    for step in range(1, 13):
        for r, behind in zip(rounds, (0, 0, 1), strict=True):
            if step - behind in after:
                list(r.advance(step - behind))
                after[step - behind].append(r.lbs)
    assert {sum(shares) for shares in after.values()} == {120}
    assert after[11] == [60, 30, 30]


def test_in_sync_the_round_of_a_step_is_awaited_at_the_next() -> None:
    rounds, _ = status_rounds(resolved(sync="sync"))
    for r in rounds:
        timed(r, 0.0, 0.001)
        assert waits(r.advance(4)) == []
    list(rounds[0].advance(5))
    (until,) = waits_of_the_first(rounds[0], 6)
    assert not until.ready()
    for r in rounds[1:]:
        list(r.advance(5))
    assert until.ready()


def waits_of_the_first(rounds: BatchSizeRounds, step: int) -> list[Until]:
    return [next(iter(rounds.advance(step)))]


def test_batches_that_are_fixed_follow_the_schedule_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    grow_soon(monkeypatch, every=10, samples=10, warmup=0.025, factor=2.0, most=0.1)
    rounds, shared = status_rounds(resolved(batching="fixed", global_batch="grow"))
    seen = []
    for step in (5, 10, 20, 30, 40, 50, 60):
        for r in rounds:
            list(r.advance(step))
        assert sum(r.lbs for r in rounds) == rounds[0].gbs
        seen.append(rounds[0].gbs)
    assert seen == [120, 130, 140, 150, 300, 600, 600]
    assert [r.lbs for r in rounds] == [200] * 3
    assert shared.calls == {}


def test_the_schedule_is_that_of_the_step_at_which_everyone_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are at different steps when a round is done; all must solve for the same global batch."""
    grow_soon(monkeypatch, every=10, samples=12)
    rounds, _ = status_rounds(resolved(global_batch="grow"))
    for r in rounds:
        timed(r, 0.0, 0.001)
        list(r.advance(10))
    for r, step in zip(rounds, (12, 19, 29), strict=True):
        list(r.advance(step))
    assert [(r.lbs, r.gbs) for r in rounds] == [(44, 132)] * 3


def test_one_worker_has_nobody_to_share_with() -> None:
    (rounds,), _ = status_rounds(resolved(), workers=1)
    assert not rounds.adapts
    timed(rounds, 0.1, 0.5)
    for step in range(1, 9):
        list(rounds.advance(step))
    assert (rounds.lbs, rounds.gbs) == (40, 40)


# ---- status: target, departures


def test_the_target_is_reached_by_the_mean_of_all() -> None:
    rounds, _ = status_rounds(resolved(target=Target("accuracy", ">=", 0.8)))
    for accuracies, reached in (((0.9, 0.9, math.nan), False), ((0.9, 0.9, 0.5), False), ((0.9, 0.9, 0.75), True)):
        step = 5 * (rounds[0].started + 1)
        for r, accuracy in zip(rounds, accuracies, strict=True):
            timed(r, 0.0, 0.001).tested = accuracy
            list(r.advance(step))
        for r in rounds:
            list(r.advance(step + 2))
        assert [r.target_reached for r in rounds] == [reached] * 3


def test_a_loss_is_to_fall_below_its_target() -> None:
    rounds, _ = status_rounds(resolved(target=Target("val_loss", "<=", 0.5)))
    for losses, reached in (((0.2, 0.2, math.nan), False), ((0.9, 0.4, 0.4), False), ((0.6, 0.4, 0.4), True)):
        step = 5 * (rounds[0].started + 1)
        for r, loss in zip(rounds, losses, strict=True):
            timed(r, 0.0, 0.001).tested = loss
            list(r.advance(step))
        for r in rounds:
            list(r.advance(step + 2))
        assert [r.target_reached for r in rounds] == [reached] * 3


def test_a_target_is_watched_even_where_batches_are_fixed() -> None:
    config = resolve(Config(strategy="baseline", target=Target("accuracy", ">=", 0.5)))[1]
    rounds, _ = status_rounds(config)
    for r in rounds:
        r.tested = 0.6
        list(r.advance(10))
    list(rounds[0].advance(11))
    assert rounds[0].target_reached


def test_when_somebody_has_left_the_shares_stay() -> None:
    rounds, _ = status_rounds(resolved())
    for r, beta in zip(rounds, (0.001, 0.002, 0.002), strict=True):
        timed(r, 0.0, beta)
    for r in rounds[:2]:
        list(r.advance(5))
    rounds[2].leave(1)
    assert rounds[2].settled()
    for r in rounds[:2]:
        list(r.advance(6))
        assert r.lbs == 40
        assert r.settled()


def test_who_leaves_takes_part_in_what_others_have_started() -> None:
    rounds, shared = status_rounds(resolved())
    list(rounds[0].advance(5))
    assert not rounds[0].settled()
    rounds[1].leave(1)
    rounds[2].leave(1)
    assert rounds[0].settled()
    rounds[2].leave(1)
    assert len(shared.calls["status"]) == 1


# ---- knowledge


class Minds:
    """A knowledge per worker, and their rounds."""

    def __init__(self, config: Config, workers: int = WORKERS) -> None:
        self.shared = MemoryCollectives(workers)
        self.rounds = [KnowledgeRounds(config, rank, workers, self.shared.of(rank)) for rank in range(workers)]
        self.vectors: list[Vector] = [np.full(4, 10.0 * rank, np.float32) for rank in range(workers)]

    def advance(self, rank: int, step: int) -> list[Until | Transfer]:
        def write(vector: Vector) -> None:
            self.vectors[rank] = vector

        return list(self.rounds[rank].advance(step, self.vectors[rank].copy, write))

    def everyone(self, step: int) -> list[list[Until | Transfer]]:
        return [self.advance(rank, step) for rank in range(len(self.rounds))]

    def learned(self) -> list[float]:
        return [float(vector[0]) for vector in self.vectors]

    def observe(self, *losses: float) -> Minds:
        for rounds, loss in zip(self.rounds, losses, strict=True):
            rounds.observe(loss)
        return self


def knowing(policy: str = "all", *, mode: str = "async", merge: float = 0.5, **options: Any) -> Config:
    return resolved(sync=mode, transfer=policy, transfer_period=10, transfer_merge=merge, **options)


@pytest.mark.parametrize(
    ("policy", "learned"),
    [("all", [5.0, 10.0, 15.0]), ("worse-than-mean", [0.0, 10.0, 15.0]), ("worst", [0.0, 10.0, 15.0])],
)
def test_the_best_worker_s_knowledge_is_merged_by_the_policy(policy: str, learned: list[float]) -> None:
    minds = Minds(knowing(policy)).observe(1.5, 1.0, 3.0)
    assert minds.everyone(10) == [[], [], []]
    assert minds.everyone(11) == [[], [], []]
    events = minds.everyone(12)
    assert events == [
        [Transfer(step=12, source=1, merged=learned[rank] != 10.0 * rank, started_step=10, payload_bytes=size)]
        for rank, size in enumerate((16, 0, 16))
    ]
    assert minds.learned() == learned


def test_what_travels_is_the_knowledge_when_the_best_worker_learns_that_it_is() -> None:
    minds = Minds(knowing(merge=1.0)).observe(2.0, 1.0, 3.0)
    minds.everyone(10)
    minds.vectors[1] += 1
    minds.everyone(11)
    minds.vectors[1] += 100  # later: the snapshot is under way already
    minds.everyone(12)
    assert minds.learned() == [11.0, 111.0, 11.0]


def test_the_mean_of_the_last_losses_decides() -> None:
    minds = Minds(knowing()).observe(0.0, 9.0, 9.0).observe(5.0, 1.0, 3.0).observe(5.0, 2.0, 3.0)
    minds.everyone(10)
    assert [part[0] for part in minds.shared.calls["transfer"][0].parts.values()] == [5.0, 1.5, 3.0]


def test_without_waiting_nobody_waits_and_everyone_merges_in_its_own_time() -> None:
    minds = Minds(knowing()).observe(1.0, 2.0, 3.0)
    for step in range(10, 30):
        assert minds.advance(0, step) == []
    for step in range(10, 14):
        assert minds.advance(1, step) == []
    minds.advance(2, 10)
    minds.everyone(31)
    (transfer,) = minds.advance(2, 32)
    assert isinstance(transfer, Transfer)
    assert (transfer.source, transfer.step, transfer.started_step) == (0, 32, 10)
    assert minds.learned() == [0.0, 10.0, 10.0]
    minds.everyone(33)
    assert minds.learned() == [0.0, 5.0, 10.0]


def test_in_sync_every_stage_is_awaited_at_the_next_step() -> None:
    minds = Minds(knowing(mode="sync")).observe(1.0, 2.0, 3.0)
    minds.advance(0, 10)
    waiting = minds.rounds[0].advance(11, minds.vectors[0].copy, lambda vector: None)
    until = next(waiting)
    assert isinstance(until, Until)
    assert not until.ready()
    for rank in (1, 2):
        minds.advance(rank, 10)
    assert until.ready()
    assert list(waiting) == []
    for rank in (1, 2):
        assert [type(event) for event in minds.advance(rank, 11)] == [Until]
    assert [[type(event) for event in own] for own in minds.everyone(12)] == [[Until, Transfer]] * 3


def test_a_transfer_starts_at_its_period_and_never_before_the_last_is_over() -> None:
    minds = Minds(knowing()).observe(1.0, 2.0, 3.0)
    for step in range(1, 10):
        minds.everyone(step)
    assert not minds.rounds[0].in_flight
    minds.advance(0, 10)
    assert minds.rounds[0].in_flight
    for step in range(11, 35):
        minds.advance(0, step)
    assert minds.rounds[0].started == 1


def test_step_0_is_no_period() -> None:
    minds = Minds(knowing())
    minds.everyone(0)
    assert minds.shared.calls == {}


@pytest.mark.parametrize("losses", [(math.nan, math.inf, math.nan), ()])
def test_when_nobody_knows_anything_nothing_travels(losses: tuple[float, ...]) -> None:
    minds = Minds(knowing())
    if losses:
        minds.observe(*losses)
    for step in range(10, 14):
        minds.everyone(step)
    assert [call.what for call in minds.shared.calls["transfer"]] == ["gather"]
    assert not minds.rounds[0].in_flight


def test_a_loss_that_is_not_finite_is_not_the_best() -> None:
    minds = Minds(knowing(merge=1.0)).observe(math.nan, 2.0, 1.0)
    for step in (10, 11, 12):
        minds.everyone(step)
    assert minds.learned() == [20.0, 20.0, 20.0]


@pytest.mark.parametrize(("config", "workers"), [(knowing(), 1), (resolved(transfer="none"), 3)])
def test_where_there_is_nothing_to_learn_nothing_is_asked(config: Config, workers: int) -> None:
    minds = Minds(config, workers).observe(*[1.0] * workers)
    for step in range(300):
        assert minds.everyone(step) == [[]] * workers
    assert minds.shared.calls == {}
    assert minds.rounds[0].settled()


def test_when_somebody_has_left_nothing_travels() -> None:
    minds = Minds(knowing()).observe(1.0, 2.0, 3.0)
    for rank in (0, 1):
        minds.advance(rank, 10)
    minds.rounds[2].leave(1)
    for step in (11, 12):
        for rank in (0, 1):
            assert minds.advance(rank, step) == []
    assert [call.what for call in minds.shared.calls["transfer"]] == ["gather"]
    for rounds, vector in zip(minds.rounds, minds.vectors, strict=True):
        rounds.serve(vector.copy)
    assert all(rounds.settled() for rounds in minds.rounds)


def test_who_has_ended_still_serves_a_transfer_under_way() -> None:
    """The gather was done with everyone; the best worker has then ended, and its knowledge still travels."""
    minds = Minds(knowing()).observe(1.0, 2.0, 3.0)
    minds.everyone(10)
    for rank in (1, 2):
        minds.advance(rank, 11)
    minds.rounds[0].leave(1)
    minds.rounds[0].serve(minds.vectors[0].copy)  # as while it waits for the others
    for rank in (1, 2):
        (transfer,) = minds.advance(rank, 12)
        assert isinstance(transfer, Transfer)
    assert minds.learned() == [0.0, 5.0, 10.0]
    minds.rounds[0].serve(minds.vectors[0].copy)
    assert minds.rounds[0].settled()
    assert not minds.rounds[0].in_flight
