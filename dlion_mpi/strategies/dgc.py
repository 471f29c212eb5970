"""Deep Gradient Compression: the largest entries of accumulated gradients, with momentum corrected for the delay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dlion_mpi.algorithms.sparse import largest, take_out
from dlion_mpi.config.fields import Bounds, at_least, option
from dlion_mpi.strategies.contract import EQUAL_BATCHES, Strategy
from dlion_mpi.strategies.joint import joint
from dlion_mpi.strategies.options import StrategyOptions
from dlion_mpi.strategies.state import State, transient
from dlion_mpi.strategies.types import Effect, LinkViews, LocalUpdate, Outbox, Outgoing, Plan, Weights
from dlion_mpi.vector.layout import Entries, Vector
from dlion_mpi.wire import Message

FIRST, FACTOR = 0.25, 0.25
"""The density in the first stage of the warm-up, and the factor from one stage to the next."""


@dataclass(slots=True)
class DgcState(State):
    """``momentum``: (P,) float32, m of this worker. ``accumulated``: (P,) float32, v, not sent yet.

    ``kernels``: the variables of which few entries are sent; ``dense``: the places of all other entries. ``sent``: the
    entries of this step's message.
    """

    momentum: Vector
    accumulated: Vector
    kernels: list[slice] = transient()
    dense: np.ndarray = transient()
    sent: Entries = transient()


class Dgc(Strategy):
    """``m <- mu m + c g``, ``v <- v + m``; the largest entries of v in each variable are sent, and there ``v = m = 0``.

    c is the worker's share of the global batch. The optimizer of every worker gets the sum of all messages as its
    gradient, so the optimizer should have no momentum. Vectors and scalars (biases) are sent whole, with
    plain momentum. ``c g`` is clipped before, to ``clip / sqrt(n)``: then the sum of n that agree in nothing has the
    norm ``clip``. In the warm-up the density falls from 25 % by a factor of 4 from stage to stage.
    Source: Lin et al., "Deep Gradient Compression", ICLR 2018, arXiv 1712.01887, algorithm 4.
    """

    name = "dgc"
    modes = ("sync",)
    uses: ClassVar[Mapping[str, object]] = {**EQUAL_BATCHES, "value_type": "float32"}

    @dataclass(frozen=True, kw_only=True)
    class Options(StrategyOptions):
        """The density of messages, momentum and clipping."""

        density: float = option(0.001, "share of each variable that is sent", bounds=Bounds(1e-9, 1, "in (0, 1]"))
        warmup: int = option(5, "steps of each stage of the warm-up: 25, 6.25, ... %; 0: none", bounds=at_least(0))
        momentum: float = option(0.9, "mu of the momentum correction", bounds=Bounds(0, 1 - 1e-9, "in [0, 1)"))
        clip: float = option(0.0, "largest norm of the joint gradient; 0: no limit", bounds=at_least(0))

    options: Options

    def start(self, plan: Plan) -> DgcState:
        layout, size = plan.layout, plan.layout.size
        pairs = zip(layout.shapes, layout.starts, layout.starts[1:], strict=False)
        kernels = [slice(start, stop) for shape, start, stop in pairs if len(shape) > 1 and stop > start]
        whole = np.ones(size, np.bool_)
        for kernel in kernels:
            whole[kernel] = False
        zeros = np.zeros(size, np.float32)
        return DgcState(plan, zeros, zeros.copy(), kernels, np.flatnonzero(whole), Entries(size, zeros.copy()))

    def outgoing(self, state: DgcState, local: LocalUpdate, links: LinkViews) -> Outbox:
        """The largest entries to every peer."""
        own, workers = self.options, len(state.plan.ranks)
        gradient = np.float32(local.lbs / local.gbs) * local.vector
        state.momentum *= np.float32(own.momentum)
        state.momentum += clipped(gradient, own.clip / math.sqrt(workers))
        state.accumulated += state.momentum
        few = largest(state.accumulated, state.kernels, density(own.density, own.warmup, local.step))
        state.momentum[few] = 0
        indices = np.sort(np.concatenate([few, state.dense])).astype(np.uint32)
        value_type = state.plan.config.value_type or "float32"
        state.sent = take_out(state.accumulated, indices, value_type)
        quality = 100 * len(indices) / len(gradient)
        return dict.fromkeys(links, Outgoing(entries=state.sent, quality=quality, value_type=value_type))

    def incoming(self, state: DgcState, local: LocalUpdate, weights: Weights, messages: Sequence[Message]) -> Effect:
        if len(state.plan.ranks) == 1:
            return Effect(gradient=local.vector)
        return Effect(gradient=joint(state.sent, state.plan.rank, messages))


def density(last: float, stage_steps: int, step: int) -> float:
    """The share of each variable that is sent at ``step``, which counts from 0."""
    return max(last, FIRST * FACTOR ** (step // stage_steps)) if stage_steps else last


def clipped(gradient: Vector, norm: float) -> Vector:
    """The gradient, (P,) float32, shortened to ``norm`` if it is longer; 0: as it is."""
    length = float(np.linalg.norm(gradient))
    return gradient * np.float32(norm / length) if 0 < norm < length else gradient
