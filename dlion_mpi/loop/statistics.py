"""Averages of the statistics, such as those of batch normalisation, over all workers.

Every worker's batches move its own statistics. Rounds in the background bring them together while the workers train
(`loop/averages.py`), so that tests see nearly the same model everywhere. After the last step they are averaged once
more, exactly. A worker counts with the samples of its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dlion_mpi.loop.ports import Replica
from dlion_mpi.vector.layout import Vector


def weighted(statistics: Vector, samples: int) -> Vector:
    """The addend of a worker, (S + 1,) float32: statistics times samples, then the samples. `mean` divides the sum.

    A worker whose statistics are not finite counts nothing, so that it does not spoil those of all others.
    """
    if not np.isfinite(statistics).all():
        return np.zeros(len(statistics) + 1, np.float32)
    return np.append(statistics, np.float32(1)) * np.float32(samples)


def mean(total: Vector) -> Vector | None:
    """The mean, (S,) float32, of a sum of addends. None if no worker counts."""
    return total[:-1] / total[-1] if total[-1] > 0 else None


def average(replicas: Sequence[Replica], samples: Sequence[int]) -> None:
    """Set the statistics of replicas in one process to their mean, and the averages of their weights."""
    for accesses in zip(*map(_kept, replicas), strict=True):
        own = [read() for read, _ in accesses]
        if len(own) > 1 and len(own[0]):
            total: Vector = np.add.reduce([weighted(s, b) for s, b in zip(own, samples, strict=True)])
            if (everywhere := mean(total)) is not None:
                for _, write in accesses:
                    write(everywhere)


def settle(replica: Replica, samples: int, mean_of: Callable[[Vector], Vector]) -> None:
    """Set the statistics of this worker to the mean of all workers, which call this together.

    The same for the averages of the weights, if the optimizer keeps them. ``mean_of``: the mean of all workers'
    vectors, such as `mpi.ranks.Ranks.mean`.
    """
    for read, write in _kept(replica):
        own = read()
        if len(own) and (everywhere := mean(mean_of(weighted(own, samples)))) is not None:
            write(everywhere)


def _kept(replica: Replica) -> list[tuple[Callable[[], Vector], Callable[[Vector], None]]]:
    return [(replica.statistics, replica.set_statistics), (replica.averages, replica.set_averages)]
