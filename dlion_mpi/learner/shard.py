"""Shards: the part of a data set that a rank owns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import optree

from dlion_mpi.errors import RunError, UserError
from dlion_mpi.learner.batch import Batch, joined
from dlion_mpi.learner.source import Labels, Table, class_labels
from dlion_mpi.learner.stream import Stream, failure, in_chunks
from dlion_mpi.learner.windows import Windows

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
        """The test rows in batches of ``chunk_rows``; at most ``most``: at even distances, or the first of a stream.

        Raises RunError if reading fails.
        """
        try:
            yield from self._tests(chunk_rows, most)
        except RunError:
            raise
        except Exception as error:
            text = str(error) if isinstance(error, UserError) else failure("the test data", error)
            raise RunError(text) from error

    def _tests(self, chunk_rows: int, most: int | None) -> Iterator[Batch]:
        if self.test is None:
            return
        if not isinstance(self.test, Table):
            pieces = self.test.pieces(np.random.default_rng(0), 0)
            yield from in_chunks(pieces, chunk_rows, most, self.test.where)
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
            raise UserError(
                f"the training data: rank {rank} has samples of {kind}, rank 0 of {kinds[0]}: they must be alike"
            )
