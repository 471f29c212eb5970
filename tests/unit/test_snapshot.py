"""Snapshots of ranks, their transport as vectors and JSON, and the progress of a run."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from dlion_mpi.config.target import Target
from dlion_mpi.view.snapshot import Goal, RankSnapshot, Snapshot, Tally, vector_length
from tests import runfiles

WORKERS = 3
METRICS = ("auc", "accuracy")
NO_GOAL = Goal()


def rank_snapshot(rank: int = 1, steps: int = 4) -> RankSnapshot:
    tally = Tally(rank, WORKERS, METRICS)
    for step in range(steps):
        tally.add(runfiles.record(rank, WORKERS, step))
    return tally.take({"auc": 7.0, "accuracy": 0.5})


def snapshot(*ranks: RankSnapshot, goal: Goal = NO_GOAL, elapsed_s: float = 4.0, real_s_per_s: float = 1.0) -> Snapshot:
    return Snapshot(
        title="a run",
        workers=WORKERS,
        ranks=ranks,
        goal=goal,
        elapsed_s=elapsed_s,
        metrics=METRICS,
        real_s_per_s=real_s_per_s,
    )


def test_a_tally_gives_means_since_it_was_last_asked_and_the_newest_of_what_has_none() -> None:
    tally = Tally(1, WORKERS, METRICS)
    records = [runfiles.record(1, WORKERS, step) for step in range(5)]
    for record in records[:2]:
        tally.add(record)
    tally.take({})
    for record in records[2:]:
        tally.add(record)
    found = tally.take({"accuracy": 0.75, "auc": 0.9})
    assert found.rank == 1
    assert [found[name] for name in ("step", "time_s", "lbs", "gbs")] == [5, records[-1].time_s, 16, 96]
    assert found["loss"] == pytest.approx(np.mean([record.loss for record in records[2:]]))
    assert (found["step_s"], found["waiting"], found["samples_per_s"]) == pytest.approx((1.0, 0.25, 16.0))
    assert (found["test/accuracy"], found["test/auc"]) == (0.75, 0.9)
    np.testing.assert_array_equal(found.links["bytes_sent"], [5000, np.nan, 15000])
    np.testing.assert_array_equal(found.links["quality"], [10, np.nan, 12])
    np.testing.assert_array_equal(found.links["age_s"], [0.25, np.nan, 0.25])


def test_what_was_sent_in_an_earlier_step_is_still_known() -> None:
    tally = Tally(0, WORKERS, METRICS)
    tally.add(runfiles.record(0, WORKERS, 0))
    tally.take({})
    tally.add(runfiles.record(0, WORKERS, 1))  # sends nothing
    found = tally.take({})
    assert found.links["quality"][2] == 12
    assert math.isnan(found["test/accuracy"])


def test_a_rank_comes_back_from_its_vector() -> None:
    before = rank_snapshot()
    vector = before.to_vector()
    assert vector.shape == (vector_length(WORKERS, METRICS),)
    after = RankSnapshot.from_vector(1, vector, METRICS)
    assert (after.rank, after.numbers) == (before.rank, before.numbers)
    assert list(after.links) == list(before.links)
    for name, values in before.links.items():
        np.testing.assert_array_equal(after.links[name], values)


@pytest.mark.parametrize("length", [0, 8, vector_length(WORKERS, METRICS) - 1])
def test_a_vector_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        RankSnapshot.from_vector(1, np.zeros(length), METRICS)


def test_a_snapshot_comes_back_from_json() -> None:
    before = snapshot(rank_snapshot(0), rank_snapshot(2), goal=Goal(seconds=9.0, target=Target("auc", "<=", 0.25)))
    after = Snapshot.from_json(json.loads(json.dumps(before.to_json())))
    assert after.goal == before.goal
    assert after.metrics == METRICS
    assert [rank.rank for rank in after.ranks] == [0, 2]
    np.testing.assert_array_equal(after.ranks[1].to_vector(), before.ranks[1].to_vector())


def test_a_link_has_its_senders_numbers_and_its_receivers_ages() -> None:
    links = {(link.source, link.target): link for link in snapshot(rank_snapshot(0), rank_snapshot(1)).links()}
    assert set(links) == {(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)}
    assert [links[0, 1][name] for name in ("bytes_sent", "quality", "age_s")] == [8000, 11, 0.25]
    assert math.isnan(links[1, 2]["age_s"])  # rank 2 has not reported
    assert (links[2, 1]["age_s"], math.isnan(links[2, 1]["bytes_sent"])) == (0.25, True)


def test_the_share_is_that_of_the_end_that_comes_first() -> None:
    ranks = rank_snapshot(0, 4), rank_snapshot(1, 2)
    assert snapshot(*ranks).share() is None
    assert snapshot(*ranks, goal=Goal(steps=8)).share() == 0.25  # of the slowest
    assert snapshot(*ranks, goal=Goal(steps=8, seconds=5.0)).share() == 0.8
    assert snapshot(*ranks, goal=Goal(seconds=2.0)).share() == 1.0
    assert snapshot(goal=Goal(steps=8)).share() == 0.0
    assert snapshot(*ranks, goal=Goal(target=Target("accuracy", ">=", 0.9))).share() is None


def test_the_time_that_is_left_is_that_of_whoever_has_longest_to_go() -> None:
    fast, slow = rank_snapshot(0, 4), rank_snapshot(1, 4)  # steps of 0.5 s and of 1 s
    assert snapshot(fast, slow).left_s() is None
    assert snapshot(fast, slow, goal=Goal(steps=10)).left_s() == pytest.approx(6.0)
    assert snapshot(fast, slow, goal=Goal(steps=10, seconds=5.0)).left_s() == pytest.approx(1.0)
    assert snapshot(fast, slow, goal=Goal(steps=10), real_s_per_s=0.5).left_s() == pytest.approx(3.0)
    assert snapshot(goal=Goal(steps=10)).left_s() is None
    assert snapshot(fast, goal=Goal(steps=2)).left_s() == 0.0
    assert snapshot(fast, goal=Goal(steps=10), real_s_per_s=math.nan).left_s() is None


def test_the_mean_of_a_metric_is_that_of_those_who_were_tested() -> None:
    tally = Tally(2, WORKERS, METRICS)
    tally.add(runfiles.record(2, WORKERS, 0))
    shown = snapshot(rank_snapshot(), tally.take({}))
    assert (shown.mean("accuracy"), shown.mean("auc")) == (0.5, 7.0)
    assert math.isnan(snapshot().mean("accuracy"))
