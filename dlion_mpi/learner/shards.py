"""Shards: the part of a data set that a rank owns."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import optree

from dlion_mpi.errors import UserError
from dlion_mpi.learner.batch import Batch, RowNumbers, joined
from dlion_mpi.learner.hdf5 import open_file, open_shard
from dlion_mpi.learner.named import NAMES, open_named
from dlion_mpi.learner.partition import check_partition, partition_rows
from dlion_mpi.learner.source import (
    Labels,
    Source,
    Table,
    class_labels,
    may_be_classes,
)
from dlion_mpi.learner.stream import Stream, in_chunks
from dlion_mpi.learner.windows import Windows, memory_bytes

Facts = tuple[int | None, ...]
"""Classes and samples of a rank, None where it has none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """One rank's training rows, and the whole test set.

    Rows are in a table, or come as a stream. ``test``: None if there are no test rows. ``has_labels``: whether the
    targets were read as class labels. ``classes``: number of classes; None if the targets are not classes.
    ``train_samples_global``: training rows of all ranks; None if a rank cannot count its rows. Both are equal on every
    rank, except before `with_facts`. ``source``: where it was read from, for people.
    """

    name: str
    source: str
    train: Table | Stream
    test: Table | Stream | None
    has_labels: bool = False
    classes: int | None = None
    train_samples_global: int | None = None

    @property
    def samples(self) -> int | None:
        """Training rows of this rank (m); None if they cannot be counted."""
        return self.train.rows

    @property
    def has_tests(self) -> bool:
        """Whether there are test rows."""
        return self.test is not None

    def example(self) -> Batch:
        """Two training rows; one row twice if there is only one."""
        return self._example

    @cached_property
    def _example(self) -> Batch:
        if not isinstance(self.train, Table):
            first = self.train.example()
            return first.part(0, 2) if first.rows > 1 else joined([first, first])
        if not self.train.rows:
            raise UserError("the shard has no training rows: give each rank some")
        return self.train.read(np.minimum(np.arange(2), self.train.rows - 1))

    @property
    def input_shape(self) -> Any:
        """Shape of one row's input: a tuple, or a structure of tuples for several inputs."""
        return optree.tree_map(lambda array: array.shape[1:], self.example().x)

    @property
    def kind(self) -> str:
        """Structure, shapes and types of the training rows."""
        return self.example().kind() + (", class labels" if self.has_labels else "")

    def class_labels(self) -> Labels | None:
        """The class of every training row, (m,); None if the targets are not classes."""
        table = self.table()
        return class_labels(table.read(np.arange(table.rows)).y)

    def table(self) -> Table:
        """The training rows, to read by number. Raises UserError for a stream that has no such numbers."""
        if isinstance(self.train, Table):
            return self.train
        if isinstance(self.train, Windows):
            return self.train.table
        raise UserError(f"{self.name} is read in one order only: give arrays or files")

    def tests(self, chunk_rows: int, most: int | None = None) -> Iterator[Batch]:
        """The test rows in batches of ``chunk_rows``; at most ``most``: at even distances, or the first of a stream."""
        if self.test is None:
            return
        if not isinstance(self.test, Table):
            yield from in_chunks(self.test.pieces(np.random.default_rng(0), 0), chunk_rows, most)
            return
        numbers = np.arange(self.test.rows)
        if most is not None and most < len(numbers):
            numbers = np.arange(most) * len(numbers) // most
        for start in range(0, len(numbers), chunk_rows):
            yield self.test.read(numbers[start : start + chunk_rows])

    def describe(self) -> str:
        """Name, source and number of training rows, for people."""
        rows = self.train_samples_global
        return f"{self.name} from {self.source}, {'uncounted' if rows is None else f'{rows:,}'} training samples"

    def with_facts(self, classes: int | None, train_samples_global: int | None) -> Shard:
        """The same shard, knowing what ``merge_facts`` found over all ranks."""
        return replace(self, classes=classes, train_samples_global=train_samples_global)


def merge_facts(facts: Sequence[Facts]) -> tuple[int | None, int | None]:
    """(classes, samples) of each rank -> (most classes, all samples together), None where a rank has none."""
    classes = [most for most, _ in facts if most is not None]
    samples = [rows for _, rows in facts if rows is not None]
    return (
        max(classes) if len(classes) == len(facts) else None,
        sum(samples) if len(samples) == len(facts) else None,
    )


def check_alike(kinds: Sequence[str]) -> None:
    """Raise UserError unless the samples of all ranks are of the same kind (structure, shape and type)."""
    for rank, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise UserError(f"--data: rank {rank} has samples of {kind}, rank 0 of {kinds[0]}: they must be alike")


def load(
    spec: str,
    *,
    rank: int,
    ranks: int,
    partition: str = "iid",
    alpha: float = 0.5,
    seed: int = 0,
    local_ranks: int | None = None,
) -> Shard:
    """One rank's shard of the data set that ``spec`` names.

    ``local_ranks``: ranks of this machine, which share its memory; all if it is None.

    ``spec``: ``fashion-mnist``, ``digits``, ``cifar10``, ``cifar10:FOLDER``, an HDF5 file, or a path with
    ``{rank}`` in it for one HDF5 file per rank. Such a file is that rank's shard as it stands, and takes no
    ``partition``. Raises UserError for data that is missing, damaged or unfit, ValueError unless
    0 <= rank < ranks.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} is not one of {ranks} ranks")
    memory = memory_bytes(local_ranks or ranks)
    return _load(spec, [rank], ranks, partition, alpha, seed, memory)[0]


def load_shards(spec: str, *, ranks: int, partition: str = "iid", alpha: float = 0.5, seed: int = 0) -> list[Shard]:
    """The shards of all ranks, as ``load`` gives them with the facts merged.

    For tools and the simulator: a data set is opened once, not once per rank, and its test images are shared.
    """
    shards = _load(spec, range(ranks), ranks, partition, alpha, seed, memory_bytes(ranks))
    facts = merge_facts([(shard.classes, shard.samples) for shard in shards])
    return [shard.with_facts(*facts) for shard in shards]


def _load(
    spec: str, wanted: Sequence[int], ranks: int, method: str, alpha: float, seed: int, memory: int
) -> list[Shard]:
    check_partition(method, alpha, seed)
    if "{rank}" in spec:
        if method != "iid":
            raise UserError(f"data {spec!r} is already divided by rank: leave out the partition {method!r}")
        sources = [open_shard(spec, rank, ranks) for rank in wanted]
        return [_shard(source, np.arange(source.train.rows), memory) for source in sources]
    source = _open(spec)
    if source.labels is None and method == "dirichlet":
        raise UserError(f"data {spec!r} has no classes and no groups to deal by: use --partition iid")
    labels = np.zeros(source.train.rows, np.int64) if source.labels is None else source.labels
    dealt = partition_rows(labels, ranks=ranks, method=method, alpha=alpha, seed=seed)
    return [_shard(source, dealt[rank], memory) for rank in wanted]


def _open(spec: str) -> Source:
    named = open_named(spec)
    if named is not None:
        return named
    path = os.path.expanduser(spec)
    if not os.path.exists(path):
        raise UserError(f"unknown data {spec!r}: it is neither one of {NAMES} nor an existing file")
    return open_file(path, os.path.basename(path))


def _shard(source: Source, rows: RowNumbers, memory: int) -> Shard:
    """The shard of these rows, and all test rows. They are read now, if they take at most ``memory`` bytes."""
    part, test = source.train.part(rows), source.test
    fits = source.train.in_memory or part.rows * part.row_bytes <= memory
    train = part.loaded() if fits else Windows(part, memory, source.source)
    if test is not None and test.rows * test.row_bytes <= memory:
        test = test.loaded()
    return Shard(
        name=source.name,
        source=source.source,
        train=train,
        test=test,
        has_labels=source.classes is not None and may_be_classes(source.train.read(np.arange(1)).y),
        classes=source.classes,
        train_samples_global=source.train.rows,
    )
