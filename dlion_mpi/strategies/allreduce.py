"""Synchronous SGD by an all-reduce: one sum over all workers, no messages between two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from dlion_mpi.strategies.contract import EQUAL_BATCHES, SUMMED_TYPES, Strategy
from dlion_mpi.strategies.state import State
from dlion_mpi.strategies.types import Effect, Inbox, LocalUpdate, Sum, Sums, Weights
from dlion_mpi.wire import Message


class AllReduce(Strategy):
    """``w <- w - eta sum_j (LBS_j / GBS) g_j`` with every worker's whole gradient of the same step.

    The sum is a ring's: a worker sends 2 (n - 1) / n of a gradient per step, whatever n is. With ``--value-type``
    values travel as 16 bits. Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
    workstations" (2009).
    """

    name = "allreduce"
    modes = ("sync",)
    uses: ClassVar[Mapping[str, object]] = {**EQUAL_BATCHES, "value_type": "float32"}
    value_types = SUMMED_TYPES

    def may_advance(self, state: State, step: int, inbox: Inbox) -> bool:
        return True  # the sum is what a step waits for

    def incoming(self, state: State, local: LocalUpdate, weights: Weights, messages: Sequence[Message]) -> Sums[Effect]:
        value_type = state.plan.config.value_type or "float32"
        total = yield Sum(local.vector * np.float32(local.lbs / local.gbs), value_type)
        return Effect(gradient=total)


class Horovod(AllReduce):
    """The same sum, computed by Horovod; see `mpi.horovod`. Source: Sergeev and Del Balso, arXiv 1802.05799."""

    name = "horovod"
    uses = EQUAL_BATCHES
    summed_by = "horovod"
