"""The data sets that have a name, of which those of images are here: Fashion-MNIST, digits, CIFAR-10.

Nothing is unpickled: the formats are IDX and CIFAR's binary records.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import os
import socket
import sys
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlion_mpi.errors import UserError
from dlion_mpi.learner import workloads
from dlion_mpi.learner.batch import Batch, RowNumbers
from dlion_mpi.learner.source import Source, Table, first_line, labelled, of_images

NAMES = "fashion-mnist, digits, cifar10, cifar10:FOLDER, text, text-languages, tables"
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
WORKLOADS = {
    "text": workloads.open_text,
    "text-languages": workloads.open_languages,
    "tables": workloads.open_flights,
}
CIFAR10_RECORD_BYTES = 1 + 3 * 32 * 32
DOWNLOAD_TIMEOUT_S = 15.0


def open_named(spec: str) -> Source | None:
    """The data set of that name, or None where ``spec`` is no name. Raises UserError."""
    name, colon, folder = spec.partition(":")
    if spec == "fashion-mnist":
        return _fashion_mnist()
    if spec == "digits":
        return _digits()
    if spec in WORKLOADS:
        return WORKLOADS[spec]()
    if name == "cifar10" and bool(folder) == bool(colon):
        return _cifar10(folder or os.environ.get("DLION_CIFAR10") or "cifar-10-batches-bin")
    return None


def _fashion_mnist() -> Source:
    if FASHION_MNIST_FOLDER.is_dir():
        source = "Debian's dataset-fashion-mnist"
        x_train, x_test = (_read_idx(f"{part}-images-idx3-ubyte.gz", 3) for part in ("train", "t10k"))
        y_train, y_test = (_read_idx(f"{part}-labels-idx1-ubyte.gz", 1) for part in ("train", "t10k"))
    else:
        source = "Keras's copy of Fashion-MNIST"
        (x_train, y_train), (x_test, y_test) = _fashion_mnist_from_keras()
    return of_images("fashion-mnist", source, 10, labelled(x_train, y_train), labelled(x_test, y_test))


def _read_idx(file_name: str, dimensions: int) -> npt.NDArray[np.uint8]:
    """Read a gzipped IDX file of bytes: 0x800 + the number of dimensions, their sizes, the values."""
    path = FASHION_MNIST_FOLDER / file_name
    try:
        content = gzip.decompress(path.read_bytes())
        magic, *shape = np.frombuffer(content, ">u4", count=1 + dimensions).tolist()
        if magic != 0x800 + dimensions:
            raise ValueError("not an IDX file")
        return np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions)).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason, remedy = first_line(error), "apt-get install --reinstall dataset-fashion-mnist"
        raise UserError(f"{path} cannot be read ({reason}): {remedy}") from error


def _fashion_mnist_from_keras() -> Any:
    timeout_s = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)  # a firewall that drops packets must not hang every rank
    try:
        from keras import datasets

        # Keras shows the download's progress on stdout, where results belong.
        with _one_download_at_a_time(), contextlib.redirect_stdout(sys.stderr):
            return datasets.fashion_mnist.load_data()
    except Exception as error:  # Keras raises plain Exception when a download fails
        raise UserError(
            f"fashion-mnist is not on this machine and Keras could not fetch it ({first_line(error)}): "
            "apt-get install dataset-fashion-mnist, or use a machine that can download, or --data digits"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout_s)


@contextlib.contextmanager
def _one_download_at_a_time() -> Iterator[None]:
    """Keep other ranks from reading Keras's cache while this one downloads straight into it."""
    home = Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser()
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "dlion-download.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _digits() -> Source:
    """scikit-learn's 1,797 digits of 8x8, values 0..16 scaled to 0..255; one row in five is for testing."""
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise UserError("data 'digits' needs scikit-learn: pip install scikit-learn")
    # Straight from its file: importing scikit-learn takes a second and 100 MB.
    table = np.loadtxt(Path(package.origin).parent / "datasets/data/digits.csv.gz", delimiter=",")
    pixels, y = table[:, :-1], table[:, -1].astype(np.int64)
    x = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    order = np.random.default_rng(0).permutation(len(x))  # not the run's seed: one test set for all runs
    test, train = np.split(order, [len(x) // 5])
    return of_images("digits", "scikit-learn's digits", 10, labelled(x[train], y[train]), labelled(x[test], y[test]))


def _cifar10(folder: str) -> Source:
    """CIFAR-10's binary version: five files of training records and one of test records."""
    folder = os.path.expanduser(folder)
    if not os.path.isdir(folder):
        remedy = "unpack the binary version there, or name its folder: cifar10:FOLDER or DLION_CIFAR10"
        raise UserError(f"CIFAR-10 folder {folder!r} is missing: {remedy}")
    train = np.concatenate([_read_cifar10(folder, f"data_batch_{number}.bin") for number in range(1, 6)])
    test = _read_cifar10(folder, "test_batch.bin")
    source = f"CIFAR-10's binary version in {folder}"

    def read(rows: RowNumbers) -> Batch:
        return _cifar10_images(train[rows])

    table = Table(len(train), read, CIFAR10_RECORD_BYTES)
    return Source("cifar10", source, table, Table.of(_cifar10_images(test)), train[:, 0], 10)


def _cifar10_images(records: npt.NDArray[np.uint8]) -> Batch:
    """(m, 3073) records -> images (m, 32, 32, 3) and labels."""
    images = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return labelled(images, records[:, 0])


def _read_cifar10(folder: str, file_name: str) -> npt.NDArray[np.uint8]:
    """Read (m, 3073) records: the label, then the red, green and blue planes."""
    path, remedy = os.path.join(folder, file_name), "unpack CIFAR-10's binary version again"
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    if len(content) == 0 or len(content) % CIFAR10_RECORD_BYTES:
        raise UserError(f"{path} is truncated, {len(content)} bytes are not whole images: {remedy}")
    records = content.reshape(-1, CIFAR10_RECORD_BYTES)
    if records[:, 0].max() > 9:
        raise UserError(f"{path} has label {records[:, 0].max()}, CIFAR-10 only 0 to 9: {remedy}")
    return records
