"""Watches what Ako computes, sends and receives in a run, with gradients that float32 adds up exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dlion_mpi.strategies.ako import Ako
from dlion_mpi.vector.layout import Vector
from dlion_mpi.wire import Kind


class Exact:
    """Gradients are rounded to multiples of 2^-18, so that no sum of them depends on its order.

    ``links``: the class whose `poll` gives what has come; ``rank_of`` tells whose links they are.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, links: type, rank_of: Callable[[Any], int]) -> None:
        self.computed: dict[tuple[int, int], Vector] = {}
        self.kept: dict[tuple[int, int], Vector] = {}
        """By sender and receiver, until the receiver leaves."""
        self.came: dict[tuple[int, int], Vector] = {}
        self.states: dict[int, Any] = {}
        self.turns_missed = 0
        outgoing, poll = Ako.outgoing, links.poll  # type: ignore[attr-defined]

        def spy_outgoing(strategy: Ako, state: Any, local: Any, views: Any) -> Any:
            vector = np.rint(local.vector * np.float32(2**18)) / np.float32(2**18)
            messages = outgoing(strategy, state, replace(local, vector=vector), views)
            for peer, view in views.items():
                link = state.plan.rank, peer
                self.computed[link] = self.computed.get(link, 0) + vector
                self.kept[link] = state.accumulated + state.missed.vectors.get(peer, np.float32(0))
                self.turns_missed += not view.ready
            self.states[state.plan.rank] = state
            return messages

        def spy_poll(own: Any) -> Any:
            messages = poll(own)
            for message in messages:
                if message.header.kind is Kind.GRADIENT:
                    empty = np.zeros(message.entries.size, np.float32)
                    total = self.came.setdefault((message.header.sender, rank_of(own)), empty)
                    message.entries.add_to(total, 1.0)
            return messages

        monkeypatch.setattr(Ako, "outgoing", spy_outgoing)
        monkeypatch.setattr(links, "poll", spy_poll)

    def check(self, source: int, destination: int) -> None:
        """What has come and what is kept is what was computed, to the last bit."""
        link = source, destination
        np.testing.assert_array_equal(self.came.get(link, 0) + self.kept[link], self.computed[link])
