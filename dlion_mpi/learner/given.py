"""Data that a program gives: all that `keras.Model.fit` takes, as rows of a shard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import optree

from dlion_mpi.errors import UserError
from dlion_mpi.learner.batch import Batch
from dlion_mpi.learner.shard import Shard
from dlion_mpi.learner.source import Table, check_alike_parts, check_finite, checked, class_labels, converted
from dlion_mpi.learner.sources import Indexed, Once, Repeated
from dlion_mpi.learner.stream import Stream
from dlion_mpi.learner.windows import Windows, memory_bytes

ClassWeight = Mapping[int, float]
TAKEN = (
    "give arrays, (x, y), (x, y, sample_weight), a tf.data.Dataset, a keras.utils.PyDataset, a torch DataLoader, "
    "or a generator of batches"
)


def shard_of_fit(train: Any, validation: Any = None, *, class_weight: ClassWeight | None = None) -> Shard:
    """This rank's data as a shard: what ``keras.Model.fit`` takes.

    ``train``, ``validation``: arrays and nested structures of arrays, as (x, y), (x, y, sample_weight) or x alone; or
    a source of batches of those: `tf.data.Dataset`, `keras.utils.PyDataset`, a torch `DataLoader`, another iterable, a
    generator, or a function that returns one for each epoch. ``class_weight``: the weight of the rows of each class.
    Raises UserError.
    """
    rows = _rows_of(train, "the training data", class_weight)
    tests = None if validation is None else _rows_of(validation, "the validation data", None)
    first = _example(rows)  # before the start, so that mistakes are found there
    if isinstance(tests, Once):
        raise UserError("the validation data is a generator, which can be read only once: give arrays or a function")
    if tests is not None:
        check_alike_parts(first, _example(tests), "the data")
    return Shard(
        name="arrays" if isinstance(rows, Table | Windows) else "a stream",
        source="memory" if isinstance(rows, Table | Windows) else type(train).__name__,
        train=rows,
        test=tests,
        classes=_classes(train, validation) if isinstance(rows, Table) else None,
        train_samples_global=rows.rows,
    )


def _example(rows: Table | Stream) -> Batch:
    return rows.read(np.arange(1)) if isinstance(rows, Table) else rows.example()


def _classes(*parts: Any) -> int | None:
    """The number of classes, if all targets are whole numbers from 0, one per row."""
    found = 0
    for part in parts:
        if part is not None:
            if not _is_arrays(part) or (labels := class_labels(_unpacked(part).y)) is None:
                return None
            found = max(found, 1 + int(labels.max()))
    return found or None


def _rows_of(data: Any, where: str, class_weight: ClassWeight | None) -> Table | Stream:
    """The rows of data of any kind. Raises UserError."""
    if _are_parts(data):
        raise UserError(f"{where} is ((x, y), (x, y)): give (x, y) as train, and the other as validation")
    if _is_arrays(data):
        batch = checked(_batch(data, where, class_weight), where)
        for place, array in batch.named().items():
            if not isinstance(array, np.memmap):
                check_finite(array, where, place)
        table, memory = Table.of(batch), memory_bytes(1)
        is_mapped = any(isinstance(array, np.memmap) for array in batch.named().values())
        return Windows(table, memory, where) if is_mapped and table.rows * table.row_bytes > memory else table

    if isinstance(data, tuple | list | dict | str):
        _batch(data, where, class_weight)

    def convert(element: Any) -> Batch:
        batch = _batch(element, where, class_weight)
        for place, array in batch.named().items():
            if not array.ndim:
                raise UserError(f"{where}: {place} is a single number: give batches, as `dataset.batch(32)` does")
        lengths = {len(array) for array in batch.named().values()}
        return batch if lengths == {0} else converted(checked(batch, where))

    if hasattr(data, "as_numpy_iterator"):
        return Repeated(data.as_numpy_iterator, convert, where, _batches_of_dataset(data))
    if hasattr(data, "__getitem__") and hasattr(type(data), "num_batches"):
        return Indexed(data, convert, where)
    if hasattr(data, "__next__"):
        return Once(data, convert, where)
    if hasattr(data, "__iter__"):
        return Repeated(data.__iter__, convert, where, _length(data), _length(getattr(data, "dataset", None)))
    if callable(data):
        return Repeated(lambda: iter(data()), convert, where)
    raise UserError(f"{where} is {type(data).__name__}: {TAKEN}")


def _are_parts(data: Any) -> bool:
    """Whether this is training and validation data together: two pairs of arrays, each with its own number of rows."""
    if not (isinstance(data, tuple) and len(data) == 2 and all(isinstance(p, tuple) and len(p) == 2 for p in data)):
        return False
    rows = [{a.shape[0] if getattr(a, "shape", ()) else None for a in part} for part in data]
    return all(len(part) == 1 and None not in part for part in rows) and rows[0] != rows[1]


def _is_arrays(data: Any) -> bool:
    """Whether the data is an array, or a structure of arrays and numbers."""
    leaves = optree.tree_leaves(data)
    return bool(leaves) and all(hasattr(leaf, "__array__") or isinstance(leaf, int | float) for leaf in leaves)


def _batch(data: Any, where: str, class_weight: ClassWeight | None) -> Batch:
    """Arrays as a batch, with the weights of the classes. Raises UserError."""
    if not _is_arrays(data):
        odd = next((leaf for leaf in optree.tree_leaves(data) if not hasattr(leaf, "__array__")), None)
        raise UserError(f"{where} has {type(odd).__name__} where an array is wanted: {TAKEN}")
    try:
        batch = _unpacked(data)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error
    if class_weight is None:
        return batch
    if batch.sample_weight is not None:
        raise UserError(f"{where} has sample weights: give either those or class_weight")
    return batch._replace(sample_weight=_weights_of_classes(batch.y, class_weight))


def _unpacked(data: Any) -> Batch:
    """Arrays, (x, y) or (x, y, sample_weight) -> a batch of NumPy arrays. Raises ValueError."""
    is_parted = isinstance(data, tuple) or (isinstance(data, list) and not _is_numbers(data))
    parts = tuple(data) if is_parted else (data,)
    if not 1 <= len(parts) <= 3:
        raise ValueError(f"it has {len(parts)} parts: give x, (x, y) or (x, y, sample_weight)")
    return Batch(*(optree.tree_map(_array, part, is_leaf=_is_numbers) for part in parts))


def _is_numbers(data: Any) -> bool:
    """Whether this is a list of numbers, or of lists of numbers, which stands for one array."""
    return isinstance(data, list | tuple) and _are_numbers(data)


def _are_numbers(data: Any) -> bool:
    return all(isinstance(leaf, int | float) for leaf in optree.tree_leaves(data))


def _array(leaf: Any) -> Any:
    """A tensor of any library as a NumPy array, without a copy where that is possible."""
    if isinstance(leaf, np.ndarray):
        return leaf
    if hasattr(leaf, "detach"):  # torch, which has no NumPy type for bfloat16
        leaf = leaf.detach().cpu()
        leaf = (leaf.float() if str(leaf.dtype) == "torch.bfloat16" else leaf).numpy()
    array = np.asarray(leaf)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _weights_of_classes(y: Any, class_weight: ClassWeight) -> Any:
    """The weight of every row, (b,), as Keras has it: of its class, or of the largest of one-hot targets."""
    if not isinstance(y, np.ndarray) or y.ndim > 2:
        raise UserError("class_weight needs one target array of classes, (rows,), (rows, 1) or one-hot (rows, classes)")
    classes = y.argmax(1) if y.ndim == 2 and y.shape[1] > 1 else y.reshape(-1)
    classes = np.round(classes).astype(np.int64)
    weights = np.ones(len(classes), np.float32)
    for label, weight in class_weight.items():
        weights[classes == label] = weight
    return weights


def _length(data: Any) -> int | None:
    """Length, where the data knows it."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def _batches_of_dataset(data: Any) -> int | None:
    """Number of batches of a `tf.data.Dataset`; negative numbers stand for endless and unknown."""
    number = int(data.cardinality())
    return number if number >= 0 else None
