"""Synchronous SGD by an all-reduce: one sum over all workers, no messages between two."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dlion_mpi.strategies.contract import EQUAL_BATCHES, Strategy
from dlion_mpi.strategies.state import State
from dlion_mpi.strategies.types import Effect, Inbox, LocalUpdate, Sum, Sums, Weights
from dlion_mpi.wire import Message


class AllReduce(Strategy):
    """``w <- w - eta sum_j (LBS_j / GBS) g_j`` with every worker's whole gradient of the same step.

    The sum is a ring's: a worker sends 2 (n - 1) / n of a gradient per step, whatever n is. Source: Patarasuk and Yuan,
    "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009).
    """

    name = "allreduce"
    modes = ("sync",)
    uses = EQUAL_BATCHES

    def may_advance(self, state: State, step: int, inbox: Inbox) -> bool:
        return True  # the sum is what a step waits for

    def incoming(self, state: State, local: LocalUpdate, weights: Weights, messages: Sequence[Message]) -> Sums[Effect]:
        total = yield Sum(local.vector * np.float32(local.lbs / local.gbs))
        return Effect(gradient=total)


class Horovod(AllReduce):
    """The same sum, computed by Horovod; see `mpi.horovod`. Source: Sergeev and Del Balso, arXiv 1802.05799."""

    name = "horovod"
    summed_by = "horovod"
