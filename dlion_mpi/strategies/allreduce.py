"""Synchronous SGD by an all-reduce: no messages between two, but one sum over all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dlion_mpi.strategies.contract import Effect, Inbox, LinkView, LocalGradient, Outgoing, Plan, Strategy
from dlion_mpi.vector.layout import Vector
from dlion_mpi.vector.named_arrays import Array, Arrays
from dlion_mpi.wire import Message


@dataclass(slots=True)
class AllReduceState:
    """``share``: this worker's part of the step's gradient, then the sum of all, (P,) float32."""

    share: Vector


class AllReduce(Strategy):
    """``w <- w - eta sum_j (LBS_j / GBS) g_j``: equal batches, everyone's whole gradient of the same step.

    The sum is a ring's: a worker sends 2 (n - 1) / n of a gradient per step, however many they are. Source:
    Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009).
    """

    name: ClassVar[str] = "allreduce"
    restates: ClassVar[bool] = False
    sync_modes: ClassVar[tuple[str, ...]] = ("sync",)
    defaults: ClassVar[Mapping[str, object]] = {}

    def start(self, plan: Plan) -> AllReduceState:
        """See `Strategy.start`."""
        return AllReduceState(np.empty(plan.layout.size, np.float32))

    def outgoing(
        self, state: AllReduceState, local: LocalGradient, links: Mapping[int, LinkView]
    ) -> tuple[AllReduceState, dict[int, Outgoing]]:
        """Nothing to anyone in particular."""
        np.multiply(local.vector, np.float32(local.lbs / local.gbs), out=state.share)
        return state, {}

    def incoming(
        self, state: AllReduceState, local: LocalGradient, weights: Callable[[], Vector], messages: Sequence[Message]
    ) -> tuple[AllReduceState, Effect]:
        """The sum of everyone's shares."""
        return state, Effect(share=state.share)

    def may_advance(self, state: AllReduceState, step: int, inbox: Inbox) -> bool:
        """At once: it is the sum that is waited for."""
        return True

    def to_arrays(self, state: AllReduceState) -> Arrays:
        """Nothing: between steps there are only buffers."""
        return {}

    def from_arrays(self, state: AllReduceState, arrays: Mapping[str, Array]) -> AllReduceState:
        """See `Resumable.from_arrays`."""
        return state


class Horovod(AllReduce):
    """The same sum, by Horovod; see `horovod_baseline`. Source: Sergeev and Del Balso, arXiv 1802.05799."""

    name: ClassVar[str] = "horovod"
