"""One rank's checkpoint file: named arrays and texts in HDF5, written atomically.

HDF5 lays the file out; `os.pwrite` then writes the large arrays to their offsets. h5py would hold Python's lock during
those writes, and so stop the training loop and the MPI thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from dlion_mpi.vector.named_arrays import Array, Arrays

LARGE_BYTES = 1 << 16
"""Arrays of at least this size are written with `os.pwrite`."""
BLOCK_BYTES = 1 << 20
"""Size of one hashed and written block."""
SPARE_BYTES = 1 << 20
"""Free space required in addition to the arrays. HDF5 does not fail cleanly on a full disk."""
KINDS = "iuf"
"""NumPy dtype kinds that a checkpoint may contain: numbers only."""


class Damaged(Exception):
    """Raised for a file that differs from what was written; the message names the difference."""


@dataclass(frozen=True, slots=True)
class Written:
    """Size of a file, and the 64-bit digest of its content."""

    size_bytes: int
    digest: int


def digest_of(arrays: Mapping[str, Array], texts: Mapping[str, str], hashes: Mapping[str, int]) -> int:
    """Return the XXH3 digest of every name, dtype, shape and content.

    ``hashes``: XXH3 of each array's bytes, by name.
    """
    whole = xxhash.xxh3_64()
    for name in sorted(arrays):
        found = arrays[name]
        whole.update(f"{name} {found.dtype.str} {found.shape} {hashes[name]:016x}\n".encode())
    for name in sorted(texts):
        whole.update(f"{name} {len(texts[name])} {texts[name]}\n".encode())
    return int(whole.intdigest())


def write(
    path: Path,
    arrays: Mapping[str, Array],
    texts: Mapping[str, str],
    throttle: Callable[[float], None] = lambda cpu_s: None,
) -> Written:
    """Write to a temporary name, fsync, then rename. An existing file stays until the new one is complete.

    ``throttle``: called after each block with the processor seconds that it took; may sleep. Raises OSError.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        _check_space(path.parent, sum(array.nbytes for array in arrays.values()))
        try:
            offsets = _lay_out(partial, arrays, texts)
        except (RuntimeError, ValueError) as error:  # h5py raises these when the disk fills up
            raise OSError(errno.EIO, str(error).splitlines()[0]) from None
        hashes = _write_arrays(partial, arrays, offsets, throttle)
        size_bytes = partial.stat().st_size
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    return Written(size_bytes, digest_of(arrays, texts, hashes))


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically, as `write` does. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's directory entries to the disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_space(folder: Path, needed_bytes: int) -> None:
    disk = os.statvfs(folder)
    if disk.f_bavail * disk.f_frsize < needed_bytes + SPARE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _lay_out(path: Path, arrays: Mapping[str, Array], texts: Mapping[str, str]) -> dict[str, int]:
    """Create the HDF5 file with the small arrays in it. Returns the file offset of each large array."""
    offsets = {}
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        for name, text in texts.items():
            file.attrs[name] = text
        for name, array in arrays.items():
            if array.nbytes < LARGE_BYTES:
                file.create_dataset(name, data=array, track_times=False)
            else:
                offsets[name] = _reserve(file, name, array)
    return offsets


def _reserve(file: h5py.File, name: str, array: Array) -> int:
    """Create a data set without content. Returns its file offset."""
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    space = h5py.h5s.create_simple(array.shape)
    dataset = h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(array.dtype), space, creation, links)
    return int(dataset.get_offset())


def _write_arrays(
    path: Path, arrays: Mapping[str, Array], offsets: Mapping[str, int], throttle: Callable[[float], None]
) -> dict[str, int]:
    """Write the large arrays to their offsets and fsync the file. Returns the hash of every array."""
    hashes = {}
    descriptor = os.open(path, os.O_RDWR)
    try:
        for name, array in arrays.items():
            content = xxhash.xxh3_64()
            at = offsets.get(name)
            for block in _blocks(array):
                began_s = time.thread_time()
                content.update(block)
                if at is not None:
                    _write_at(descriptor, block, at)
                    at += len(block)
                throttle(time.thread_time() - began_s)
            hashes[name] = int(content.intdigest())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return hashes


def _blocks(array: Array) -> Iterator[memoryview]:
    """Yield an array's bytes in blocks."""
    content = _bytes(array)
    for start in range(0, len(content), BLOCK_BYTES):
        yield content[start : start + BLOCK_BYTES]


def _write_at(descriptor: int, block: memoryview, offset: int) -> None:
    while len(block):
        written = os.pwrite(descriptor, block, offset)
        block, offset = block[written:], offset + written


def read(path: Path, expected: Written) -> tuple[Arrays, dict[str, str]]:
    """Read a file's arrays and texts. Raises Damaged if they differ from what was written."""
    try:
        size_bytes = path.stat().st_size
        if size_bytes != expected.size_bytes:
            raise Damaged(f"it has {size_bytes} bytes, but {expected.size_bytes} were written")
        with h5py.File(path, "r", locking=False) as file:
            texts = {name: _text(name, value) for name, value in file.attrs.items()}
            arrays = dict(_datasets(file, "", size_bytes))
    except (OSError, RuntimeError, KeyError, ValueError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise Damaged(f"it cannot be read: {reason}") from None
    hashes = {name: int(xxhash.xxh3_64_intdigest(_bytes(array))) for name, array in arrays.items()}
    if digest_of(arrays, texts, hashes) != expected.digest:
        raise Damaged("its content differs from what was written")
    return arrays, texts


def _bytes(array: Array) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"attribute {name} is not a text")
    value.encode()  # raises UnicodeError for one that is not UTF-8
    return value


def _datasets(group: h5py.Group, prefix: str, most_bytes: int) -> Iterator[tuple[str, Array]]:
    """Yield all data sets by name. Accepts only numbers that are stored in this file and fit into its size."""
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{prefix}{name} is a link to another file or object")
        found = group[name]
        if isinstance(found, h5py.Group):
            yield from _datasets(found, f"{prefix}{name}/", most_bytes)
            continue
        if not isinstance(found, h5py.Dataset) or found.dtype.kind not in KINDS or found.shape is None:
            raise ValueError(f"{prefix}{name} does not contain numbers")
        if found.is_virtual or found.external or found.chunks is not None or found.nbytes > most_bytes:
            raise ValueError(f"{prefix}{name} is not stored contiguously in this file")
        array = np.empty(found.shape, found.dtype)
        if array.size:
            found.read_direct(array)
        yield f"{prefix}{name}", array
