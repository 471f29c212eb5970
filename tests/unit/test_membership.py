"""Membership is a value."""

from __future__ import annotations

from dlion_mpi.loop.membership import Membership


def test_peers_are_everyone_else_in_order() -> None:
    members = Membership((0, 1, 3, 7))
    assert members.peers(3) == (0, 1, 7)
    assert members.peers(0) == (1, 3, 7)
    assert Membership((0,)).peers(0) == ()


def test_who_leaves_is_gone_and_the_epoch_tells() -> None:
    before = Membership((0, 1, 2))
    after = before.without(1)
    assert after == Membership((0, 2), epoch=1)
    assert after.without(0) == Membership((2,), epoch=2)
    assert before == Membership((0, 1, 2)), "a membership never changes: a new one takes its place"


def test_who_takes_part() -> None:
    members = Membership((0, 2))
    assert len(members) == 2
    assert 2 in members
    assert 1 not in members
