"""Shards: the part of a data set that a rank owns, and how training rows are dealt out to ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dlion_mpi.errors import UserError
from dlion_mpi.learner.hdf5 import open_file, open_shard
from dlion_mpi.learner.named import NAMES, open_named
from dlion_mpi.learner.source import Labels, Pixels, Rows, Source, of_arrays

PARTITIONS = ("iid", "dirichlet")
LARGEST_ALPHA = 1e6


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """One rank's training rows, and the whole test set.

    ``x_train``: (m, *input_shape) uint8 or float32. ``y_train``: (m,) int32. ``x_test``, ``y_test``: the same
    for the test set. ``classes`` and ``train_samples_global`` are equal on every rank, except for shard files
    until ``with_facts``. ``source``: where it was read from, for people.
    """

    name: str
    x_train: Pixels
    y_train: Labels
    x_test: Pixels
    y_test: Labels
    classes: int
    train_samples_global: int
    source: str

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample: (F,) or (H, W, C)."""
        return self.x_train.shape[1:]

    @property
    def samples(self) -> int:
        """Training rows of this rank (m)."""
        return len(self.y_train)

    @property
    def kind(self) -> str:
        """Shape and type of the samples."""
        return f"{self.input_shape} {self.x_train.dtype}"

    def with_facts(self, classes: int, train_samples_global: int) -> Shard:
        """The same shard, knowing what ``merge_facts`` found over all ranks."""
        return replace(self, classes=classes, train_samples_global=train_samples_global)


def merge_facts(facts: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(classes, samples) of each rank -> (most classes, all samples together)."""
    return max(classes for classes, _ in facts), sum(samples for _, samples in facts)


def check_alike(kinds: Sequence[str]) -> None:
    """Raise UserError unless the samples of all ranks are of the same kind (shape and type)."""
    for rank, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise UserError(f"--data: rank {rank} has samples of {kind}, rank 0 of {kinds[0]}: they must be alike")


def load(spec: str, *, rank: int, ranks: int, partition: str = "iid", alpha: float = 0.5, seed: int = 0) -> Shard:
    """One rank's shard of the data set that ``spec`` names.

    ``spec``: ``fashion-mnist``, ``digits``, ``cifar10``, ``cifar10:FOLDER``, an HDF5 file, or a path with
    ``{rank}`` in it for one HDF5 file per rank. Such a file is that rank's shard as it stands, and takes no
    ``partition``. Raises UserError for data that is missing, damaged or unfit, ValueError unless
    0 <= rank < ranks.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} is not one of {ranks} ranks")
    return _load(spec, [rank], ranks, partition, alpha, seed)[0]


def load_shards(spec: str, *, ranks: int, partition: str = "iid", alpha: float = 0.5, seed: int = 0) -> list[Shard]:
    """The shards of all ranks, as ``load`` gives them with the facts merged.

    For tools and the simulator: a data set is opened once, not once per rank, and its test images are shared.
    """
    shards = _load(spec, range(ranks), ranks, partition, alpha, seed)
    facts = merge_facts([(shard.classes, shard.samples) for shard in shards])
    return [shard.with_facts(*facts) for shard in shards]


def shard_of_arrays(x_train: Any, y_train: Any, x_test: Any, y_test: Any) -> Shard:
    """This rank's own arrays as a shard, held to the same rules as an HDF5 file.

    x: (m, F), (m, H, W) or (m, H, W, C) of uint8 or float. y: (m,) integers. Raises UserError otherwise.
    """
    source = of_arrays(x_train, y_train, x_test, y_test)
    return _shard(source, np.arange(len(source.y_train)))


def partition_rows(
    labels: npt.NDArray[Any], *, ranks: int, method: str = "iid", alpha: float = 0.5, seed: int = 0
) -> list[Rows]:
    """Deal rows out to ranks: each row to exactly one rank, no rank left empty, the same result everywhere.

    ``labels``: (m,) integers. Gives, per rank, ascending row numbers. ``iid``: a seeded permutation, shares
    that differ by at most one row. ``dirichlet``: each class is split in proportions drawn from Dir(alpha):
    a small ``alpha`` gives each rank few classes; a rank left empty takes a row of the fullest. Raises
    UserError for fewer rows than ranks, an unknown method, or an alpha outside (0, 1e6].
    Source: Hsu, Qi and Brown, "Measuring the Effects of Non-Identical Data Distribution" (2019), per class.
    """
    _check_partition(method, alpha, seed)
    if len(labels) < ranks:
        remedy = f"use at most {len(labels)} ranks or more data"
        raise UserError(f"the data set has {len(labels)} training samples for {ranks} ranks: {remedy}")
    generator = np.random.default_rng(seed)
    if method == "iid":
        return [np.sort(rows) for rows in np.array_split(generator.permutation(len(labels)), ranks)]
    pieces: list[list[Rows]] = [[] for _ in range(ranks)]
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


def _check_partition(method: str, alpha: float, seed: int) -> None:
    if method not in PARTITIONS:
        raise UserError(f"--partition {method}: must be one of {', '.join(PARTITIONS)}")
    if not 0 < alpha <= LARGEST_ALPHA:
        raise UserError(f"--dirichlet-alpha {alpha:g}: must be above 0, up to {LARGEST_ALPHA:g}")
    if seed < 0:
        raise UserError(f"--seed {seed}: must be 0 or more")


def _load(spec: str, wanted: Sequence[int], ranks: int, method: str, alpha: float, seed: int) -> list[Shard]:
    _check_partition(method, alpha, seed)
    if "{rank}" in spec:
        if method != "iid":
            raise UserError(f"data {spec!r} is already divided by rank: leave out the partition {method!r}")
        sources = [open_shard(spec, rank, ranks) for rank in wanted]
        return [_shard(source, np.arange(len(source.y_train))) for source in sources]
    source = _open(spec)
    dealt = partition_rows(source.y_train, ranks=ranks, method=method, alpha=alpha, seed=seed)
    return [_shard(source, dealt[rank]) for rank in wanted]


def _open(spec: str) -> Source:
    named = open_named(spec)
    if named is not None:
        return named
    path = os.path.expanduser(spec)
    if not os.path.exists(path):
        raise UserError(f"unknown data {spec!r}: it is neither one of {NAMES} nor an existing file")
    return open_file(path, os.path.basename(path))


def _shard(source: Source, rows: Rows) -> Shard:
    return Shard(
        name=source.name,
        x_train=_with_channels(source.read_train(rows)),
        y_train=source.y_train[rows].astype(np.int32),
        x_test=_with_channels(source.x_test),
        y_test=source.y_test.astype(np.int32),
        classes=source.classes,
        train_samples_global=len(source.y_train),
        source=source.source,
    )


def _with_channels(x: Pixels) -> Pixels:
    """Images (m, H, W) -> (m, H, W, 1); everything else as it is."""
    return x.reshape(*x.shape, 1) if x.ndim == 3 else x
