"""Metrics files that are damaged anywhere are named within seconds; whatever is sound is shown."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dlion_mpi.cli import main
from dlion_mpi.errors import UserError
from dlion_mpi.metrics import check
from dlion_mpi.metrics.check import FileCheck
from dlion_mpi.metrics.reader import load
from dlion_mpi.metrics.timeline import RECORDS
from tests import runfiles

pytestmark = pytest.mark.timeout(100)
Captured = pytest.CaptureFixture[str]
RANKS = 24
Bytes = bytearray


def flip(data: Bytes, at: int, rng: random.Random) -> None:
    data[at] ^= 1 << rng.randrange(8)


def zero(data: Bytes, at: int, rng: random.Random) -> None:
    end = min(len(data), at + rng.choice([1, 8, 64, 512, 4096]))
    data[at:end] = bytes(end - at)


def scramble(data: Bytes, at: int, rng: random.Random) -> None:
    end = min(len(data), at + rng.choice([8, 64, 512]))
    data[at:end] = rng.randbytes(end - at)


def truncate(data: Bytes, at: int, rng: random.Random) -> None:
    del data[at:]


WAYS = (flip, zero, scramble, truncate)


@pytest.fixture
def limit_s(monkeypatch: pytest.MonkeyPatch) -> float:
    """A shorter time limit, still long for these files."""
    monkeypatch.setattr(check, "LIMIT_S", 1.0)
    return check.LIMIT_S


@pytest.fixture(scope="module", params=["closed", "open"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file that was closed, and one whose writer was killed."""
    recorder = runfiles.write(tmp_path_factory.mktemp("sound"), 0, 3, 300, host="é", commit="a" * 40)
    runfiles.write_timeline(recorder, 0, 3, 300)
    recorder.flush()
    data = recorder.path.read_bytes()
    data = data[: int.from_bytes(data[28:36], "little")]  # the rest is room for later rows
    recorder.close(complete=True)
    return data if request.param == "open" else recorder.path.read_bytes()


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_file_is_named_or_read_within_seconds(
    way: Callable[[Bytes, int, random.Random], None], sound: bytes, tmp_path: Path, limit_s: float
) -> None:
    """Damage at seeded places, half of them in the first 32 kB, where most of the structure is."""
    for rank in range(RANKS):
        rng = random.Random(f"{way.__name__} {rank}")
        data = bytearray(sound)
        way(data, rng.randrange(len(data) if rank % 2 else 32_768), rng)
        (tmp_path / f"metrics-{rank:05d}.h5").write_bytes(data)
    (tmp_path / f"metrics-{RANKS:05d}.h5").write_bytes(sound)
    begun_s = time.monotonic()
    run = load(tmp_path)
    named = {int(number) for note in run.notes for number in re.findall(r"metrics-(\d{5})\.h5", note)}
    read = {rank.rank for rank in run.ranks}
    assert named | read == set(range(RANKS + 1))
    assert not named & read
    assert RANKS in read
    for sound_rank in run.ranks:
        sound_rank.links()
        for name in RECORDS:
            sound_rank.timeline(name)
    assert time.monotonic() - begun_s < 60  # if all hang, four at a time, it is 6 s
    if way is truncate:
        assert named == set(range(RANKS))


# ---- a file on which HDF5 loops for ever


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run whose rank 1 has a hole where HDF5 stores the text of attributes."""
    folder = runfiles.make_run(tmp_path / "run", timeline=True)
    path = folder / "metrics-00001.h5"
    data = bytearray(path.read_bytes())
    at = data.index(b"GCOL") + 16
    data[at : at + 2048] = bytes(2048)
    path.write_bytes(data)
    return folder


def test_the_report_names_it_and_shows_the_others(
    folder: Path, tmp_path: Path, limit_s: float, capsys: Captured
) -> None:
    page = tmp_path / "page.html"
    begun_s = time.monotonic()
    assert main(["report", str(folder), "-o", str(page)]) == 0
    assert time.monotonic() - begun_s < 30
    line = "rank 1: metrics-00001.h5 cannot be read: it is damaged"
    assert capsys.readouterr().err == f"dlion report: dlion: {line}\n"
    assert line in page.read_text(encoding="utf-8")


def test_the_trace_names_it_and_shows_the_others(
    folder: Path, tmp_path: Path, limit_s: float, capsys: Captured
) -> None:
    begun_s = time.monotonic()
    assert main(["trace", str(folder), "-o", str(tmp_path / "trace.json")]) == 0
    assert time.monotonic() - begun_s < 30
    assert "dlion trace: rank 1: metrics-00001.h5 cannot be read: it is damaged\n" in capsys.readouterr().err


def test_watch_names_it_and_shows_the_others(folder: Path) -> None:
    command = [sys.executable, "-m", "dlion_mpi", "watch", str(folder), "--once"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert [line[:3] for line in done.stdout.splitlines()[1:3]] == ["[0]", "[2]"]
    assert "rank 1: metrics-00001.h5 cannot be read: it is damaged" in done.stdout


def test_a_run_of_which_all_is_damaged_is_refused(folder: Path, limit_s: float) -> None:
    for rank in (0, 2):
        shutil.copy(folder / "metrics-00001.h5", folder / f"metrics-{rank:05d}.h5")
    with pytest.raises(UserError, match=r"cannot be read: .*metrics-00000\.h5 cannot be read: it is damaged; "):
        load(folder)


def test_a_file_is_checked_once_unless_it_was_damaged_and_has_changed(
    folder: Path, tmp_path: Path, limit_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = FileCheck()
    paths = sorted(folder.glob("metrics-*.h5"))
    assert files.damaged(paths) == {paths[1]}
    begun_s = time.monotonic()
    for _ in range(20):
        assert files.damaged(paths) == {paths[1]}
    assert time.monotonic() - begun_s < 1
    shutil.copy(paths[0], paths[1])
    assert files.damaged(paths) == set()
