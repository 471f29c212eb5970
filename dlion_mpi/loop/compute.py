"""Computation of a worker's request by its replica: what the drivers of real, simulated and tested runs share."""

from __future__ import annotations

from dlion_mpi.loop.ports import Compute, Replica
from dlion_mpi.vector.gradient import Gradient


def answer(request: Compute, replica: Replica) -> Gradient:
    """Compute what is requested. The vector of a whole training step is empty."""
    if request.kind == "alone":
        return replica.step_alone(request.batch)
    return replica.movement(request.batch) if request.kind == "movements" else replica.gradient(request.batch)
