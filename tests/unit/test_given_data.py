"""Data that `fit` is given: every kind that `keras.Model.fit` takes gives its rows, in its order, unchanged."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlion_mpi.errors import RunError, UserError
from dlion_mpi.learner.batch import Batch
from dlion_mpi.learner.batches import Batches
from dlion_mpi.learner.given import shard_of_fit
from dlion_mpi.learner.source import Table
from dlion_mpi.learner.windows import Windows
from tests.shards import whole_of

ROWS = 10
X = np.arange(ROWS * 3, dtype=np.int64).reshape(ROWS, 3)
Y = np.arange(ROWS, dtype=np.float32) / 4
SIZES = (4, 1, 7, 3, 25, 2)


def pieces(sizes: tuple[int, ...] = (4, 4, 2)) -> Iterator[tuple[Any, Any]]:
    """The rows in batches of these sizes."""
    start = 0
    for size in sizes:
        yield X[start : start + size], Y[start : start + size]
        start += size


def numbers(batch: Batch) -> list[int]:
    """The numbers of the rows of a batch, of which x and y must agree."""
    found = batch.x[:, 0] // 3
    np.testing.assert_array_equal(batch.x, X[found])
    np.testing.assert_array_equal(batch.y, Y[found])
    return [int(number) for number in found]


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def taken(train: Any, sizes: tuple[int, ...] = SIZES) -> list[int]:
    batches = Batches(shard_of_fit(train), seed=1, rank=0)
    try:
        found = [batches.take(size) for size in sizes]
    finally:
        batches.close()
    assert [batch.rows for batch in found] == list(sizes)
    assert {batch.x.dtype for batch in found} == {X.dtype}
    return flat(numbers(batch) for batch in found)


def endless() -> Iterator[tuple[Any, Any]]:
    while True:
        yield from pieces()


def dataset() -> Any:
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)


class Lists:
    """A re-iterable source of lists, as a torch `DataLoader` gives them."""

    def __iter__(self) -> Iterator[list[Any]]:
        return map(list, pieces())

    def __len__(self) -> int:
        return 3


IN_ORDER: dict[str, Callable[[], Any]] = {
    "tf.data": dataset,
    "generator": endless,
    "function": lambda: pieces,
    "list of batches of a class": Lists,
}


def test_training_and_validation_data_in_one_are_refused() -> None:
    parts = tuple((np.zeros((rows, 3)), np.zeros(rows)) for rows in (8, 4))
    with pytest.raises(UserError, match=r"the training data is \(\(x, y\), \(x, y\)\): give \(x, y\) as train"):
        shard_of_fit(parts)


@pytest.mark.parametrize("kind", IN_ORDER)
def test_a_stream_gives_its_rows_in_order_in_batches_of_any_size(kind: str) -> None:
    wanted = [number % ROWS for number in range(sum(SIZES))]
    assert taken(IN_ORDER[kind]()) == wanted


def py_dataset(log: list[str]) -> Any:
    import keras

    class Data(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            return list(pieces())[index]

        def on_epoch_end(self) -> None:
            log.append("end")

    return Data()


def test_a_py_dataset_gives_every_batch_once_per_epoch_in_an_order_of_the_seed() -> None:
    log: list[str] = []
    first = taken(py_dataset(log), (10, 10, 10))
    assert first == taken(py_dataset([]), (10, 10, 10))
    epochs = [first[start : start + ROWS] for start in (0, 10, 20)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(ROWS))] * 3
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert len(log) >= 2


def test_a_torch_loader() -> None:
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    assert shard_of_fit(loader).samples == ROWS
    assert shard_of_fit(torch.ones(4, 2, dtype=torch.bfloat16)).kind == "x (2,) float32"
    assert taken(loader) == [number % ROWS for number in range(sum(SIZES))]


@pytest.mark.parametrize(
    ("data", "samples"),
    [(dataset, 12), (Lists, 12), (lambda: py_dataset([]), 10), (endless, None), (lambda: pieces, None)],
)
def test_rows_are_counted_where_the_source_tells(data: Callable[[], Any], samples: int | None) -> None:
    assert shard_of_fit(data()).samples == samples


@pytest.mark.parametrize("kind", ["tf.data", "function", "py"])
def test_a_stream_is_restored_by_reading_up_to_its_position(kind: str) -> None:
    data = (lambda: py_dataset([])) if kind == "py" else IN_ORDER[kind]
    whole, resumed = (Batches(shard_of_fit(data()), seed=3, rank=1) for _ in range(2))
    for size in SIZES:
        whole.take(size)
    resumed.restore(json.loads(json.dumps(whole.state())))
    for size in SIZES:
        assert numbers(whole.take(size)) == numbers(resumed.take(size))
    assert whole.state() == resumed.state()
    for batches in (whole, resumed):
        batches.close()


def test_a_resumed_generator_starts_from_its_beginning_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    whole, resumed = (Batches(shard_of_fit(endless()), seed=3, rank=0) for _ in range(2))
    whole.take(7)
    resumed.restore(whole.state())
    assert "is a generator: it starts from its beginning" in capsys.readouterr().err
    assert numbers(resumed.take(3)) == [0, 1, 2]
    for batches in (whole, resumed):
        batches.close()


def test_a_generator_that_ends_says_so() -> None:
    batches = Batches(shard_of_fit(pieces()), seed=0, rank=0)
    assert numbers(batches.take(10)) == list(range(10))
    with pytest.raises(RunError, match="training data is a generator that has ended: let it run without end"):
        batches.take(1)
    batches.close()


def test_what_a_source_raises_is_one_line_after_the_rows_that_it_gave() -> None:
    def broken() -> Iterator[Any]:
        yield from pieces((4,))
        raise KeyError("no such\nimage")

    batches = Batches(shard_of_fit(broken), seed=0, rank=0)
    assert numbers(batches.take(4)) == [0, 1, 2, 3]
    with pytest.raises(RunError, match=r"the training data fails: KeyError: 'no such") as caught:
        batches.take(1)
    assert "\n" not in str(caught.value)
    batches.close()
    with pytest.raises(UserError, match="the training data fails: ValueError: at once"):
        shard_of_fit(_raising(ValueError("at once")))


def _raising(error: Exception) -> Any:
    def source() -> Iterator[Any]:
        raise error
        yield

    return source


def test_rows_are_read_ahead_but_not_without_limit_and_the_thread_ends() -> None:
    read: list[int] = []
    third = threading.Event()

    def counted() -> Iterator[Any]:
        for number, piece in enumerate(endless()):
            read.append(number)
            if number >= 4:
                third.set()
            yield piece

    before = set(threading.enumerate())
    batches = Batches(shard_of_fit(counted()), seed=0, rank=0)
    assert set(threading.enumerate()) == before, "nothing is read before the first batch"
    batches.take(4)
    assert third.wait(10), "while a batch is in use the next ones are read"
    assert len(read) < 12
    batches.close()
    assert set(threading.enumerate()) == before


def test_arrays_keep_their_order_of_draws_types_and_structure() -> None:
    train = ({"a": X, "b": [X[:, 0].astype(np.uint8), Y.astype(np.float64)]}, (Y, X[:, 1:]), Y + 1)
    shard = shard_of_fit(train)
    batch = Batches(shard, seed=4, rank=2).take(ROWS)
    order = np.random.default_rng(np.random.SeedSequence(4, spawn_key=(2, 0))).permutation(ROWS)
    np.testing.assert_array_equal(batch.x["a"], X[order])
    assert batch.x["b"][0].dtype == np.uint8
    assert batch.x["b"][1].dtype == np.float32
    np.testing.assert_array_equal(batch.x["b"][1], Y[order])
    np.testing.assert_array_equal(batch.y[1], X[order, 1:])
    np.testing.assert_array_equal(batch.sample_weight, Y[order] + 1)
    assert shard.kind == (
        "x['a'] (3,) int64, x['b'][0] () uint8, x['b'][1] () float32, y[0] () float32, y[1] (2,) int64, "
        "sample_weight () float32"
    )
    assert shard.input_shape == {"a": (3,), "b": [(), ()]}


def test_mapped_arrays_beyond_memory_are_read_in_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert isinstance(shard_of_fit((mapped, Y)).train, Table)
    monkeypatch.setenv("DLION_DATA_MEMORY", "0.0002")
    shard = shard_of_fit((mapped, Y))
    assert isinstance(shard.train, Windows)
    batches = Batches(shard, seed=0, rank=0)
    assert sorted(numbers(batches.take(ROWS))) == list(range(ROWS))
    batches.close()


def test_rows_without_targets_and_python_numbers() -> None:
    alone = shard_of_fit(X, X[:2])
    assert (alone.kind, alone.classes, alone.samples) == ("x (3,) int64", None, ROWS)
    train, test = whole_of(alone)
    assert train.y is None
    np.testing.assert_array_equal(test.x, X[:2])
    lists = shard_of_fit(([[1, 2], [3, 4]], [0, 5]))
    assert (lists.kind, lists.classes) == ("x (2,) int64, y () int64", 6)


def test_tensors_are_taken_as_arrays() -> None:
    import keras

    tf = pytest.importorskip("tensorflow")
    shard = shard_of_fit((keras.ops.convert_to_tensor(X), tf.constant(Y)), (X, Y))
    assert numbers(whole_of(shard)[0]) == list(range(ROWS))


@pytest.mark.parametrize("y", [[0, 1, 2, 1], [[0], [1], [2], [1]], [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0]]])
def test_class_weights_become_weights_of_rows(y: Any) -> None:
    x = np.zeros((4, 1))
    shard = shard_of_fit((x, np.array(y)), class_weight={1: 2.5, 2: 0.5})
    batch = shard.table().read(np.arange(4))
    assert batch.sample_weight.tolist() == [1.0, 2.5, 0.5, 2.5]
    streamed = shard_of_fit(lambda: iter([(x, np.array(y))]), class_weight={1: 2.5, 2: 0.5})
    assert Batches(streamed, seed=0, rank=0).take(4).sample_weight.tolist() == [1.0, 2.5, 0.5, 2.5]


def test_validation_data_is_read_again_for_every_test_in_chunks() -> None:
    for validation in (dataset(), (X, Y), Lists()):
        shard = shard_of_fit((X, Y), validation)
        for _ in range(2):
            chunks = list(shard.tests(3))
            assert [chunk.rows for chunk in chunks] == [3, 3, 3, 1]
            assert flat(numbers(chunk) for chunk in chunks) == list(range(ROWS))
    few = list(shard_of_fit((X, Y), (X, Y)).tests(2, most=4))
    assert flat(numbers(chunk) for chunk in few) == [0, 2, 5, 7]
    assert flat(numbers(chunk) for chunk in shard_of_fit((X, Y), dataset()).tests(3, most=5)) == [0, 1, 2, 3, 4]


def test_a_source_of_only_empty_batches_is_one_line_not_a_wait_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlion_mpi.learner.stream.MOST_EMPTY", 50)
    said = "the training data gives only empty batches, 50 one after the other: give rows"

    def nothing() -> Iterator[Any]:
        while True:
            yield X[:0], Y[:0]

    def nothing_more() -> Iterator[Any]:
        yield X, Y
        yield from nothing()

    for source in (nothing, nothing()):
        with pytest.raises(UserError, match=said):
            Batches(shard_of_fit(source), seed=0, rank=0).take(1)
    for source in (nothing_more, nothing_more()):
        batches = Batches(shard_of_fit(source), seed=0, rank=0)
        with pytest.raises(RunError, match=said):
            batches.take(ROWS + 1)
        batches.close()
    some = shard_of_fit(lambda: iter([*[(X[:0], Y[:0])] * 49, (X, Y), *[(X[:0], Y[:0])] * 49]))
    assert Batches(some, seed=0, rank=0).take(3 * ROWS).rows == 3 * ROWS


def test_a_wait_for_the_rows_of_a_source_is_watched() -> None:
    watched: list[str] = []
    looks = [0]

    @contextmanager
    def waiting(what: str) -> Iterator[Callable[[], bool]]:
        def look() -> bool:
            looks[0] += 1
            if looks[0] == 3:
                raise RunError("too long")
            return False

        watched.append(what)
        yield look

    def never() -> Iterator[Any]:
        yield X, Y
        held.wait(60)

    held = threading.Event()
    batches = Batches(shard_of_fit(never), seed=0, rank=0, waiting=waiting)
    assert batches.take(ROWS).rows == ROWS
    with pytest.raises(RunError, match="too long"):
        batches.take(1)
    held.set()
    batches.close()
    assert set(watched) == {"rows of the training data"}


def test_test_rows_that_cannot_be_read_are_one_line() -> None:
    def broken() -> Iterator[Any]:
        yield from pieces((4,))
        raise OSError("no disk")

    with pytest.raises(RunError, match="the test data fails: OSError: no disk"):
        list(shard_of_fit((X, Y), broken).tests(2))


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ((X, Y[:9]), None, "the training data: x has 10 rows, y 9: give equally many rows"),
        (({"a": X, "b": X[:3]}, Y), None, r"x\['a'\] has 10 rows, x\['b'\] 3"),
        ((X, Y, Y, Y), None, "it has 4 parts: give x, "),
        ((np.array(["a", "b"]), Y[:2]), None, "x is <U1: give numbers"),
        ((X[:0], Y[:0]), None, r"x is empty, shape \(0, 3\)"),
        ((X * np.nan, Y), None, "x row 0 has NaN, infinity"),
        (3.5, None, "x is a single number: give one row per sample"),
        (None, None, "the training data is NoneType: give arrays"),
        ("digits", None, "the training data has str where an array is wanted"),
        ((X, "digits"), None, "training data has str where an array is wanted"),
        ((X, Y), endless(), "validation data is a generator, which can be read only once"),
        ((X, Y), (X[:, :2], Y), r"x has int64 rows of \(3,\) for training, int64 rows of \(2,\) for tests"),
        ((X, Y), X, r"y has float32 rows of \(\) for training, no data for tests"),
        (lambda: iter([]), None, "the training data has no rows: give at least one"),
        (lambda: iter([(X[0], Y[0])]), None, "y is a single number: give batches"),
        (lambda: iter([(X, object())]), None, "has object where an array is wanted"),
    ],
)
def test_data_that_is_no_data_says_what_to_change(train: Any, validation: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        shard_of_fit(train, validation)
    assert "\n" not in str(caught.value)


def test_rows_that_change_their_shape_are_refused() -> None:
    batches = Batches(shard_of_fit(lambda: iter([(X, Y), (X[:, :2], Y)])), seed=0, rank=0)
    with pytest.raises(RunError, match=r"has rows of x \(2,\) int64, .* after rows of x \(3,\) int64, "):
        batches.take(15)
    batches.close()


def test_class_weights_and_sample_weights_do_not_go_together() -> None:
    with pytest.raises(UserError, match="has sample weights: give either those or class_weight"):
        shard_of_fit((X, Y, Y), class_weight={0: 2.0})
    with pytest.raises(UserError, match="class_weight needs one target array of classes"):
        shard_of_fit((X, (Y, Y)), class_weight={0: 2.0})
