"""Streaming DiLoCo: outer steps on one fragment of the model at a time, which travels while the workers compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dlion_mpi.algorithms.outer import fragments, nesterov
from dlion_mpi.config.fields import Bounds, at_least, option
from dlion_mpi.errors import UserError
from dlion_mpi.strategies.arrived import Arrived
from dlion_mpi.strategies.contract import Strategy
from dlion_mpi.strategies.diloco import Diloco
from dlion_mpi.strategies.state import State, transient
from dlion_mpi.strategies.types import Effect, Inbox, LinkViews, LocalUpdate, Outbox, Outgoing, Plan, Weights
from dlion_mpi.vector.layout import Entries, Vector
from dlion_mpi.wire import Message, rounded_entries


@dataclass(slots=True)
class Streaming(State):
    """Outer weights and momentum, (P,) float32; pseudo-gradients not applied yet; the last step that sent some."""

    anchor: Vector
    momentum: Vector
    arrived: Arrived
    fragments: list[slice] = transient()
    posted: int = 0


class StreamingDiloco(Strategy):
    """DiLoCo by fragments: each of F is sent every H steps, at even distances, and applied tau steps later:

    ``D = mean_k (theta - w_k)`` as of when it was sent, ``m <- mu m + D``, ``theta <- theta - eta (D + mu m)``,
    ``w_k <- alpha w_k + (1 - alpha) theta``

    on the entries of the fragment: successive whole variables. Values have 4 bits and are added as float32.
    Source: Douillard et al., "Streaming DiLoCo with overlapping communication", arXiv 2501.18512.
    """

    name = "streaming-diloco"
    modes = ("sync",)
    exchanges = "movements"
    uses: ClassVar[Mapping[str, object]] = {"value_type": "int4"}

    @dataclass(frozen=True, kw_only=True)
    class Options(Diloco.Options):
        """The schedule of the fragments, the outer optimizer and the mixing."""

        fragments: int = option(4, "F, fragments of the model", bounds=at_least(1))
        overlap: int = option(1, "tau, steps computed while a fragment travels", bounds=at_least(1))
        alpha: float = option(0.5, "share that local weights keep", bounds=Bounds(0, 1 - 1e-9, "in [0, 1)"))

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.overlap > self.h:
                raise UserError(f"--{self.table}.overlap {self.overlap}: must be at most --{self.table}.h {self.h}")

    options: Options

    def start(self, plan: Plan) -> Streaming:
        zeros, parts = np.zeros(plan.layout.size, np.float32), fragments(plan.layout, self.options.fragments)
        return Streaming(plan, zeros, zeros.copy(), Arrived(len(zeros)), parts)

    def before_compute(self, state: Streaming, step: int, weights: Weights, links: LinkViews) -> Outbox:
        """The pseudo-gradients of the fragments that are due, to every peer."""
        if step == 0:
            state.anchor[:] = weights()
        due = [] if state.posted == step else self._due(state, step)
        if not due:
            return {}
        state.posted = step
        indices = np.concatenate([np.arange(part.start, part.stop, dtype=np.uint32) for part in due])
        value_type = state.plan.config.value_type or "int4"
        moved = (state.anchor - weights())[indices] / np.float32(len(state.plan.ranks))
        sent = rounded_entries(Entries(len(state.anchor), moved, indices), value_type)
        state.arrived.add(state.plan.rank, sent)
        return dict.fromkeys(links, Outgoing(entries=sent, quality=100 * len(sent) / sent.size, value_type=value_type))

    def may_advance(self, state: Streaming, step: int, inbox: Inbox) -> bool:
        """With all peers' fragments that are applied after this step."""
        sent = step + 1 - self.options.overlap
        return not self._due(state, sent) or all(newest >= sent for newest in inbox.newest.values())

    def incoming(self, state: Streaming, local: LocalUpdate, weights: Weights, messages: Sequence[Message]) -> Effect:
        """A local step. Fragments that have arrived are kept until they are due."""
        for message in messages:
            state.arrived.add(message.header.sender, message.entries)
        return Effect(movement=local.vector)

    def between(self, state: Streaming, local: LocalUpdate, weights: Weights) -> Effect | None:
        """The outer step on the fragments that were sent tau steps ago."""
        due, own = self._due(state, local.step + 1 - self.options.overlap), self.options
        if not due:
            return None
        mixed = weights()
        for part in due:
            moved, eta, mu = state.arrived.take(part), own.outer_learning_rate, own.outer_momentum
            nesterov(state.anchor[part], state.momentum[part], moved, learning_rate=eta, decay=mu)
            mixed[part] = np.float32(own.alpha) * mixed[part] + np.float32(1 - own.alpha) * state.anchor[part]
        return Effect(weights=mixed)

    def _due(self, state: Streaming, step: int) -> list[slice]:
        """The fragments that are sent before ``step``; none before the first."""
        h, parts = self.options.h, state.fragments
        return [part for p, part in enumerate(parts) if step > 0 and step % h == p * h // len(parts)]
