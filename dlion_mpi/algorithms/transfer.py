"""Direct knowledge transfer: the best worker, the workers that merge its weights, and the merge. All pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dlion_mpi.vector.layout import Vector


def best(losses: Sequence[float]) -> int | None:
    """Return the position of the lowest finite mean loss, the first of equals; None if there is none."""
    finite = np.where(np.isfinite(losses), losses, np.inf)
    k = int(np.argmin(finite))
    return k if np.isfinite(finite[k]) else None


def merges(policy: str, losses: Sequence[float], k: int) -> bool:
    """Whether worker ``k`` merges the best worker's weights.

    ``losses``: (n,) each worker's mean of recent losses. ``policy``: all, worse-than-mean, worst or none.
    Source: DLion, direct knowledge transfer; the policies are ours.
    """
    # A loss that is not finite is the worst there is.
    values = np.where(np.isfinite(losses), losses, np.inf)
    source = best(losses)
    if source is None or k == source or policy == "none":
        return False
    if policy == "all":
        return True
    if policy == "worse-than-mean":
        return bool(values[k] > values[np.isfinite(values)].mean())
    if policy == "worst":
        return k == int(np.argmax(values))
    raise ValueError(f"unknown transfer policy '{policy}'")


def merge(own: Vector, best_weights: Vector, merge_share: float) -> Vector:
    """Return ``w - lambda (w - w_best)``, (P,) float32, lambda = ``merge_share`` in [0, 1].

    Source: DLion (HPDC 2021), direct knowledge transfer.
    """
    return own - np.float32(merge_share) * (own - best_weights)
