"""``dlion data``: write shard files for micro-clouds, and show what a data set holds and how it is dealt."""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from dlion_mpi.config.fields import convert
from dlion_mpi.config.options import FIELDS
from dlion_mpi.errors import UserError

if TYPE_CHECKING:
    from dlion_mpi.learner.shards import Shard

_COUNTED_CLASSES = 20  # beyond that a table of counts no longer fits a terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions of `dlion data` and their options."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    splitter = _add_action(actions, "split", "write one HDF5 shard file per rank", split_main)
    splitter.add_argument("--ranks", required=True, help="number of ranks")
    splitter.add_argument("--out", required=True, help="for example 'shard-{rank}.h5'")
    splitter.add_argument("--overwrite", action="store_true", help="replace shard files that exist")
    shower = _add_action(actions, "info", "what a data set holds, and what every rank would get", info_main)
    shower.add_argument("--ranks", default="1", help="number of ranks (default: 1)")


def _add_action(actions: Any, name: str, text: str, main: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("data", help="as --data of dlion train")
    parser.add_argument("--partition", default="iid", metavar="iid|dirichlet", help="(default: iid)")
    parser.add_argument("--dirichlet-alpha", default="0.5", help="smaller is more unequal (default: 0.5)")
    parser.add_argument("--seed", default="0", help="(default: 0)")
    parser.set_defaults(action=main)
    return parser


def split_main(args: argparse.Namespace) -> int:
    """Run ``dlion data split``. Returns the exit code."""
    for path in split(args.data, args.out, **_partition(args), overwrite=args.overwrite):
        print(path)
    return 0


def info_main(args: argparse.Namespace) -> int:
    """Run ``dlion data info``. Returns the exit code."""
    print(info(args.data, **_partition(args)))
    return 0


def _partition(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `split` and `info` that say how rows are dealt. Raises UserError."""
    try:
        ranks = int(args.ranks)
    except ValueError:
        raise UserError(f"--ranks {args.ranks}: must be a whole number") from None
    return {
        "ranks": ranks,
        "partition": args.partition,
        "alpha": convert(FIELDS["dirichlet_alpha"], args.dirichlet_alpha),
        "seed": convert(FIELDS["seed"], args.seed),
    }


def split(
    spec: str,
    out_pattern: str,
    *,
    ranks: int,
    partition: str = "iid",
    alpha: float = 0.5,
    seed: int = 0,
    overwrite: bool = False,
) -> list[str]:
    """Write one HDF5 shard file per rank. Returns their names in the order of ranks.

    ``out_pattern``: a path with ``{rank}`` in it; missing folders are made. Every file holds its rank's
    training rows and the whole test set, so that each micro-cloud can evaluate by itself. A file appears
    under its name only when it is complete. Raises UserError for data that ``load`` refuses, shard files as
    input, a pattern without ``{rank}``, a file that exists (unless ``overwrite``) or cannot be written.
    """
    from dlion_mpi.learner.shards import load_shards

    if "{rank}" in spec:
        raise UserError(f"data {spec!r} is already split: name a data set or one HDF5 file")
    if "{rank}" not in out_pattern:
        raise UserError(f"--out {out_pattern} would be one file for all ranks: put {{rank}} in its name")
    _check_ranks(ranks)
    pattern = os.path.expanduser(out_pattern)
    paths = [pattern.replace("{rank}", str(rank)) for rank in range(ranks)]
    for path in paths:
        if os.path.exists(path) and not overwrite:
            raise UserError(f"{path} exists already: give another --out, or replace it with --overwrite")
    shards = load_shards(spec, ranks=ranks, partition=partition, alpha=alpha, seed=seed)
    how: dict[str, str | float] = {"partition": partition, "alpha": alpha, "seed": seed, "ranks": ranks}
    for rank, (path, shard) in enumerate(zip(paths, shards, strict=True)):
        try:
            _write(path, shard, {**how, "rank": rank})
        except OSError as error:
            reason = error.strerror or str(error).splitlines()[0]
            raise UserError(f"{path} cannot be written ({reason}): choose another place") from error
    return paths


def _write(path: str, shard: Shard, attributes: dict[str, str | float]) -> None:
    """Write under a temporary name, then rename: readers see the whole file or none."""
    import h5py

    from dlion_mpi.learner import hdf5
    from dlion_mpi.learner.source import Table

    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with h5py.File(temporary, "w") as file:
            hdf5.write(file, shard.table(), "_train")
            if isinstance(shard.test, Table):
                hdf5.write(file, shard.test, "_test")
            classes = {} if shard.classes is None else {"classes": shard.classes}
            file.attrs.update({**classes, "source": shard.source, **attributes})
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(folder)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _fsync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def info(spec: str, *, ranks: int = 1, partition: str = "iid", alpha: float = 0.5, seed: int = 0) -> str:
    """A table for people: what the data set is, and the rows and class counts that each rank gets.

    For shard files, all that exist from rank 0 on are shown, and at least ``ranks``. The data is read and
    checked as in a run. Raises UserError as ``load`` does.
    """
    from dlion_mpi.learner.shards import load_shards

    _check_ranks(ranks)
    is_sharded = "{rank}" in spec
    if is_sharded:
        while os.path.exists(os.path.expanduser(spec.replace("{rank}", str(ranks)))):
            ranks += 1
    shards = load_shards(spec, ranks=ranks, partition=partition, alpha=alpha, seed=seed)
    first = shards[0]
    dealt = {"iid": f"iid, seed {seed}", "dirichlet": f"dirichlet, alpha {alpha:g}, seed {seed}"}[partition]
    facts = {
        "name": first.name,
        "source": first.source if not is_sharded else f"{ranks} shard files",
        **first.example().kinds(),
        "classes": "none" if first.classes is None else str(first.classes),
        "train rows": str(first.train_samples_global),
        "test rows": str(0 if first.test is None else first.test.rows),
        "partition": "one file per rank" if is_sharded else dealt,
    }
    width = max(12, *(len(key) + 2 for key in facts))
    lines = [f"{key:<{width}}{fact}" for key, fact in facts.items()]
    return "\n".join([*lines, "", *_rank_table(shards)])


def _check_ranks(ranks: int) -> None:
    if ranks < 1:
        raise UserError(f"--ranks {ranks}: must be at least 1")


def _rank_table(shards: list[Shard]) -> list[str]:
    """One line per rank: its rows, and the rows of each class; for many classes, how many classes it has."""
    classes = shards[0].classes
    labels = [None if classes is None else shard.class_labels() for shard in shards]
    counts = [np.bincount(y, minlength=classes or 0) for y in labels if y is not None]
    if len(counts) < len(shards) or classes is None:
        headings, cells = list[str](), [list[int]() for _ in shards]
    elif classes <= _COUNTED_CLASSES:
        headings = [f"class {label}" for label in range(classes)]
        cells = [row.tolist() for row in counts]
    else:
        headings = ["classes present", "rows of the largest"]
        cells = [[int(np.count_nonzero(row)), int(row.max())] for row in counts]
    table = [["rank", "rows", *headings]]
    table += [[str(rank), str(shards[rank].samples), *map(str, row)] for rank, row in enumerate(cells)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
