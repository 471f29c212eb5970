"""How rows are dealt to ranks, the shard files that hold them, and the table that shows it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion_mpi.commands import data as datatool
from dlion_mpi.errors import UserError
from dlion_mpi.learner.partition import partition_rows
from dlion_mpi.learner.shards import load
from tests.shards import whole_of

ROWS = 30
CLASSES = 3


@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=120),
    ranks=st.integers(1, 12),
    method=st.sampled_from(["iid", "dirichlet"]),
    alpha=st.sampled_from([1e-300, 0.01, 0.5, 10.0, 1e6]),
    seed=st.integers(0, 2**64),
)
def test_a_partition_gives_each_row_to_exactly_one_rank(
    labels: list[int], ranks: int, method: str, alpha: float, seed: int
) -> None:
    y = np.array(labels)
    ranks = min(ranks, len(y))
    dealt = partition_rows(y, ranks=ranks, method=method, alpha=alpha, seed=seed)
    assert len(dealt) == ranks
    np.testing.assert_array_equal(np.sort(np.concatenate(dealt)), np.arange(len(y)))
    sizes = [len(rows) for rows in dealt]
    assert min(sizes) >= 1
    assert method != "iid" or max(sizes) - min(sizes) <= 1
    for rows, again in zip(dealt, partition_rows(y, ranks=ranks, method=method, alpha=alpha, seed=seed), strict=True):
        np.testing.assert_array_equal(rows, again)
        assert (np.diff(rows) > 0).all()


@pytest.mark.parametrize("method", ["iid", "dirichlet"])
def test_partition_depends_on_the_seed(method: str) -> None:
    y = np.arange(200) % 4
    first, second = (partition_rows(y, ranks=2, method=method, seed=seed)[0].tolist() for seed in (0, 1))
    assert first != second


def test_alpha_sets_how_unequal_the_classes_are() -> None:
    y = np.arange(4000) % 10

    def largest_share(alpha: float) -> float:
        """Mean over classes of the share that the class's fullest rank has; 0.25 is even."""
        dealt = partition_rows(y, ranks=4, method="dirichlet", alpha=alpha, seed=3)
        counts = np.array([np.bincount(y[rows], minlength=10) for rows in dealt])
        return float((counts.max(axis=0) / counts.sum(axis=0)).mean())

    assert largest_share(0.01) > 0.9
    assert 0.35 < largest_share(1.0) < 0.8
    assert largest_share(1e6) < 0.26


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": 4}, "has 3 training samples for 4 ranks: use at most 3 ranks or more data"),
        ({"method": "fair"}, "--partition fair: must be one of iid, dirichlet"),
        ({"alpha": 0.0}, "--dirichlet-alpha 0: must be above 0"),
        ({"alpha": -1.0}, "--dirichlet-alpha -1: must be above 0"),
        ({"alpha": float("nan")}, "--dirichlet-alpha nan: must be above 0"),
        ({"alpha": float("inf")}, "--dirichlet-alpha inf: must be above 0"),
        ({"seed": -1}, "--seed -1: must be 0 or more"),
    ],
)
def test_bad_partitions_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        partition_rows(np.arange(3), **{"ranks": 2, "method": "dirichlet", **arguments})


@pytest.fixture
def whole(tmp_path: Path) -> str:
    """An HDF5 data set whose every row says which row it is."""
    path = tmp_path / "whole.h5"
    with h5py.File(path, "w") as file:
        file["x_train"] = np.arange(ROWS, dtype=np.uint8)[:, None] * np.ones(4, np.uint8)
        file["y_train"] = np.arange(ROWS) % CLASSES
        file["x_test"] = np.full((7, 4), 9, np.uint8)
        file["y_test"] = np.arange(7) % CLASSES
    return str(path)


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_split_writes_the_shards_that_load_deals(whole: str, tmp_path: Path, partition: str) -> None:
    pattern = str(tmp_path / "shard-{rank}.h5")
    paths = datatool.split(whole, pattern, ranks=3, partition=partition, alpha=0.5, seed=7)
    assert paths == [str(tmp_path / f"shard-{rank}.h5") for rank in range(3)]
    for rank in range(3):
        dealt = load(whole, rank=rank, ranks=3, partition=partition, alpha=0.5, seed=7)
        read = load(pattern, rank=rank, ranks=3)
        for own, other in zip(whole_of(read), whole_of(dealt), strict=True):
            np.testing.assert_array_equal(own.x, other.x)
            np.testing.assert_array_equal(own.y, other.y)
            assert own.x.dtype == np.uint8
        assert read.classes == CLASSES


def test_split_records_how_it_was_done(whole: str, tmp_path: Path) -> None:
    paths = datatool.split(whole, str(tmp_path / "s{rank}.h5"), ranks=2, partition="dirichlet", alpha=0.25, seed=3)
    with h5py.File(paths[1]) as file:
        attributes = dict(file.attrs)
    assert attributes == {
        "classes": CLASSES,
        "source": whole,
        "partition": "dirichlet",
        "alpha": 0.25,
        "seed": 3,
        "rank": 1,
        "ranks": 2,
    }


def test_shard_files_that_do_not_fit_the_run_are_refused(whole: str, tmp_path: Path) -> None:
    pattern = str(tmp_path / "s{rank}.h5")
    paths = datatool.split(whole, pattern, ranks=3)
    with pytest.raises(UserError, match=r"s1\.h5 is one of 3 shards: start 3 ranks, or split again"):
        load(pattern, rank=1, ranks=2)
    with pytest.raises(UserError, match=r"already divided .*: leave out the partition 'dirichlet'"):
        load(pattern, rank=1, ranks=3, partition="dirichlet")
    Path(paths[2]).unlink()
    with pytest.raises(UserError, match=r"s2\.h5 is missing: 3 ranks need one each, 0 to 2"):
        load(pattern, rank=2, ranks=3)


def test_a_shard_without_the_last_class_still_knows_all_classes(tmp_path: Path) -> None:
    path = tmp_path / "two.h5"
    with h5py.File(path, "w") as file:
        for part in ("train", "test"):
            file[f"x_{part}"] = np.zeros((2, 1), np.uint8)
        file["y_train"], file["y_test"] = [0, 5], [0, 0]
    pattern = str(tmp_path / "s{rank}.h5")
    datatool.split(str(path), pattern, ranks=2)
    assert [load(pattern, rank=rank, ranks=2).classes for rank in range(2)] == [6, 6]


def test_split_makes_missing_folders_and_leaves_only_the_shards(whole: str, tmp_path: Path) -> None:
    datatool.split(whole, str(tmp_path / "site-{rank}" / "data.h5"), ranks=2)
    for rank in range(2):
        assert [path.name for path in (tmp_path / f"site-{rank}").iterdir()] == ["data.h5"]


def test_split_overwrites_only_when_asked(whole: str, tmp_path: Path) -> None:
    pattern = str(tmp_path / "out" / "s{rank}.h5")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "s1.h5").write_text("precious")
    with pytest.raises(UserError, match=r"s1\.h5 exists already: .*--overwrite"):
        datatool.split(whole, pattern, ranks=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["s1.h5"]
    assert (tmp_path / "out" / "s1.h5").read_text() == "precious"
    datatool.split(whole, pattern, ranks=2, overwrite=True)
    assert load(pattern, rank=1, ranks=2).samples == ROWS // 2


def test_a_failed_write_leaves_the_old_file_and_no_temporary(
    whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    pattern = str(folder / "s{rank}.h5")
    (old,) = datatool.split(whole, pattern, ranks=1)
    before = Path(old).read_bytes()

    def no_space(path: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datatool, "_fsync", no_space)
    with pytest.raises(UserError, match=r"s0\.h5 cannot be written \(No space left on device\)"):
        datatool.split(whole, pattern, ranks=1, seed=1, overwrite=True)
    assert Path(old).read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["s0.h5"]


def test_split_below_a_file_is_a_user_error(whole: str) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        datatool.split(whole, f"{whole}/s{{rank}}.h5", ranks=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda data, out: datatool.split(data, out + "s.h5", ranks=2), r"put \{rank\} in its name"),
        (lambda data, out: datatool.split(out + "{rank}.h5", out + "b{rank}.h5", ranks=2), "already split"),
        (lambda data, out: datatool.split(data, out + "s{rank}.h5", ranks=0), "--ranks 0: must be at least 1"),
        (lambda data, out: datatool.split(data, out + "s{rank}.h5", ranks=31), "30 training samples for 31"),
        (
            lambda data, out: datatool.split(data, out + "s{rank}.h5", ranks=2, alpha=0),
            "--dirichlet-alpha 0: must be above 0",
        ),
        (lambda data, out: datatool.info(data, ranks=0), "--ranks 0: must be at least 1"),
        (
            lambda data, out: datatool.info(data, ranks=2, partition="fair"),
            "--partition fair: must be one of iid, dirichlet",
        ),
        (lambda data, out: datatool.info("no-such"), "unknown data 'no-such'"),
    ],
)
def test_bad_requests_say_what_to_change_and_write_nothing(
    whole: str, tmp_path: Path, call: Callable[[str, str], object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call(whole, f"{tmp_path}/")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["whole.h5"]


def test_info_shows_the_data_set_and_what_each_rank_gets(whole: str) -> None:
    lines = datatool.info(whole, ranks=2, partition="dirichlet", alpha=0.1, seed=1).splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines[:5])
    assert facts == {"name": "whole.h5", "source": whole, "x": "(4,) uint8", "y": "() int32", "classes": "3"}
    assert [line.split() for line in lines[5:7]] == [["train", "rows", "30"], ["test", "rows", "7"]]
    assert lines[7].split(maxsplit=1)[1] == "dirichlet, alpha 0.1, seed 1"
    table = [[int(cell) for cell in line.split()] for line in lines[-2:]]
    for rank, row in enumerate(table):
        shard = load(whole, rank=rank, ranks=2, partition="dirichlet", alpha=0.1, seed=1)
        assert row == [rank, shard.samples, *np.bincount(whole_of(shard)[0].y, minlength=CLASSES)]


def test_info_finds_all_shard_files(whole: str, tmp_path: Path) -> None:
    pattern = str(tmp_path / "s{rank}.h5")
    datatool.split(whole, pattern, ranks=3)
    lines = datatool.info(pattern).splitlines()
    assert [line.split()[:2] for line in lines[-3:]] == [["0", "10"], ["1", "10"], ["2", "10"]]
    assert "train rows  30" in lines


def test_info_counts_classes_when_they_are_too_many_for_a_table(tmp_path: Path) -> None:
    path = tmp_path / "many.h5"
    with h5py.File(path, "w") as file:
        for part in ("train", "test"):
            file[f"x_{part}"] = np.zeros((100, 1), np.uint8)
            file[f"y_{part}"] = np.r_[np.arange(99), 98]
    assert datatool.info(str(path)).splitlines()[-1].split() == ["0", "100", "99", "2"]


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, dlion_mpi.commands.data; print({'keras', 'tensorflow', 'sklearn'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
