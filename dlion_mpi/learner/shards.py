"""Loading shards: by the name of a data set, by path, or from a function."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dlion_mpi import plugins
from dlion_mpi.errors import UserError
from dlion_mpi.learner.batch import RowNumbers
from dlion_mpi.learner.given import shard_of_fit
from dlion_mpi.learner.named import NAMES, open_named
from dlion_mpi.learner.partition import check_partition, partition_rows
from dlion_mpi.learner.paths import open_path, open_shard
from dlion_mpi.learner.shard import Shard as Shard
from dlion_mpi.learner.shard import check_alike as check_alike
from dlion_mpi.learner.shard import merge_facts as merge_facts
from dlion_mpi.learner.source import Source, may_be_classes
from dlion_mpi.learner.windows import Windows, memory_bytes

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
PARTS = ("train", "validation", "class_weight")


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

    ``spec``: the name of a data set (`named.NAMES`), a path (`paths.open_path`), a path with ``{rank}`` in it for one
    per rank, or the PACKAGE.MODULE:FUNCTION of a function (rank, ranks) -> (train, validation), or a dict of the
    arguments of `shard_of_fit`. What a path with ``{rank}`` or a function gives is the rank's shard as it is, and takes
    no ``partition``. Raises UserError for data that is missing, damaged or unfit, ValueError unless 0 <= rank < ranks.
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
    if FUNCTION.fullmatch(spec) and not os.path.exists(spec) and open_named(spec) is None:
        if method != "iid":
            raise UserError(f"data {spec!r} is divided by its function: leave out the partition {method!r}")
        function = plugins.load("--data", spec, built_in=NAMES, kind="function")
        return [_shard_of_function(function, rank, ranks, spec) for rank in wanted]
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
        raise UserError(f"unknown data {spec!r}: it is neither one of {NAMES}, nor an existing path, nor a function")
    return open_path(path, os.path.basename(path.rstrip(os.sep)))


def _shard_of_function(function: Any, rank: int, ranks: int, spec: str) -> Shard:
    """The shard that a user's function returns. Raises UserError, also for what the function raises."""
    data = plugins.call("--data", spec, function, rank, ranks)
    if _are_x_and_y(data):
        raise UserError(f"--data {spec}: returned (x, y): return (train, validation), as ((x, y), None)")
    if isinstance(data, tuple) and len(data) == 2:
        data = dict(zip(PARTS, data, strict=False))
    if not isinstance(data, Mapping) or "train" not in data or not set(data) <= set(PARTS):
        raise UserError(
            f"--data {spec}: returned {type(data).__name__}: return (train, validation), or a dict of {PARTS}"
        )
    shard = shard_of_fit(**data)
    return replace(shard, name=spec)


def _are_x_and_y(data: Any) -> bool:
    """Whether these are two arrays with rows that differ, which cannot be training and validation data."""
    if not (isinstance(data, tuple) and len(data) == 2 and all(hasattr(part, "shape") for part in data)):
        return False
    first, second = (tuple(part.shape) for part in data)
    return first[1:] != second[1:]


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
