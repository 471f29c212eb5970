"""DeMo: the largest coefficients of a cosine transform of the momentum, and the sign of their mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dlion_mpi.algorithms.cosine import Cosine
from dlion_mpi.algorithms.sparse import take_out
from dlion_mpi.algorithms.tiles import SIDE, Tiles
from dlion_mpi.config.fields import Bounds, option
from dlion_mpi.strategies.contract import EQUAL_BATCHES, Strategy
from dlion_mpi.strategies.joint import joint
from dlion_mpi.strategies.options import StrategyOptions
from dlion_mpi.strategies.state import State, transient
from dlion_mpi.strategies.types import Effect, LinkViews, LocalUpdate, Outbox, Outgoing, Plan, Weights
from dlion_mpi.vector.layout import Entries, Vector
from dlion_mpi.wire import Message


@dataclass(slots=True)
class DemoState(State):
    """``momentum``: (P,) float32, d of this worker. ``sent``: the coefficients of this step's message."""

    momentum: Vector
    tiles: Tiles = transient()
    cosine: Cosine = transient()
    sent: Entries = transient()


class Demo(Strategy):
    """Decoupled momentum: ``d <- beta d + c g``, ``q = top(DCT(d))``, ``d <- d - IDCT(q)``, and the optimizer of every
    worker gets ``sign(IDCT(sum_k q_k))`` as its gradient.

    c is the worker's share of the global batch. The transform is of every tile of 64 x 64 entries, of which a message
    has the largest coefficients. The learning rate is left out of d: as a constant it does not change the sign. Every
    entry moves by the learning rate, so it has to be much lower than for SGD.
    Source: Peng, Quesnelle, Kingma, "DeMo: Decoupled Momentum Optimization", arXiv 2411.19870, algorithm 1.
    """

    name = "demo"
    modes = ("sync",)
    uses: ClassVar[Mapping[str, object]] = {**EQUAL_BATCHES, "value_type": "float32"}

    @dataclass(frozen=True, kw_only=True)
    class Options(StrategyOptions):
        """The density of messages, and the decay of the momentum."""

        entries: int = option(32, "coefficients of a tile of 64 x 64", bounds=Bounds(1, SIDE**2, f"in 1..{SIDE**2}"))
        decay: float = option(0.999, "beta of the momentum", bounds=Bounds(0, 1, "in [0, 1]"))

    options: Options

    def start(self, plan: Plan) -> DemoState:
        zeros, tiles = np.zeros(plan.layout.size, np.float32), Tiles(plan.layout, row=SIDE)
        return DemoState(plan, zeros, tiles, Cosine(tiles), Entries(plan.layout.size, zeros.copy()))

    def outgoing(self, state: DemoState, local: LocalUpdate, links: LinkViews) -> Outbox:
        """The largest coefficients to every peer."""
        state.momentum *= np.float32(self.options.decay)
        state.momentum += np.float32(local.lbs / local.gbs) * local.vector
        coefficients = state.cosine.transform(state.momentum)
        value_type = state.plan.config.value_type or "float32"
        state.sent = take_out(coefficients, state.tiles.largest(coefficients, self.options.entries), value_type)
        state.momentum[:] = state.cosine.inverse(coefficients)
        message = Outgoing(entries=state.sent, quality=100 * len(state.sent) / state.sent.size, value_type=value_type)
        return dict.fromkeys(links, message)

    def incoming(self, state: DemoState, local: LocalUpdate, weights: Weights, messages: Sequence[Message]) -> Effect:
        if len(state.plan.ranks) == 1:
            return Effect(gradient=local.vector)
        return Effect(gradient=np.sign(state.cosine.inverse(joint(state.sent, state.plan.rank, messages))))
