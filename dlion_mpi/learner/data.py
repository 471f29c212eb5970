"""Data sets, the part of one that a rank owns, and batches of changing size drawn from that part.

``load`` opens a data set, deals its training rows out with ``partition_rows`` and reads the rows of one rank.
Nothing read here is unpickled: the formats are IDX, CIFAR's binary records and HDF5.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import os
import socket
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from dlion_mpi.errors import UserError

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]
Rows = npt.NDArray[np.int64]

NAMES = "fashion-mnist, digits, cifar10, cifar10:FOLDER"
DATASETS = ("x_train", "y_train", "x_test", "y_test")
PARTITIONS = ("iid", "dirichlet")
LARGEST_ALPHA = 1e6
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_CIFAR10_RECORD_BYTES = 1 + 3 * 32 * 32
_DOWNLOAD_TIMEOUT_S = 15.0
_BLOCK_BYTES = 16 << 20
_SELECTION_ROWS = 256  # h5py's time grows with the square of an index list: 4 s for 15,000 rows at once


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """One rank's training rows, and the whole test set.

    ``x_train``: (m, *input_shape) uint8 or float32. ``y_train``: (m,) int32. ``x_test``, ``y_test``: the same
    for the test set. ``classes`` and ``train_samples_global`` are equal on every rank, except for shard files
    until ``with_facts``. ``source``: where it was read from, for humans.
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

    def with_facts(self, classes: int, train_samples_global: int) -> Shard:
        """The same shard, knowing what ``merge_facts`` found over all ranks."""
        return replace(self, classes=classes, train_samples_global=train_samples_global)


def merge_facts(facts: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(classes, samples) of each rank -> (most classes, all samples together)."""
    return max(classes for classes, _ in facts), sum(samples for _, samples in facts)


@dataclass(frozen=True, eq=False)
class _Source:
    """An open data set: labels and test set in memory, training images read for the rows asked for."""

    name: str
    source: str
    classes: int
    y_train: npt.NDArray[Any]
    x_test: Pixels
    y_test: npt.NDArray[Any]
    read_train: Callable[[Rows], Pixels]

    def shard(self, rows: Rows) -> Shard:
        return Shard(
            name=self.name,
            x_train=_with_channels(self.read_train(rows)),
            y_train=self.y_train[rows].astype(np.int32),
            x_test=_with_channels(self.x_test),
            y_test=self.y_test.astype(np.int32),
            classes=self.classes,
            train_samples_global=len(self.y_train),
            source=self.source,
        )


def _with_channels(x: Pixels) -> Pixels:
    """Images (m, H, W) -> (m, H, W, 1); everything else as it is."""
    return x.reshape(*x.shape, 1) if x.ndim == 3 else x


def load(spec: str, *, rank: int, ranks: int, partition: str = "iid", alpha: float = 0.5, seed: int = 0) -> Shard:
    """One rank's shard of the data set that ``spec`` names.

    ``spec``: ``fashion-mnist``, ``digits``, ``cifar10``, ``cifar10:FOLDER``, an HDF5 file, or a path with
    ``{rank}`` in it for one HDF5 file per rank; such a file is that rank's shard as it stands, so it takes no
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
    source = "arrays in memory"
    parts = {name: np.asarray(part) for name, part in zip(DATASETS, (x_train, y_train, x_test, y_test), strict=True)}
    _check(parts, source)
    y_train, y_test, classes = _labels(parts, None, source)
    test, train = (_read_rows(parts[name], np.arange(len(parts[name])), name, source) for name in ("x_test", "x_train"))
    return _Source("arrays", source, classes, y_train, test, y_test, lambda _: train).shard(np.arange(len(train)))


def _load(spec: str, wanted: Sequence[int], ranks: int, method: str, alpha: float, seed: int) -> list[Shard]:
    _check_partition(method, alpha, seed)
    if "{rank}" in spec:
        sources = [_open_shard_file(spec, rank, ranks, method) for rank in wanted]
        return [source.shard(np.arange(len(source.y_train))) for source in sources]
    source = _open(spec)
    dealt = partition_rows(source.y_train, ranks=ranks, method=method, alpha=alpha, seed=seed)
    return [source.shard(dealt[rank]) for rank in wanted]


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


class Batches:
    """An endless source of batches of changing size from a shard.

    Every epoch walks a new permutation of the shard, derived from (seed, rank, epoch) alone; a batch that
    crosses the border takes the rest of one epoch and the start of the next.
    """

    def __init__(self, shard: Shard, *, seed: int, rank: int) -> None:
        if shard.samples == 0:
            raise UserError("the shard has no training rows to draw batches from: give each rank some")
        self._shard = shard
        self._seed = seed
        self._rank = rank
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Go on with the first row of this epoch."""
        # A spawn key keeps this stream apart from the partition's, which the bare seed starts.
        sequence = np.random.SeedSequence(self._seed, spawn_key=(self._rank, epoch))
        self._order = np.random.default_rng(sequence).permutation(self._shard.samples)
        self._epoch = epoch
        self._position = 0

    def take(self, size: int) -> tuple[Pixels, Labels]:
        """The next ``size`` rows: x (size, *input_shape) in the dtype it is stored in, y (size,) int32.

        ``size`` may exceed the shard. Raises ValueError unless size >= 1.
        """
        if size < 1:
            raise ValueError(f"a batch needs at least 1 sample, not {size}")
        rows = self._next_rows(size)
        missing = size - len(rows)
        while missing:
            self.start_epoch(self._epoch + 1)
            more = self._next_rows(missing)
            rows = np.concatenate([rows, more])
            missing -= len(more)
        return self._shard.x_train[rows], self._shard.y_train[rows]

    def _next_rows(self, size: int) -> Rows:
        """At most ``size`` rows, as many as this epoch still has."""
        rows = self._order[self._position : self._position + size]
        self._position += len(rows)
        return rows

    def state(self) -> dict[str, int]:
        """What ``restore`` needs to go on with the very next row; JSON-able."""
        return {
            "seed": self._seed,
            "rank": self._rank,
            "samples": self._shard.samples,
            "epoch": self._epoch,
            "position": self._position,
        }

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on where ``state`` was taken.

        Raises UserError when the state is damaged or belongs to another seed, rank or shard size.
        """
        here = self.state()
        intact = set(state) == set(here) and all(type(n) is int and n >= 0 for n in state.values())
        if not intact or state["position"] > state["samples"]:
            raise UserError("the saved position in the data is damaged: resume from another checkpoint")
        for key in ("seed", "rank", "samples"):
            if (saved := state[key]) != here[key]:
                raise UserError(f"{key} was {saved}, is now {here[key]}: resume with the same data, seed and ranks")
        self.start_epoch(state["epoch"])
        self._position = state["position"]


def _open(spec: str) -> _Source:
    name, colon, folder = spec.partition(":")
    if spec == "fashion-mnist":
        return _open_fashion_mnist()
    if spec == "digits":
        return _open_digits()
    if name == "cifar10" and bool(folder) == bool(colon):
        return _open_cifar10(folder or os.environ.get("DLION_CIFAR10") or "cifar-10-batches-bin")
    path = os.path.expanduser(spec)
    if not os.path.exists(path):
        raise UserError(f"unknown data {spec!r}: it is neither one of {NAMES} nor an existing file")
    return _open_hdf5(path, os.path.basename(path))


def _open_shard_file(spec: str, rank: int, ranks: int, partition: str) -> _Source:
    if partition != "iid":
        raise UserError(f"data {spec!r} is already divided by rank: leave out the partition {partition!r}")
    path = os.path.expanduser(spec.replace("{rank}", str(rank)))
    if not os.path.exists(path):
        raise UserError(f"shard file {path} is missing: {ranks} ranks need one each, 0 to {ranks - 1}")
    with _hdf5(path) as file:
        written_for = file.attrs.get("ranks", ranks)
    if written_for != ranks:  # fewer ranks would silently train on a part of the data
        raise UserError(f"{path} is one of {written_for} shards: start {written_for} ranks, or split again")
    return _open_hdf5(path, os.path.basename(spec))


@contextlib.contextmanager
def _hdf5(path: str) -> Iterator[h5py.File]:
    """The open file; what HDF5 cannot read becomes a UserError."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError) as error:
        if "file signature not found" in str(error):
            raise UserError(f"{path} is not an HDF5 file: write one with {', '.join(DATASETS)}") from error
        reason = _first_line(error)
        raise UserError(f"{path} cannot be read ({reason}): if it is damaged, write it again") from error


def _open_hdf5(path: str, name: str) -> _Source:
    with _hdf5(path) as file:
        parts = {part: file.get(part) for part in DATASETS}
        for part, dataset in parts.items():
            if not isinstance(dataset, h5py.Dataset):
                raise UserError(f"{path} has no dataset {part}: it needs {', '.join(DATASETS)}")
        _check(parts, path)
        declared = file.attrs.get("classes", parts["y_train"].attrs.get("classes"))
        y_train, y_test, classes = _labels(parts, declared, path)
        x_test = _read_rows(parts["x_test"], np.arange(len(y_test)), "x_test", path)

    def read_train(rows: Rows) -> Pixels:
        with _hdf5(path) as file:
            return _read_rows(file["x_train"], rows, "x_train", path)

    return _Source(name, path, classes, y_train, x_test, y_test, read_train)


def _check(parts: Mapping[str, Any], where: str) -> None:
    """Refuse HDF5 datasets or arrays of the wrong shape or dtype, before any value is read."""
    for name, part in parts.items():
        if not part.size:
            raise UserError(f"{where}: {name} is empty, shape {part.shape}: store at least one row")
    for x_name, y_name in (("x_train", "y_train"), ("x_test", "y_test")):
        x, y = parts[x_name], parts[y_name]
        if x.ndim not in (2, 3, 4):
            shapes = "(rows, features), (rows, height, width) or (rows, height, width, channels)"
            raise UserError(f"{where}: {x_name} has shape {x.shape}: store {shapes}")
        if x.dtype != np.uint8 and x.dtype.kind != "f":
            raise UserError(f"{where}: {x_name} is {x.dtype}: store it as uint8 (0 to 255) or float32")
        if y.dtype.kind not in "iu" or y.shape not in ((y.size,), (y.size, 1)):
            raise UserError(f"{where}: {y_name} is {y.dtype} of shape {y.shape}: store one integer label per row")
        if len(y) != len(x):
            raise UserError(f"{where}: {x_name} has {len(x)} rows, {y_name} {len(y)}: store one label per row")
    x, other = parts["x_train"], parts["x_test"]
    if x.shape[1:] != other.shape[1:] or x.dtype.kind != other.dtype.kind:
        train, test = (f"{part.dtype} rows of {part.shape[1:]}" for part in (x, other))
        raise UserError(f"{where}: x_train has {train}, x_test {test}: store both alike")


def _labels(parts: Mapping[str, Any], declared: Any, where: str) -> tuple[Labels, Labels, int]:
    """Labels for training and test, each (m,), and the classes: ``declared``, else the largest label + 1."""
    y_train, y_test = (parts[name][()].reshape(-1) for name in ("y_train", "y_test"))
    smallest, largest = min(int(y_train.min()), int(y_test.min())), max(int(y_train.max()), int(y_test.max()))
    if smallest < 0:
        raise UserError(f"{where}: label {smallest} is negative: count labels from 0")
    if declared is None:
        declared = min(largest + 1, 2**31 - 1)  # labels are kept as int32
    elif np.ndim(declared) or np.asarray(declared).dtype.kind not in "iu":
        raise UserError(f"{where}: the attribute classes is {declared!r}: store one integer")
    if largest >= declared:
        raise UserError(f"{where}: label {largest} is too large: {declared} classes go from 0 to {declared - 1}")
    return y_train.astype(np.int32), y_test.astype(np.int32), int(declared)


def _read_rows(part: Any, rows: Rows, name: str, where: str) -> Pixels:
    """These rows (ascending) of an HDF5 dataset or array as uint8 or float32; UserError unless all are finite.

    Other ranks' rows are passed over, save in chunked storage: there HDF5 reads whole chunks anyway, and a block at a
    time is much the fastest.
    """
    x = np.empty((len(rows), *part.shape[1:]), np.uint8 if part.dtype == np.uint8 else np.float32)
    span = max(1, _BLOCK_BYTES * len(part) // (part.dtype.itemsize * part.size))
    is_chunked = getattr(part, "chunks", None) is not None
    at = 0
    while at < len(rows):
        piece = rows[at : np.searchsorted(rows, rows[at] + span)]
        if not is_chunked:
            piece = piece[:_SELECTION_ROWS]
        first, last = piece[0], piece[-1]
        with np.errstate(over="ignore"):  # a float64 beyond float32 is caught as infinite below
            if is_chunked or last - first == len(piece) - 1:
                x[at : at + len(piece)] = part[first : last + 1][piece - first]
            else:
                x[at : at + len(piece)] = part[piece]
        at += len(piece)
    finite = x.dtype == np.uint8 or np.isfinite(x).all(axis=tuple(range(1, x.ndim)))
    if not np.all(finite):
        name = f"{name} row {rows[np.argmin(finite)]}"
        raise UserError(f"{where}: {name} has NaN, infinity or more than float32 holds: clean the data")
    return x


def _open_fashion_mnist() -> _Source:
    if FASHION_MNIST_FOLDER.is_dir():
        source = "Debian's dataset-fashion-mnist"
        x_train, x_test = (_read_idx(f"{part}-images-idx3-ubyte.gz", 3) for part in ("train", "t10k"))
        y_train, y_test = (_read_idx(f"{part}-labels-idx1-ubyte.gz", 1) for part in ("train", "t10k"))
    else:
        source = "Keras's copy of Fashion-MNIST"
        (x_train, y_train), (x_test, y_test) = _fashion_mnist_from_keras()
    return _Source("fashion-mnist", source, 10, y_train, x_test, y_test, lambda rows: x_train[rows])


def _read_idx(file_name: str, dimensions: int) -> npt.NDArray[np.uint8]:
    """A gzipped IDX file of bytes: 0x800 + the number of dimensions, their sizes, the values."""
    path = FASHION_MNIST_FOLDER / file_name
    try:
        content = gzip.decompress(path.read_bytes())
        magic, *shape = np.frombuffer(content, ">u4", count=1 + dimensions).tolist()
        if magic != 0x800 + dimensions:
            raise ValueError("not an IDX file")
        return np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions)).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason, remedy = _first_line(error), "apt-get install --reinstall dataset-fashion-mnist"
        raise UserError(f"{path} cannot be read ({reason}): {remedy}") from error


def _fashion_mnist_from_keras() -> Any:
    timeout_s = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_S)  # a firewall that drops packets must not hang every rank
    try:
        from keras import datasets

        # Keras shows the download's progress on stdout, where results belong.
        with _one_download_at_a_time(), contextlib.redirect_stdout(sys.stderr):
            return datasets.fashion_mnist.load_data()
    except Exception as error:  # Keras raises plain Exception when a download fails
        raise UserError(
            f"fashion-mnist is not on this machine and Keras could not fetch it ({_first_line(error)}): "
            "apt-get install dataset-fashion-mnist, or use a machine that can download, or --data digits"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout_s)


@contextlib.contextmanager
def _one_download_at_a_time() -> Iterator[None]:
    """Keras downloads straight into its cache: no rank may read there what another is still writing."""
    home = Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser()
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "dlion-download.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _open_digits() -> _Source:
    """scikit-learn's 1,797 digits of 8x8, values 0..16 scaled to 0..255; one row in five is for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("data 'digits' needs scikit-learn: pip install scikit-learn") from error
    pixels, y = load_digits(return_X_y=True)
    x = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    order = np.random.default_rng(0).permutation(len(x))  # not the run's seed: one test set for all runs
    test, train = np.split(order, [len(x) // 5])
    return _Source("digits", "scikit-learn's digits", 10, y[train], x[test], y[test], lambda rows: x[train[rows]])


def _open_cifar10(folder: str) -> _Source:
    """CIFAR-10's binary version: five files of training records and one of test records."""
    folder = os.path.expanduser(folder)
    if not os.path.isdir(folder):
        remedy = "unpack the binary version there, or name its folder: cifar10:FOLDER or DLION_CIFAR10"
        raise UserError(f"CIFAR-10 folder {folder!r} is missing: {remedy}")
    train = np.concatenate([_read_cifar10(folder, f"data_batch_{number}.bin") for number in range(1, 6)])
    test = _read_cifar10(folder, "test_batch.bin")
    source = f"CIFAR-10's binary version in {folder}"
    x_test, y_test = _cifar10_images(test), test[:, 0]
    return _Source("cifar10", source, 10, train[:, 0], x_test, y_test, lambda rows: _cifar10_images(train[rows]))


def _cifar10_images(records: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """(m, 3073) records -> (m, 32, 32, 3)."""
    return np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _read_cifar10(folder: str, file_name: str) -> npt.NDArray[np.uint8]:
    """(m, 3073) records: the label, then the red, green and blue planes."""
    path, remedy = os.path.join(folder, file_name), "unpack CIFAR-10's binary version again"
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    if len(content) == 0 or len(content) % _CIFAR10_RECORD_BYTES:
        raise UserError(f"{path} is truncated, {len(content)} bytes are not whole images: {remedy}")
    records = content.reshape(-1, _CIFAR10_RECORD_BYTES)
    if records[:, 0].max() > 9:
        raise UserError(f"{path} has label {records[:, 0].max()}, CIFAR-10 only 0 to 9: {remedy}")
    return records


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
