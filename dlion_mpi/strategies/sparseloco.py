"""SparseLoCo: many local steps, then the largest entries of the pseudo-gradients, 2 bits each, with error feedback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dlion_mpi.algorithms.sparse import take_out
from dlion_mpi.algorithms.tiles import SIDE, Tiles
from dlion_mpi.config.fields import Bounds, at_least, option
from dlion_mpi.strategies.contract import EQUAL_BATCHES, Strategy
from dlion_mpi.strategies.joint import joint
from dlion_mpi.strategies.options import StrategyOptions
from dlion_mpi.strategies.state import State, transient
from dlion_mpi.strategies.types import Effect, Inbox, LinkViews, LocalUpdate, Outbox, Outgoing, Plan, Weights
from dlion_mpi.vector.layout import Entries, Vector
from dlion_mpi.wire import Message


@dataclass(slots=True)
class SparseLocoState(State):
    """``anchor``: (P,) float32, the weights after the last outer step, equal on all workers.

    ``moved``: (P,) float32, the local movements since then, and ``samples`` of ``all_samples`` that they are of.
    ``error``: (P,) float32, what no message has carried yet. ``sent``: the entries of the newest message.
    """

    anchor: Vector
    moved: Vector
    error: Vector
    tiles: Tiles = transient()
    sent: Entries = transient()
    samples: int = 0
    all_samples: int = 0


class SparseLoco(Strategy):
    """H local steps by the model's own optimizer, then an outer step without momentum on the joint message:

    ``e <- beta e + c_k (w_k - theta)``, ``e <- e - m_k``, ``theta <- theta + sum_k m_k``, ``w_k <- theta``

    with the anchor theta, and c_k the share of all samples since the last outer step that worker k has computed. The
    message m_k has the largest entries of e in every tile of 64 x 64, with values of 2 bits. An entry that a worker has
    not sent counts as zero, as in the paper; the public code averages over the workers that have sent it.
    Source: Sarfi et al., "Communication Efficient LLM Pre-training with SparseLoCo", arXiv 2508.15706.
    """

    name = "sparseloco"
    modes = ("sync",)
    exchanges = "movements"
    uses: ClassVar[Mapping[str, object]] = {**EQUAL_BATCHES, "value_type": "int2"}

    @dataclass(frozen=True, kw_only=True)
    class Options(StrategyOptions):
        """The number of local steps, the density of messages and the decay of errors."""

        h: int = option(15, "local steps between two exchanges", bounds=at_least(1))
        entries: int = option(64, "entries of each tile of 64 x 64", bounds=Bounds(1, SIDE**2, f"in 1..{SIDE**2}"))
        decay: float = option(0.95, "beta of the error feedback", bounds=Bounds(0, 1, "in [0, 1]"))

    options: Options

    def start(self, plan: Plan) -> SparseLocoState:
        zeros = np.zeros(plan.layout.size, np.float32)
        nothing = Entries(plan.layout.size, zeros[:0], np.empty(0, np.uint32))
        return SparseLocoState(plan, zeros, zeros.copy(), zeros.copy(), Tiles(plan.layout), nothing)

    def outgoing(self, state: SparseLocoState, local: LocalUpdate, links: LinkViews) -> Outbox:
        """After every H local steps, the largest entries to every peer."""
        state.moved += local.vector
        state.samples += local.lbs
        state.all_samples += local.gbs
        if not self._exchanges_after(local.step):
            return {}
        state.error *= np.float32(self.options.decay)
        state.error += np.float32(state.samples / state.all_samples) * state.moved
        value_type = state.plan.config.value_type or "int2"
        state.sent = take_out(state.error, state.tiles.largest(state.error, self.options.entries), value_type)
        quality = 100 * len(state.sent) / state.sent.size
        return dict.fromkeys(links, Outgoing(entries=state.sent, quality=quality, value_type=value_type))

    def may_advance(self, state: SparseLocoState, step: int, inbox: Inbox) -> bool:
        """Only an outer step waits, for the messages of all peers."""
        return not self._exchanges_after(step) or super().may_advance(state, step, inbox)

    def incoming(
        self, state: SparseLocoState, local: LocalUpdate, weights: Weights, messages: Sequence[Message]
    ) -> Effect:
        if local.step % self.options.h == 0:
            state.anchor[:] = weights()
        if not self._exchanges_after(local.step):
            return Effect(movement=local.vector)
        state.anchor += joint(state.sent, state.plan.rank, messages)
        state.moved.fill(0)
        state.samples = state.all_samples = 0
        return Effect(weights=state.anchor)

    def _exchanges_after(self, step: int) -> bool:
        return (step + 1) % self.options.h == 0
