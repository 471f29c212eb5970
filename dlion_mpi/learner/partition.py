"""Dealing training rows out to ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dlion_mpi.errors import UserError
from dlion_mpi.learner.batch import RowNumbers

PARTITIONS = ("iid", "dirichlet")
LARGEST_ALPHA = 1e6


def partition_rows(
    labels: npt.NDArray[Any], *, ranks: int, method: str = "iid", alpha: float = 0.5, seed: int = 0
) -> list[RowNumbers]:
    """Deal rows out to ranks: each row to exactly one rank, no rank left empty, the same result everywhere.

    ``labels``: (m,) integers, the class of each row or its group. Gives, per rank, ascending row numbers. ``iid``: a
    seeded permutation, shares that differ by at most one row. ``dirichlet``: each class is split in proportions drawn
    from Dir(alpha): a small ``alpha`` gives each rank few classes; a rank left empty takes a row of the fullest. Raises
    UserError for fewer rows than ranks, an unknown method, or an alpha outside (0, 1e6].
    Source: Hsu, Qi and Brown, "Measuring the Effects of Non-Identical Data Distribution" (2019), per class.
    """
    check_partition(method, alpha, seed)
    if len(labels) < ranks:
        remedy = f"use at most {len(labels)} ranks or more data"
        raise UserError(f"the data set has {len(labels)} training samples for {ranks} ranks: {remedy}")
    generator = np.random.default_rng(seed)
    if method == "iid":
        return [np.sort(rows) for rows in np.array_split(generator.permutation(len(labels)), ranks)]
    pieces: list[list[RowNumbers]] = [[] for _ in range(ranks)]
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        proportions = generator.dirichlet(np.full(ranks, alpha))
        cuts = np.rint(np.cumsum(proportions)[:-1] * len(rows)).astype(np.int64)
        for rank, piece in enumerate(np.split(rows, cuts)):
            pieces[rank].append(piece)
    dealt = [np.sort(np.concatenate(piece)) for piece in pieces]
    for rank in range(ranks):
        if len(dealt[rank]) == 0:
            fullest = max(range(ranks), key=lambda other: len(dealt[other]))
            dealt[rank], dealt[fullest] = dealt[fullest][-1:], dealt[fullest][:-1]
    return dealt


def check_partition(method: str, alpha: float, seed: int) -> None:
    """Raise UserError for an unknown method or a number out of range."""
    if method not in PARTITIONS:
        raise UserError(f"--partition {method}: must be one of {', '.join(PARTITIONS)}")
    if not 0 < alpha <= LARGEST_ALPHA:
        raise UserError(f"--dirichlet-alpha {alpha:g}: must be above 0, up to {LARGEST_ALPHA:g}")
    if seed < 0:
        raise UserError(f"--seed {seed}: must be 0 or more")
