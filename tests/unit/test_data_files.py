"""Data by path: structures in HDF5, NumPy and Parquet files, files larger than memory, and functions that give data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from dlion_mpi.errors import UserError
from dlion_mpi.learner.batch import Batch
from dlion_mpi.learner.batches import Batches
from dlion_mpi.learner.partition import partition_rows
from dlion_mpi.learner.shards import Shard, load, load_shards
from dlion_mpi.learner.windows import Windows, memory_bytes
from tests.shards import whole_of

ROWS = 40
AGE = np.arange(ROWS, dtype=np.int16)
IMAGE = np.arange(ROWS * 6, dtype=np.uint8).reshape(ROWS, 2, 3)
TARGET = np.arange(ROWS, dtype=np.float32) / 3
KIND = AGE % 4 + 10
TRAIN = Batch({"age": AGE, "image": IMAGE}, (TARGET, KIND), TARGET + 1)


def write_hdf5(folder: Path) -> str:
    with h5py.File(folder / "a.h5", "w") as file:
        for suffix, rows in (("train", slice(None)), ("test", slice(3, 9))):
            file[f"x_{suffix}/age"], file[f"x_{suffix}/image"] = AGE[rows], IMAGE[rows]
            file[f"y_{suffix}/0"], file[f"y_{suffix}/1"] = TARGET[rows], KIND[rows]
            file[f"sample_weight_{suffix}"] = TARGET[rows] + 1
        file["group_train"] = KIND
    return str(folder / "a.h5")


def write_npy(folder: Path) -> str:
    (folder / "arrays").mkdir()
    for suffix, rows in (("train", slice(None)), ("test", slice(3, 9))):
        parts: dict[str, Any] = {"x_%s.age": AGE, "x_%s.image": IMAGE, "y_%s.0": TARGET, "y_%s.1": KIND}
        parts["sample_weight_%s"] = TARGET + 1
        for name, array in parts.items():
            np.save(folder / "arrays" / f"{name % suffix}.npy", array[rows])
    np.save(folder / "arrays" / "group_train.npy", KIND)
    return str(folder / "arrays")


def write_parquet(folder: Path) -> str:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (folder / "tables").mkdir()

    def write(name: str, rows: slice) -> None:
        table = arrow.table(
            {
                "age": AGE[rows],
                "x.image": arrow.array(IMAGE[rows].tolist(), arrow.list_(arrow.list_(arrow.uint8()))),
                "y.0": TARGET[rows],
                "y.1": KIND[rows],
                "sample_weight": TARGET[rows] + 1,
                "group": KIND[rows],
            }
        )
        parquet.write_table(table, folder / "tables" / name, row_group_size=7)

    write("train-0.parquet", slice(0, 25))
    write("train-1.parquet", slice(25, ROWS))
    write("test.parquet", slice(3, 9))
    return str(folder / "tables")


WRITERS = {"hdf5": write_hdf5, "npy": write_npy, "parquet": write_parquet}


def assert_rows(batch: Batch, rows: Any) -> None:
    """All arrays have these rows, with types and shapes as they were written."""
    for (place, got), wanted in zip(batch.named().items(), TRAIN.named().values(), strict=True):
        np.testing.assert_array_equal(got, wanted[rows], err_msg=place)
        assert got.dtype == wanted.dtype


@pytest.mark.parametrize("kind", WRITERS)
def test_files_hold_named_inputs_and_several_outputs(tmp_path: Path, kind: str) -> None:
    path = WRITERS[kind](tmp_path)
    for method in ("iid", "dirichlet"):
        dealt = partition_rows(KIND, ranks=3, method=method, alpha=0.3, seed=2)
        for rank in range(3):
            shard = load(path, rank=rank, ranks=3, partition=method, alpha=0.3, seed=2)
            train, test = whole_of(shard)
            assert_rows(train, dealt[rank])
            assert_rows(test, slice(3, 9))
            assert (shard.classes, shard.train_samples_global, shard.samples) == (None, ROWS, len(dealt[rank]))


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_that_does_not_fit_is_read_in_windows(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = WRITERS[kind](tmp_path)
    monkeypatch.setenv("DLION_DATA_MEMORY", str(5 * 3 * 18 / 1e6))  # three rows a window
    shards = load_shards(path, ranks=2)
    assert all(isinstance(shard.train, Windows) for shard in shards)
    for rank, shard in enumerate(shards):
        rows = partition_rows(KIND, ranks=2)[rank]
        batches = Batches(shard, seed=1, rank=rank)
        orders = []
        for _ in range(3):
            epoch = [batches.take(size) for size in (7, 13)]
            order = np.concatenate([batch.x["age"] for batch in epoch])
            for batch in epoch:
                assert_rows(batch, batch.x["age"].astype(np.int64))
            np.testing.assert_array_equal(np.sort(order), rows)
            orders.append(order.tolist())
        assert orders[0] != orders[1] != orders[2]
        batches.close()
    (test,) = shards[0].tests(100)
    assert_rows(test, slice(3, 9))


def test_windows_are_resumed_without_reading_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLION_DATA_MEMORY", str(5 * 7 * 18 / 1e6))  # seven rows a window
    shard = load(write_npy(tmp_path), rank=0, ranks=1)
    assert isinstance(shard.train, Windows)
    read: list[list[int]] = []
    own = shard.train.table.read

    def counted(rows: Any) -> Batch:
        read.append(rows.tolist())
        return own(rows)

    object.__setattr__(shard.train.table, "read", counted)
    whole, resumed = Batches(shard, seed=1, rank=0), Batches(shard, seed=1, rank=0)
    whole.take(33)
    state = json.loads(json.dumps(whole.state()))
    assert (state["epoch"], state["position"], state["samples"]) == (0, 33, ROWS)
    wanted = [whole.take(5).x["age"].tolist() for _ in range(9)]
    whole.close()
    earlier = read[1:]  # after the first rows, read for their types
    read.clear()
    resumed.restore(state)
    got = resumed.take(5).x["age"].tolist()
    assert got == wanted[0]
    resumed.close()
    assert read[1] == earlier[4], "earlier windows of the epoch are not read"
    resumed.restore(state)
    assert [resumed.take(5).x["age"].tolist() for _ in range(9)] == wanted
    resumed.close()


def test_blocks_of_a_window_come_from_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x_train.npy", np.arange(20_000, dtype=np.float64))
    monkeypatch.setenv("DLION_DATA_MEMORY", str(5 * 8 * 1000 / 1e6))  # a thousand rows a window
    shard = load(str(tmp_path), rank=0, ranks=1)
    assert (shard.kind, shard.has_tests) == ("x () float32", False)
    batches = Batches(shard, seed=0, rank=0)
    first = batches.take(1000).x
    batches.close()
    counts = np.histogram(first, bins=4, range=(0, 20_000))[0]
    assert counts.min() > 100
    assert np.abs(np.corrcoef(np.arange(1000), first)[0, 1]) < 0.1, "and are shuffled"


def test_memory_is_shared_by_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DLION_DATA_MEMORY", raising=False)
    assert memory_bytes(4) == pytest.approx(memory_bytes(1) / 4, abs=1)
    for wrong in ("", "much", "-1", "nan", "inf"):
        monkeypatch.setenv("DLION_DATA_MEMORY", wrong)
        with pytest.raises(UserError, match=f"DLION_DATA_MEMORY={wrong}: must be a number of megabytes above 0"):
            memory_bytes(1)


# ---- what is refused


def refused(spec: object, message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(str(spec), rank=0, ranks=1, **options)
    assert "\n" not in str(caught.value)


def sound(file: h5py.File, *without: str) -> None:
    parts = {"x_train": np.zeros((6, 2)), "y_train": np.arange(6), "x_test": np.zeros((2, 2)), "y_test": [0, 1]}
    for name in set(parts) - set(without):
        file[name] = parts[name]


def test_a_virtual_data_set_is_refused_by_name_also_if_its_source_is_gone(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "source.h5", "w") as file:
        file["x"] = np.ones((6, 2))
    layout = h5py.VirtualLayout((6, 2), "f8")
    layout[:] = h5py.VirtualSource(str(tmp_path / "source.h5"), "x", (6, 2))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        sound(file, "x_train")
        file.create_virtual_dataset("x_train", layout)
    for _ in range(2):
        refused(tmp_path / "a.h5", "a.h5: x_train is a virtual data set, with values in other files: copy them")
        (tmp_path / "source.h5").unlink(missing_ok=True)


def test_values_in_other_files_are_refused_by_name(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        sound(file, "y_train")
        external = [(str(tmp_path / "values.bin"), 0, 48)]
        file.create_dataset("y_train", (6,), "i8", external=external).write_direct(np.arange(6))
    refused(tmp_path / "a.h5", r"y_train has its values in .*values\.bin: copy them into this file")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        sound(file, "x_test")
        file["x_test"] = h5py.ExternalLink(str(tmp_path / "a.h5"), "x_test")
    refused(tmp_path / "b.h5", r"x_test is a link to .*a\.h5: copy the data into this file")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        sound(file, "x_train")
        file["x_train"] = h5py.SoftLink("/nowhere")
    refused(tmp_path / "c.h5", "no dataset x_train")


@pytest.mark.parametrize("chunks", [None, (1024, 2)])
def test_rows_that_were_declared_but_never_written_are_refused(tmp_path: Path, chunks: Any) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        sound(file, "x_train", "y_train")
        large = file.create_dataset("x_train", (1 << 36, 2), "f8", chunks=chunks)
        if chunks:
            large[:1000] = 1
        file.create_dataset("y_train", (1 << 36,), "i8")
    refused(tmp_path / "a.h5", r"x_train declares \(68719476736, 2\) of float64 .*, but the file has .* bytes of it")


def test_groups_must_be_one_whole_number_per_row(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        sound(file)
        file["group_train"] = np.zeros(5, int)
    refused(tmp_path / "a.h5", "group_train must have one whole number for each of 6 training rows")


def test_rows_without_classes_and_groups_cannot_be_dealt_by_them(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x_train"] = np.zeros((6, 2))
    refused(tmp_path / "a.h5", "has no classes and no groups to deal by: use --partition iid", partition="dirichlet")


def test_bad_numpy_files_are_named(tmp_path: Path) -> None:
    refused(tmp_path, "is a folder without x_train.npy and train.parquet")
    np.save(tmp_path / "x_train.npy", np.array([{}, {}]), allow_pickle=True)
    refused(tmp_path, r"x_train\.npy cannot be read \(.*\): write it again with numpy.save")
    np.save(tmp_path / "x_train.npy", np.zeros((9, 2)))
    (tmp_path / "x_train.npy").write_bytes((tmp_path / "x_train.npy").read_bytes()[:-8])
    refused(tmp_path, r"x_train\.npy cannot be read")
    np.save(tmp_path / "x_train.npy", np.full((9, 2), np.nan))
    refused(tmp_path, "x_train row 0 has NaN")
    np.save(tmp_path / "x_train.age.npy", np.zeros(9))
    refused(tmp_path, "has both x_train.npy and x_train.NAME.npy")


def test_bad_parquet_files_are_named(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"

    def write(**columns: Any) -> None:
        parquet.write_table(arrow.table(columns), path)

    write(x=["a", "b"], y=[0, 1])
    refused(path, "column x is string: store numbers")
    write(x=[1, None], y=[0, 1])
    refused(path, "column x has 1 empty values: fill them")
    write(x=[[1, 2], [3]], y=[0, 1])
    refused(path, "column x has lists of different lengths")
    write(x=[1.5, float("nan")], y=[0, 1])
    refused(path, "x row 1 has NaN")
    write(y=[0, 1])
    refused(path, "there are no inputs x")
    path.write_bytes(b"PAR1 no more")
    refused(path, r"a\.parquet cannot be read")


def test_a_parquet_table_is_a_dict_of_columns_with_classes(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.table({"a": [1, 2, 3], "b": [0.5, 1.5, 2.5], "y": [0, 2, 1]}), tmp_path / "a.parquet")
    shard = load(str(tmp_path / "a.parquet"), rank=0, ranks=1)
    assert shard.kind == "x['a'] () int64, x['b'] () float32, y () int32, class labels"
    assert shard.classes == 3


# ---- functions


def two_parts(rank: int, ranks: int) -> Any:
    rows = slice(rank, None, ranks)
    return (AGE[rows], TARGET[rows]), (AGE[:4], TARGET[:4])


def as_dict(rank: int, ranks: int) -> Any:
    return {"train": lambda: iter([(AGE[rank : rank + 4], KIND[rank : rank + 4])]), "class_weight": {10: 3.0}}


def no_data(rank: int, ranks: int) -> Any:
    return AGE


def only_x_and_y(rank: int, ranks: int) -> Any:
    return AGE, np.ones((len(AGE), 2))


def failing(rank: int, ranks: int) -> Any:
    raise FileNotFoundError(f"no part {rank}")


def test_a_function_gives_each_rank_its_data() -> None:
    shards = load_shards(f"{__name__}:two_parts", ranks=3)
    assert [whole_of(shard)[0].x.tolist() for shard in shards] == [AGE[rank::3].tolist() for rank in range(3)]
    assert {(shard.train_samples_global, shard.name) for shard in shards} == {(ROWS, f"{__name__}:two_parts")}
    assert whole_of(shards[0])[1].y.tolist() == TARGET[:4].tolist()
    streamed: Shard = load(f"{__name__}:as_dict", rank=2, ranks=3)
    batches = Batches(streamed, seed=0, rank=2)
    batch = batches.take(4)
    batches.close()
    assert (batch.x.tolist(), batch.sample_weight.tolist()) == ([2, 3, 4, 5], [1.0, 1.0, 3.0, 1.0])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (f"{__name__}:no_data", r"returned ndarray: return \(train, validation\), or a dict"),
        (f"{__name__}:only_x_and_y", r"returned \(x, y\): return \(train, validation\)"),
        (f"{__name__}:failing", rf"--data .*:failing fails: FileNotFoundError: no part 0 \({__file__}, line \d+\)"),
        (f"{__name__}:missing", "has no function missing"),
        ("nowhere.to_be:found", "cannot import nowhere.to_be"),
    ],
)
def test_a_function_that_gives_no_data_is_named(spec: str, message: str) -> None:
    refused(spec, message)


def test_a_function_takes_no_partition() -> None:
    refused(f"{__name__}:two_parts", "divided by its function: leave out the partition", partition="dirichlet")
