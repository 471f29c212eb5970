"""Computation of a worker's request by its replica: what the drivers of real, simulated and tested runs share."""

from __future__ import annotations

from dlion_mpi.loop.ports import Compute, Replica
from dlion_mpi.vector.layout import Vector


def answer(request: Compute, replica: Replica) -> tuple[float, Vector | None, bool]:
    """Compute what is requested. Returns the loss, the vector (None: it was applied), and whether both are finite."""
    if request.kind == "alone":
        loss, finite = replica.step_alone(request.batch)
        return loss, None, finite
    update = replica.movement(request.batch) if request.kind == "movements" else replica.gradient(request.batch)
    return update.loss, update.vector, update.finite
