"""Waits of unusual length: when a rank speaks of one, whom it names, and when it ends the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from dlion_mpi.config.fields import Every
from dlion_mpi.errors import RunError, Stalled, UserError
from dlion_mpi.metrics.records import Waited
from dlion_mpi.mpi import stall
from dlion_mpi.mpi.stall import StallWatch
from tests.options import config

TICK_S = 0.05


@dataclass
class Heard:
    """Notices of peers, as a test wants them."""

    waits: bool = False
    step: int = -1
    notices: dict[int, Any] = field(default_factory=dict)
    others: set[int] = field(default_factory=set)

    def waiting(self) -> set[int]:
        return self.others


def stub(**fields: Any) -> Any:
    """Something with these fields."""
    return SimpleNamespace(**fields)


class Scene:
    """Rank 0 of three, at a step, with a clock that a test moves. ``lines``: what it has said."""

    def __init__(self, limit: str | None = None, usual_s: float = 0.1, steps: int = 9, **options: Any) -> None:
        self.now_s = 100.0
        self.lines: list[str] = []
        self.rows: list[Waited] = []
        self.presence = Heard()
        every = None if limit is None else Every.parse(limit)
        self.watch = StallWatch(0, 3, every, now_s=lambda: self.now_s, say=self.lines.append)
        self.watch.presence = self.presence
        self.heard = {1: steps - 1, 2: steps - 1}
        self.worker = stub(
            step=0,
            config=config(**options),
            heard_steps=lambda: dict(self.heard),
            now_s=lambda: self.now_s,
            recorder=stub(waited=self.rows.extend),
        )
        self.watch.follow(self.worker)
        for step in range(steps):
            self.worker.step = step + 1
            self.now_s += usual_s
            with self.watch.waiting():
                pass

    def wait(self, seconds: float, source: str = "") -> None:
        """Wait as a driver does, which looks every now and then."""
        end_s = self.now_s + seconds
        with self.watch.waiting(source) as look:
            while self.now_s < end_s:
                self.now_s += TICK_S
                assert not look()


def seconds_of(lines: list[str]) -> list[int]:
    return [int(line.split("waiting ")[1].split()[0]) for line in lines if "waiting " in line]


def test_a_wait_of_some_usual_steps_is_spoken_of_and_again_at_growing_intervals() -> None:
    scene = Scene()
    scene.wait(4.5)
    assert not scene.lines
    scene.wait(45)
    assert seconds_of(scene.lines) == [5, 10, 20, 40]
    assert scene.lines[-1] == "dlion: rank 0: continues after 45 s"


def test_the_next_line_comes_after_five_minutes_at_the_latest() -> None:
    scene = Scene()
    scene.wait(1500)
    said = seconds_of(scene.lines)
    assert [round((later - earlier) / 10) for earlier, later in pairwise(said)][-3:] == [30, 30, 30]


def test_where_steps_are_long_so_are_the_waits_that_nobody_speaks_of() -> None:
    scene = Scene(usual_s=4.0)
    scene.wait(19)
    assert not scene.lines
    scene.wait(21)
    assert seconds_of(scene.lines) == [20]


def test_one_long_step_is_not_a_usual_one() -> None:
    scene = Scene()
    scene.wait(60)
    scene.lines.clear()
    scene.worker.step += 1
    scene.wait(6)
    assert seconds_of(scene.lines) == [5]


def test_ranks_may_start_at_different_speeds() -> None:
    scene = Scene("5s", steps=0)
    scene.wait(29)
    assert not scene.lines
    with pytest.raises(Stalled, match="has waited 60 s for"):
        scene.wait(100)


def test_the_line_names_who_is_missing_where_it_was_and_what_can_be_done() -> None:
    scene = Scene("10m", checkpoint_every="50", out="run")
    scene.presence.others = {1}
    scene.heard[2] = 8
    scene.wait(6)
    assert scene.lines[0] == (
        "dlion: rank 0: waiting 5 s for rank 2, last heard of at step 8; "
        "--stall-limit 600s ends the run with a checkpoint in 595 s"
    )
    assert [(row.peer, row.peer_step, row.step, round(row.seconds)) for row in scene.rows] == [(2, 8, 9, 5)]


def test_a_rank_that_is_heard_of_meanwhile_is_not_missing() -> None:
    scene = Scene()
    with scene.watch.waiting() as look:
        scene.heard[1] += 1
        for _ in range(120):
            scene.now_s += TICK_S
            look()
    assert "for rank 2, last heard of at step 8" in scene.lines[0]
    assert scene.watch.note == ""


def test_if_all_wait_the_slowest_is_named() -> None:
    scene = Scene()
    scene.presence.others = {1, 2}
    scene.heard = {1: 8, 2: 4}
    scene.wait(6)
    assert "for rank 2 (waiting too), last heard of at step 4" in scene.lines[0]


def test_it_tells_the_others_that_it_waits_before_it_speaks() -> None:
    scene = Scene()
    with scene.watch.waiting() as look:
        for _ in range(80):
            scene.now_s += TICK_S
            look()
        assert scene.presence.waits
        assert scene.presence.step == 9
        assert not scene.lines
    assert not scene.presence.waits


def test_the_limit_ends_the_run_and_names_the_peer() -> None:
    scene = Scene("8s")
    scene.presence.others = {2}
    with pytest.raises(Stalled, match="rank 0 has waited 8 s for rank 1, last heard of at step 8") as stalled:
        scene.wait(100)
    assert stalled.value.peers == {1}
    assert "continues" not in scene.lines[-1]


def test_the_limit_is_not_shorter_than_some_usual_steps() -> None:
    scene = Scene("5s", usual_s=6.0)
    scene.wait(29)
    with pytest.raises(Stalled):
        scene.wait(31)


def test_a_peer_that_ends_the_run_ends_it_here_too() -> None:
    scene = Scene("10m")
    scene.presence.notices[2] = stub(ends=True, peer=1, step=8)
    with pytest.raises(Stalled, match="rank 2 has waited too long for rank 1") as stalled:
        scene.wait(20)
    assert stalled.value.peers == {1}


def test_a_rank_that_was_stopped_itself_has_not_waited_meanwhile() -> None:
    scene = Scene("20s")
    with scene.watch.waiting() as look:
        for seconds in (1.0, 3600.0, 1.0):
            scene.now_s += seconds
            look()
    assert not scene.lines


def test_a_source_that_gives_no_rows_is_spoken_of_and_others_may_blame_this_rank() -> None:
    scene = Scene("30s")
    with pytest.raises(RunError, match="rank 0 has waited 30 s for rows of a shard") as failure:
        scene.wait(60, "rows of a shard")
    assert not isinstance(failure.value, Stalled)
    assert scene.lines[0].startswith("dlion: rank 0: waiting 5 s for rows of a shard; ")
    assert not scene.presence.waits
    assert not scene.rows


def test_many_missing_ranks_take_one_line() -> None:
    lines: list[str] = []
    now = [0.0]
    watch = StallWatch(5, 64, now_s=lambda: now[0], say=lines.append)
    watch.presence = Heard()
    with watch.waiting() as look:
        for _ in range(640):
            now[0] += TICK_S
            look()
    assert "for ranks 0, 1, 2, 3, 4, 6, 7, 8 and 55 others; " in lines[0]


def test_before_the_ranks_have_met_nobody_is_named() -> None:
    lines: list[str] = []
    now = [0.0]
    watch = StallWatch(0, 2, now_s=lambda: now[0], say=lines.append)
    with watch.waiting() as look:
        for _ in range(640):
            now[0] += TICK_S
            look()
    assert "waiting 30 s for the other ranks to start; --stall-limit 10m would end the run" in lines[0]


def test_a_limit_is_a_time() -> None:
    assert config(stall_limit="10m").stall_limit == Every(seconds=600)
    with pytest.raises(UserError, match="--stall-limit 100: give a time such as 90s or 10m"):
        config(stall_limit="100")
    assert stall.limit_of("nonsense") is None
