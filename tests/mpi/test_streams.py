"""Runs on streams over real MPI: every kind of source trains alike, is resumed where it was, and leaves no thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from dlion_mpi import RunError, fit
from dlion_mpi.checkpoint import folder
from dlion_mpi.learner import backend

MOST_RANKS = 3

ROWS = 50


def rows(rank: int) -> tuple[dict[str, Any], Any]:
    """A dict of categories and numbers, and a target that depends on both."""
    generator = np.random.default_rng(rank)
    numbers = generator.normal(size=(ROWS, 3)).astype(np.float32)
    category = generator.integers(0, 4, ROWS)
    return {"category": category, "numbers": numbers}, numbers[:, 0] + category.astype(np.float32)


def batches(rank: int) -> Iterator[Any]:
    x, y = rows(rank)
    for start in range(0, ROWS, 12):
        yield {name: array[start : start + 12] for name, array in x.items()}, y[start : start + 12]


def endless(rank: int) -> Iterator[Any]:
    while True:
        yield from batches(rank)


def dataset(rank: int) -> Any:
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(rows(rank)).batch(12)


def py_dataset(rank: int) -> Any:
    import keras

    class Data(keras.utils.PyDataset):
        def __len__(self) -> int:
            return len(list(batches(rank)))

        def __getitem__(self, index: int) -> Any:
            return list(batches(rank))[index]

    return Data()


SOURCES: dict[str, Callable[[int], Any]] = {
    "function": lambda rank: lambda: batches(rank),
    "generator": endless,
    "tf.data": dataset,
    "PyDataset": py_dataset,
    "arrays": rows,
}


def model() -> Any:
    backend.start(1)
    import keras

    keras.utils.set_random_seed(3)
    category, numbers = keras.Input((), dtype="int32", name="category"), keras.Input((3,), name="numbers")
    joined = keras.layers.Concatenate()([keras.layers.Embedding(4, 2)(category), numbers])
    made = keras.Model({"category": category, "numbers": numbers}, keras.layers.Dense(1)(joined))
    made.compile(keras.optimizers.SGD(0.05, momentum=0.5), "mse", metrics=["mae"])
    return made


def trained(world: MPI.Intracomm, source: str, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """The weights after a run, and its result."""
    made = model()
    options = {"strategy": "dlion", "sync": "sync", "batching": "fixed", "progress_every": 0, **options}
    result = fit(made, SOURCES[source](world.Get_rank()), rows(99), **options)
    return np.concatenate([np.ravel(w) for w in made.get_weights()]), result


@pytest.mark.mpi
def test_sources_of_the_same_rows_in_the_same_order_train_the_same_weights(world: MPI.Intracomm) -> None:
    options = {"steps": 12, "batch_size": 7}
    wanted, result = trained(world, "function", **options)
    assert result["val_loss_mean"] < 3.0
    for source in ("generator", "tf.data"):
        np.testing.assert_array_equal(trained(world, source, **options)[0], wanted, err_msg=source)


@pytest.mark.mpi
@pytest.mark.parametrize("source", ["PyDataset", "arrays"])
def test_other_sources_learn(world: MPI.Intracomm, source: str) -> None:
    before = set(threading.enumerate())
    _, result = trained(world, source, steps=150, batching="auto")
    assert result["val_loss_mean"] < 0.2
    assert not [thread.name for thread in set(threading.enumerate()) - before if thread.name == "data"]


@pytest.mark.mpi
@pytest.mark.parametrize("source", ["function", "PyDataset"])
def test_a_stream_is_resumed_where_it_was(world: MPI.Intracomm, source: str, shared_folder: Path) -> None:
    options: dict[str, Any] = {"steps": 20, "batch_size": 7}
    expected, _ = trained(world, source, out=str(shared_folder), checkpoint_every="10", **options)
    world.Barrier()
    if world.Get_rank() == 0:
        folder.remove(folder.complete(shared_folder)[-1])  # as if the run had been killed before its end
    world.Barrier()
    made = model()
    fit(made, SOURCES[source](world.Get_rank()), rows(99), resume=str(shared_folder))
    np.testing.assert_array_equal(np.concatenate([np.ravel(w) for w in made.get_weights()]), expected)


def classifier() -> Any:
    backend.start(1)
    import keras

    made = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])
    made.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return made


def labelled(rank: int, x: Any = 1.0, y: int = 0) -> Iterator[Any]:
    """Two good batches, one without rows, and one with a row that holds ``x`` and ``y``."""
    numbers, labels = np.ones((8, 3), np.float32), np.arange(8) % 4
    yield numbers, labels
    yield numbers[:0], labels[:0]
    yield numbers, labels
    numbers, labels = numbers.copy(), labels.copy()
    numbers[5, 1], labels[5] = x, y
    yield numbers, labels


@pytest.mark.mpi
@pytest.mark.parametrize("strategy", ["dlion", "allreduce"])
@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"y": 12}, r"the training data has the label 12, but the model has outputs for 0 to 3"),
        ({"y": -1}, r"the training data has the label -1, but the model has outputs for 0 to 3"),
        ({"x": np.nan}, r"the training data: x row \d has NaN, infinity or .*: clean the data"),
    ],
)
def test_a_row_that_is_wrong_ends_its_rank_with_a_line(
    world: MPI.Intracomm, odd: dict[str, Any], said: str, strategy: str
) -> None:
    last = world.Get_size() - 1
    values = odd if world.Get_rank() == last else {}
    with pytest.raises(RunError, match=rf"^rank {last}, step \d+: {said}"):
        fit(
            classifier(),
            lambda: labelled(0, **values),
            strategy=strategy,
            steps=50,
            batch_size=4,
            progress_every=0,
        )


@pytest.mark.mpi
def test_a_wrong_label_of_the_tests_ends_its_rank_with_a_line(world: MPI.Intracomm) -> None:
    with pytest.raises(RunError, match=r"^rank \d, step \d+: the test data has the label 9, but"):
        fit(classifier(), lambda: labelled(0), lambda: labelled(0, y=9), steps=20, progress_every=0, evaluate_every=5)


@pytest.mark.mpi
def test_a_batch_without_rows_is_skipped_wherever_it_is(world: MPI.Intracomm) -> None:
    def empty_first() -> Iterator[Any]:
        yield np.ones((0, 3)), np.ones(0, np.int64)
        yield from labelled(0)
        yield np.ones((0, 3), np.float32), np.ones(0)

    result = fit(classifier(), empty_first, empty_first, steps=20, progress_every=0)
    assert result["steps"] == 20
    assert result["accuracy_mean"] is not None


@pytest.mark.mpi
def test_a_source_that_fails_ends_its_rank_with_a_line(world: MPI.Intracomm) -> None:
    def broken() -> Iterator[Any]:
        yield from batches(0)
        raise OSError("the disk is gone")

    last = world.Get_rank() == world.Get_size() - 1
    data: Any = broken if last else rows(world.Get_rank())
    name = f"^rank {world.Get_size() - 1}: "
    with pytest.raises(RunError, match=f"{name}the training data fails: OSError: the disk is gone"):
        fit(model(), data, rows(99), steps=50, batch_size=7, progress_every=0)


@pytest.mark.mpi
@pytest.mark.parametrize("options", [{}, {"steps_per_epoch": 5}])
def test_test_rows_that_fail_end_their_rank_with_a_line(world: MPI.Intracomm, options: dict[str, Any]) -> None:
    last, started = world.Get_size() - 1, [0]

    def breaks_later() -> Iterator[Any]:
        started[0] += 1
        if started[0] > 2 and world.Get_rank() == last:
            raise OSError("the disk is gone")
        yield rows(99)

    with pytest.raises(RunError, match=f"^rank {last}: the test data fails: OSError: the disk is gone"):
        fit(model(), rows(world.Get_rank()), breaks_later, steps=20, batch_size=7, progress_every=0, **options)
