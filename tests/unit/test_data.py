"""Data sets as they come off a disk, good ones and bad ones."""

from __future__ import annotations

import gzip
import struct
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from dlion_mpi.errors import UserError
from dlion_mpi.learner import hdf5, named
from dlion_mpi.learner.batches import Batches
from dlion_mpi.learner.partition import partition_rows
from dlion_mpi.learner.shards import load, load_shards, merge_facts
from tests.shards import whole_of

Arrays = dict[str, Any]


def arrays(rows: int = 12, shape: tuple[int, ...] = (4, 3), dtype: Any = np.uint8) -> Arrays:
    """A small sound data set; the first value of every training row is the row's number."""
    x_train = np.zeros((rows, *shape), dtype)
    x_train.T[(0,) * len(shape)] = np.arange(rows)
    return {
        "x_train": x_train,
        "y_train": np.arange(rows, dtype=np.int64) % 3,
        "x_test": np.ones((5, *shape), dtype),
        "y_test": np.arange(5, dtype=np.int64) % 3,
    }


def write(path: Path, content: Arrays, **attributes: Any) -> str:
    """An HDF5 file of these datasets; None leaves one out, a dict makes it a group."""
    with h5py.File(path, "w") as file:
        for name, array in content.items():
            if isinstance(array, dict):
                file.create_group(name)
            elif array is not None:
                file[name] = array
        file.attrs.update(attributes)
    return str(path)


def assert_refused(message: str, spec: object, *, rank: int = 0, ranks: int = 1, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(str(spec), rank=rank, ranks=ranks, **options)
    assert "\n" not in str(caught.value)


# HDF5


@pytest.mark.parametrize("chunks", [None, (7, 2, 3)])
@pytest.mark.parametrize("method", ["iid", "dirichlet"])
def test_ranks_read_their_own_rows_of_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, chunks: tuple[int, ...] | None
) -> None:
    monkeypatch.setattr(hdf5, "BLOCK_BYTES", 12 * 20)  # several blocks even in a small file
    monkeypatch.setattr(hdf5, "SELECTION_ROWS", 6)
    content = arrays(100)
    x = content.pop("x_train")
    path = write(tmp_path / "a.h5", content)
    with h5py.File(path, "a") as file:
        file.create_dataset("x_train", data=x, chunks=chunks)
    dealt = partition_rows(content["y_train"], ranks=3, method=method, alpha=0.5, seed=5)
    together = load_shards(path, ranks=3, partition=method, alpha=0.5, seed=5)
    for rank, rows in enumerate(dealt):
        one = load(path, rank=rank, ranks=3, partition=method, alpha=0.5, seed=5)
        assert (one.name, one.source) == ("a.h5", path)
        assert (one.classes, one.train_samples_global, one.samples) == (3, 100, len(rows))
        for part in (one, together[rank]):
            train, test = whole_of(part)
            np.testing.assert_array_equal(train.x, x[rows])
            np.testing.assert_array_equal(train.y, content["y_train"][rows])
            np.testing.assert_array_equal(test.x, content["x_test"])
            np.testing.assert_array_equal(test.y, content["y_test"])


@pytest.mark.parametrize("shape", [(), (6,), (4, 3), (4, 3, 2), (2, 3, 2, 2)])
def test_rows_keep_their_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = write(tmp_path / "a.h5", arrays(shape=shape))
    loaded = load(path, rank=0, ranks=1)
    assert loaded.input_shape == shape
    train, test = whole_of(loaded)
    assert test.x.shape == (5, *shape)
    assert train.x.reshape(12, -1)[:, 0].tolist() == list(range(12))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, ">i4", np.int64, np.float16, ">f4", np.float32, np.float64])
def test_whole_numbers_stay_floats_become_float32_and_labels_int32(tmp_path: Path, dtype: Any) -> None:
    content = arrays(dtype=dtype)
    content["y_train"] = content["y_train"].astype(np.uint8)[:, None]  # one column will do
    loaded = load(write(tmp_path / "a.h5", content), rank=0, ranks=1)
    wanted = np.dtype(np.float32) if np.dtype(dtype).kind == "f" else np.dtype(dtype).newbyteorder("=")
    train, test = whole_of(loaded)
    assert {train.x.dtype, test.x.dtype} == {wanted}
    assert {train.y.dtype, test.y.dtype} == {np.dtype(np.int32)}
    np.testing.assert_array_equal(train.x, arrays()["x_train"])
    np.testing.assert_array_equal(train.y, arrays()["y_train"])


def test_classes_come_from_the_attribute_else_from_train_and_test_labels(tmp_path: Path) -> None:
    content = arrays()
    content["y_test"][2] = 6
    assert load(write(tmp_path / "a.h5", content), rank=0, ranks=1).classes == 7
    assert load(write(tmp_path / "b.h5", content, classes=11), rank=0, ranks=1).classes == 11
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["y_train"].attrs["classes"] = 9
    assert load(str(tmp_path / "a.h5"), rank=0, ranks=1).classes == 9


FLOATS = arrays(dtype=np.float64)


def spoiled(name: str, row: int, value: float) -> Arrays:
    """A change of one value, or of one label."""
    array = (FLOATS if name[0] == "x" else arrays())[name].copy()
    array[(row, 1, 1)[: array.ndim]] = value
    return {**(FLOATS if name[0] == "x" else {}), name: array}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": None}, "no dataset x_train: it needs x_train, y_train"),
        ({"x_test": None}, "has y_test, but no dataset x_test"),
        ({"x_test": {}}, "there are no inputs x_test: give at least one array"),
        ({"y_train": None}, "y has no data for training, int64 rows of .. for tests: give both alike"),
        ({"y_test": None}, "y has int64 rows of .. for training, no data for tests: give both alike"),
        ({"y_train": np.zeros(11, int)}, "x_train has 12 rows, y_train 11: give equally many rows"),
        ({"y_test": np.zeros(6, int)}, "x_test has 5 rows, y_test 6"),
        ({"x_train": np.array([b"cat"] * 12)}, "x_train is .*: give numbers"),
        ({"x_train": np.float32(3)}, "x_train is a single number: give one row per sample"),
        (
            {"x_test": np.zeros((5, 4, 4), np.uint8)},
            "x has uint8 rows of .4, 3. for training, uint8 rows of .4, 4.",
        ),
        (
            {"x_test": np.zeros((5, 4, 3), np.float32)},
            "x has uint8 rows of .*, float32 .* give both alike",
        ),
        ({"y_train": np.zeros(12)}, "y has float32 rows of .. for training, int64 rows of .. for tests"),
        ({"y_train": [b"cat"] * 12}, "y_train is .*: give numbers"),
        ({**spoiled("y_train", 1, -1), "classes": 7}, "label -1 is negative: count labels from 0"),
        ({**spoiled("y_train", 1, 7), "classes": 7}, "label 7 is too large: 7 classes go from 0 to 6"),
        ({**spoiled("y_test", 1, 8), "classes": 7}, "label 8 is too large"),
        ({"classes": "ten"}, "attribute classes is 'ten': store one integer"),
        ({"classes": [3, 3]}, "attribute classes is .*: store one integer"),
        (spoiled("x_train", 9, np.nan), "x_train row 9 has NaN, infinity .*: clean the data"),
        (spoiled("x_test", 3, -np.inf), "x_test row 3 has NaN, infinity"),
        (spoiled("x_train", 4, 1e300), "x_train row 4 has .* more than float32 holds"),
        (arrays(rows=0), "x_train is empty"),
        ({"x_test": np.zeros((0, 4, 3), np.uint8)}, "x_test is empty"),
        ({"x_train": np.zeros((12, 0), np.uint8)}, r"x_train is empty, shape \(12, 0\)"),
        ({"x_train": h5py.Empty("u1")}, "x_train is empty"),
    ],
)
def test_bad_files_say_what_to_change(tmp_path: Path, changes: Arrays, message: str) -> None:
    attributes = {"classes": changes["classes"]} if "classes" in changes else {}
    datasets = {name: changes.get(name, array) for name, array in arrays().items()}
    assert_refused(rf"bad\.h5.*{message}", write(tmp_path / "bad.h5", datasets, **attributes))


def test_a_bad_row_is_named_by_its_number_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.h5", {**arrays(), **spoiled("x_train", 9, np.nan)})
    (owner,) = (r for r, rows in enumerate(partition_rows(np.arange(12), ranks=2)) if 9 in rows)
    assert_refused("x_train row 9 has NaN", path, rank=owner, ranks=2)
    assert load(path, rank=1 - owner, ranks=2).samples == 6


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "is not an HDF5 file: write one with x_train"),
        (lambda content: b"label,pixel\n" * 1000, "is not an HDF5 file"),
        (
            lambda content: content[:200],
            r"cannot be read \(.*truncated.*\): if it is damaged, write it again",
        ),
        (lambda content: content[: len(content) // 2], r"cannot be read \(.*truncated"),
        (lambda content: content[:-1], r"cannot be read \(.*truncated"),
    ],
)
def test_files_that_are_not_whole_hdf5(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = Path(write(tmp_path / "a.h5", arrays(rows=1000)))
    path.write_bytes(damage(path.read_bytes()))
    assert_refused(message, path)


def test_a_damaged_chunk_is_refused(tmp_path: Path) -> None:
    content = arrays(rows=1000)
    x = content.pop("x_train")
    path = write(tmp_path / "a.h5", content)
    with h5py.File(path, "a") as file:
        file.create_dataset("x_train", data=x, chunks=(100, 4, 3), compression="gzip")
        chunk = file["x_train"].id.get_chunk_info(4)
    with open(path, "r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(b"\xff" * chunk.size)
    assert_refused("cannot be read", path)


@pytest.mark.parametrize("spec", ["mnist", "nowhere/a.h5", "digits:3", "cifar10:", ""])
def test_unknown_data_lists_the_known(spec: str) -> None:
    assert_refused("neither one of fashion-mnist, digits, cifar10.*, nor an existing path, nor a function", spec)


def test_fewer_samples_than_ranks(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", arrays(rows=3))
    assert_refused("3 training samples for 4 ranks: use at most 3 ranks or more data", path, ranks=4)


# One shard file per rank


def test_a_rank_takes_its_shard_file_as_it_stands(tmp_path: Path) -> None:
    sizes = [4, 9]
    for rank, rows in enumerate(sizes):
        content = arrays(rows)
        content["y_train"][0] = 3 + rank
        write(tmp_path / f"part-{rank}.h5", content)
    pattern = str(tmp_path / "part-{rank}.h5")
    shards = [load(pattern, rank=rank, ranks=2) for rank in range(2)]
    assert [whole_of(s)[0].x[:, 0, 0].tolist() for s in shards] == [list(range(4)), list(range(9))]
    assert [s.source for s in shards] == [str(tmp_path / f"part-{rank}.h5") for rank in range(2)]
    assert {s.name for s in shards} == {"part-{rank}.h5"}
    facts = [(s.classes, s.samples) for s in shards]
    assert facts == [(4, 4), (5, 9)]
    for known in ([s.with_facts(*merge_facts(facts)) for s in shards], load_shards(pattern, ranks=2)):
        assert [(s.classes, s.train_samples_global, s.samples) for s in known] == [(5, 13, 4), (5, 13, 9)]


# Named data sets


def test_digits_are_dealt_whole_and_have_one_test_set() -> None:
    shards = [load("digits", rank=rank, ranks=3, seed=rank) for rank in range(3)]
    first = shards[0]
    train, test = whole_of(first)
    assert (first.input_shape, first.classes, first.kind) == (
        (8, 8, 1),
        10,
        "x (8, 8, 1) uint8, y () int32, class labels",
    )
    assert (first.train_samples_global, test.rows) == (1438, 359)
    assert (train.x.min(), train.x.max()) == (0, 255)
    for other in shards[1:]:
        np.testing.assert_array_equal(whole_of(other)[1].x, test.x)
    assert sum(s.samples or 0 for s in load_shards("digits", ranks=3)) == 1438


def test_digits_and_their_batches_keep_image_and_label_together() -> None:
    from sklearn.datasets import load_digits

    original = load_digits()
    label_of = {
        np.rint(image * 255 / 16).astype(np.uint8).tobytes(): label
        for image, label in zip(original.images, original.target, strict=True)
    }
    loaded = load("digits", rank=0, ranks=1)
    batch = Batches(loaded, seed=0, rank=0).take(40)
    assert batch[0].dtype == np.uint8
    for x, y, _ in (batch, *whole_of(loaded)):
        assert [label_of[image.tobytes()] for image in x] == y.tolist()


def test_digits_without_scikit_learn_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert_refused(r"needs scikit-learn: pip install scikit-learn", "digits")


def test_fashion_mnist_from_debian() -> None:
    if not named.FASHION_MNIST_FOLDER.is_dir():
        pytest.skip("needs Debian's package dataset-fashion-mnist")
    loaded = load("fashion-mnist", rank=1, ranks=4)
    train, test = whole_of(loaded)
    assert (loaded.samples, loaded.train_samples_global, test.rows) == (15000, 60000, 10000)
    assert (loaded.input_shape, loaded.classes, train.x.dtype) == ((28, 28, 1), 10, np.uint8)
    assert loaded.source == "Debian's dataset-fashion-mnist"
    assert np.bincount(test.y).tolist() == [1000] * 10
    # trousers (1) are narrow and bags (8) wide: ink in the left columns tells image and label belong together
    left = test.x[:, :, :6].mean(axis=(1, 2, 3))
    assert left[test.y == 8].mean() > 20 * left[test.y == 1].mean()


def idx(array: Any, magic: int | None = None) -> bytes:
    head = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim if magic is None else magic, *array.shape)
    return gzip.compress(head + array.tobytes(), mtime=0)


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three training and two test images in Fashion-MNIST's format."""
    monkeypatch.setattr(named, "FASHION_MNIST_FOLDER", tmp_path)
    for part, rows in (("train", 3), ("t10k", 2)):
        images = np.arange(rows * 6, dtype=np.uint8).reshape(rows, 2, 3)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(rows, dtype=np.uint8)))
    return tmp_path


def test_idx_files_are_read(fashion: Path) -> None:
    loaded = load("fashion-mnist", rank=0, ranks=1)
    train, test = whole_of(loaded)
    np.testing.assert_array_equal(train.x, np.arange(18).reshape(3, 2, 3, 1))
    np.testing.assert_array_equal(test.x, np.arange(12).reshape(2, 2, 3, 1))
    assert (train.y.tolist(), test.y.tolist()) == ([0, 1, 2], [0, 1])


GOOD_IDX = idx(np.zeros((3, 2, 3), np.uint8))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"plain text",
        GOOD_IDX[:-9],
        GOOD_IDX[:20] + b"\xff" * 20,
        idx(np.zeros((3, 2, 3), np.uint8), magic=0x801),
        gzip.compress(gzip.decompress(GOOD_IDX)[:-1]),
    ],
    ids=["empty", "no gzip", "cut off", "damaged", "not images", "too few images"],
)
def test_bad_idx_files_name_the_remedy(fashion: Path, content: bytes) -> None:
    path = fashion / "train-images-idx3-ubyte.gz"
    message = "train-images.* cannot be read .*reinstall dataset-fashion-mnist"
    path.write_bytes(content)
    assert_refused(message, "fashion-mnist")
    path.unlink()
    assert_refused(message, "fashion-mnist")


def offer_keras(monkeypatch: pytest.MonkeyPatch, folder: Path, load_data: Callable[[], Any] | None) -> None:
    """No Debian files; a Keras with this way to fetch the data, or none at all."""
    monkeypatch.setattr(named, "FASHION_MNIST_FOLDER", folder / "absent")
    monkeypatch.setenv("KERAS_HOME", str(folder / "home"))
    datasets = types.SimpleNamespace(fashion_mnist=types.SimpleNamespace(load_data=load_data))
    monkeypatch.setitem(sys.modules, "keras", load_data and types.SimpleNamespace(datasets=datasets))


def test_fashion_mnist_from_keras_keeps_stdout_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_data() -> Any:
        print("Downloading")
        content = arrays(3)
        return (content["x_train"], content["y_train"]), (content["x_test"], content["y_test"])

    offer_keras(monkeypatch, tmp_path, load_data)
    loaded = load("fashion-mnist", rank=0, ranks=1)
    assert (loaded.input_shape, loaded.samples, loaded.classes) == ((4, 3, 1), 3, 10)
    assert "Keras" in loaded.source
    assert capsys.readouterr().out == ""


def test_fashion_mnist_out_of_reach_names_every_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_data() -> Any:
        raise Exception("URL fetch failure\non a second line")

    remedies = "apt-get install dataset-fashion-mnist, or use a machine that can download, or --data digits"
    offer_keras(monkeypatch, tmp_path, load_data)
    assert_refused(rf"\(URL fetch failure\): {remedies}", "fashion-mnist")
    offer_keras(monkeypatch, tmp_path, None)
    assert_refused(remedies, "fashion-mnist")


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """CIFAR-10's six files with two records each: label, then planes whose values tell colour and place."""
    plane = np.add.outer(np.arange(32), 2 * np.arange(32))
    image = np.stack([plane, plane + 50, plane + 100]).astype(np.uint8)
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        records = b"".join(bytes([label]) + image.tobytes() for label in (number, 9))
        (tmp_path / f"{name}.bin").write_bytes(records)
    return tmp_path


def test_cifar10_is_read_from_the_folder_named_in_either_way(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = load(f"cifar10:{cifar}", rank=0, ranks=1)
    monkeypatch.setenv("DLION_CIFAR10", str(cifar))
    by_variable = load("cifar10", rank=0, ranks=1)
    for loaded in (named, by_variable):
        assert (loaded.input_shape, loaded.classes, loaded.example().x.dtype) == ((32, 32, 3), 10, np.uint8)
        train, test = whole_of(loaded)
        assert train.y.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
        assert test.y.tolist() == [5, 9]
        for x in (train.x, test.x):
            assert x[-1, 3, 5].tolist() == [13, 63, 113]
            assert x.flags.c_contiguous
    assert load(f"cifar10:{cifar}", rank=1, ranks=3).samples in (3, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x01" * 6145, "is truncated, 6145 bytes are not whole images: unpack"),
        (b"", "is truncated, 0 bytes"),
        (b"\x0a" * 3073, "has label 10, CIFAR-10 only 0 to 9"),
    ],
)
def test_bad_cifar10_files_say_what_to_change(cifar: Path, content: bytes, message: str) -> None:
    (cifar / "data_batch_3.bin").write_bytes(content)
    assert_refused(rf"data_batch_3\.bin {message}", f"cifar10:{cifar}")


def test_missing_cifar10_names_the_remedies(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cifar / "test_batch.bin").unlink()
    assert_refused(r"test_batch\.bin cannot be read \(No such file .*\): unpack", f"cifar10:{cifar}")
    monkeypatch.chdir(cifar)
    monkeypatch.delenv("DLION_CIFAR10", raising=False)
    assert_refused("'cifar-10-batches-bin' is missing: .*cifar10:FOLDER or DLION_CIFAR10", "cifar10")


def test_a_rank_out_of_range_is_a_bug_of_the_caller() -> None:
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"rank {rank} is not one of 2"):
            load("digits", rank=rank, ranks=2)
