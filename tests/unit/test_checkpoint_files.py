"""What is on the disk: that it is whole or not there, whenever its writer is killed, and that damage is noticed."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlion_mpi.checkpoint import file, folder
from dlion_mpi.checkpoint.file import Damaged, Written
from dlion_mpi.checkpoint.folder import Part
from dlion_mpi.errors import UserError
from dlion_mpi.vector.named_arrays import Arrays, StateError, array, by_rank, part, under, vectors_by_rank

KILLS = 100


def state(step: int, size: int = 60_000) -> Arrays:
    """Large and small arrays that tell their step."""
    return {
        "model/knowledge": np.full(size, step, np.float32),
        "strategy/residuals/common": np.arange(size, dtype=np.float32) + step,
        "worker/step": np.array(step, np.int64),
        "inbox/values": np.empty(0, np.float32),
    }


def write_checkpoint(run: Path, step: int, ranks: int = 2, loss: float = 1.0) -> Path:
    """As a run does: every rank's file, then the manifest, then what is too old goes."""
    target = folder.folder_of(run, step)
    target.mkdir(parents=True, exist_ok=True)
    written = [file.write(folder.rank_path(target, rank), state(step), {"rank": str(rank)}) for rank in range(ranks)]
    folder.write_manifest(target, step, [Part(w, step, step / 10, loss + rank) for rank, w in enumerate(written)])
    folder.prune(run, 2)
    return target


def test_what_was_written_is_read(tmp_path: Path) -> None:
    written = file.write(tmp_path / "rank-00000.h5", state(7), {"config": "é = 1"})
    arrays, texts = file.read(tmp_path / "rank-00000.h5", written)
    assert texts == {"config": "é = 1"}
    assert set(arrays) == set(state(7))
    for name, value in state(7).items():
        np.testing.assert_array_equal(arrays[name], value)
        assert arrays[name].dtype == value.dtype
    assert os.listdir(tmp_path) == ["rank-00000.h5"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed_or_does_no_harm(tmp_path: Path, place: float, bit: int) -> None:
    path = tmp_path / "rank-00000.h5"
    written = file.write(path, state(7, 3000), {"rank": "0"})
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    try:
        arrays, texts = file.read(path, written)
    except Damaged:
        return
    assert texts == {"rank": "0"}
    for name, value in state(7, 3000).items():
        np.testing.assert_array_equal(arrays[name], value)


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.999])
def test_a_truncated_file_is_damaged(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "rank-00000.h5"
    written = file.write(path, state(7), {})
    os.truncate(path, int(kept if kept > 1 else kept * written.size_bytes))
    with pytest.raises(Damaged):
        file.read(path, written)


def test_a_file_that_points_elsewhere_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "secret.h5", "w") as other:
        other["x"] = np.zeros(3)
    path = tmp_path / "rank-00000.h5"
    for plant in (
        lambda f: f.__setitem__("x", h5py.ExternalLink("secret.h5", "/x")),
        lambda f: f.create_dataset("x", (3,), "f4", external=[(str(tmp_path / "secret.h5"), 0, 12)]),
        lambda f: f.create_dataset("x", data=["text"]),
        lambda f: f.create_dataset("x", data=np.zeros(2, [("a", "f4"), ("b", "i4")])),
        lambda f: f.create_dataset("x", (1 << 40,), "f4"),
    ):
        with h5py.File(path, "w") as made:
            plant(made)
        with pytest.raises(Damaged):
            file.read(path, Written(path.stat().st_size, 0))


def test_a_writer_that_is_killed_leaves_the_last_good_one(tmp_path: Path) -> None:
    """A hundred times, at any moment: writing, renaming, or removing what is too old."""
    chance = random.Random(0)
    began_s = time.monotonic()
    write_checkpoint(tmp_path, 1)
    step, sound, most_s = 1, 0, 4 * (time.monotonic() - began_s)
    for _ in range(KILLS):
        child = os.fork()
        if child == 0:
            for following in range(step + 1, step + 1000):
                write_checkpoint(tmp_path, following)
            os._exit(0)
        time.sleep(chance.uniform(0, most_s))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        complete = folder.complete(tmp_path)
        assert step == 0 or complete, "all were lost"
        if not complete:
            continue
        found = folder.read_manifest(complete[-1])
        assert found.step >= step, "the newest was lost"
        for rank in range(2):
            arrays, _ = found.read(rank)
            np.testing.assert_array_equal(arrays["model/knowledge"], np.float32(found.step))
        if found.step == step:  # on a busy machine a write takes longer than the first did
            most_s *= 1.2
        step, sound = found.step, sound + 1
        for place in folder.incomplete(tmp_path):
            folder.remove(place)
        folder.prune(tmp_path, 2)
    assert step > KILLS / 4, "the writer was hardly ever let write"
    assert sound > KILLS / 2


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step)
    folder.folder_of(tmp_path, 25).mkdir()
    folder.folder_of(tmp_path, 40).mkdir()
    folder.prune(tmp_path, 1)
    assert [path.name for path in folder.complete(tmp_path)] == ["step-00000030"]
    assert [path.name for path in folder.incomplete(tmp_path)] == ["step-00000040"], "that one is being written"


def test_later_ones_are_set_aside_not_lost(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10)
    write_checkpoint(tmp_path, 20)
    folder.folder_of(tmp_path, 30).mkdir()
    (moved,) = folder.set_aside(tmp_path, 10)
    assert moved.name == "aside-step-00000020"
    assert (moved / "rank-00001.h5").exists()
    assert [path.name for path in folder.complete(tmp_path)] == ["step-00000010"]
    assert not folder.incomplete(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 1, "step": 11, "ranks": []}', "x" * 99])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    place = write_checkpoint(tmp_path, 11)
    (place / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        folder.read_manifest(place)


def test_an_attribute_that_is_no_utf_8_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.h5"
    written = file.write(path, state(7), {"config": "a = 1"})
    with h5py.File(path, "r+") as opened:
        opened.attrs.create("config", b"\xff\xfe", dtype=h5py.string_dtype())
    with pytest.raises(Damaged, match=r"cannot be read: .*utf-8"):
        file.read(path, Written(path.stat().st_size, written.digest))


def test_a_checkpoint_without_one_rank_is_read_from_the_others(tmp_path: Path) -> None:
    found = folder.read_manifest(write_checkpoint(tmp_path, 11, ranks=3, loss=0.5))
    folder.write_manifest(found.folder, 11, [None, *found.parts[1:]])
    lacking = folder.read_manifest(found.folder)
    assert (lacking.ranks, lacking.missing, lacking.best) == (3, [0], 1)
    assert lacking.steps[0] == 11
    assert lacking.read(1)[0].keys() == found.read(1)[0].keys()
    folder.write_manifest(found.folder, 11, [None])
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        folder.read_manifest(found.folder)


def test_a_checkpoint_knows_its_best_rank_and_names_a_damaged_file(tmp_path: Path) -> None:
    found = folder.read_manifest(write_checkpoint(tmp_path, 11, ranks=3, loss=0.5))
    assert (found.ranks, found.best, found.time_s) == (3, 0, 1.1)
    unknown = folder.read_manifest(write_checkpoint(tmp_path, 12, loss=float("nan")))
    assert unknown.parts[0] is not None
    assert np.isnan(unknown.parts[0].loss)
    found.path(2).unlink()
    with pytest.raises(UserError, match=r"rank-00002\.h5 is damaged .*--resume-earlier"):
        found.read(2)


def test_a_full_disk_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rank-00000.h5"
    before = file.write(path, state(1), {})

    def full(descriptor: int, block: memoryview, offset: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file, "_write_at", full)
    with pytest.raises(OSError, match="No space left"):
        file.write(path, state(2), {})
    assert os.listdir(tmp_path) == [path.name]
    assert file.read(path, before)[0]["worker/step"] == 1


def test_named_arrays_are_checked() -> None:
    arrays = under("a", {"x": np.zeros(3, np.float32), "owed/1": np.ones(3, np.float32)})
    assert part(arrays, "a").keys() == {"x", "owed/1"}
    assert vectors_by_rank(part(arrays, "a"), "owed", range(2), 3).keys() == {1}
    for name, dtype, shape in (("a/y", "f4", (3,)), ("a/x", "f8", (3,)), ("a/x", "f4", (4,)), ("a/x", "f4", (3, None))):
        with pytest.raises(StateError, match=name):
            array(arrays, name, dtype, *shape)
    with pytest.raises(StateError, match="owed/1"):
        by_rank(part(arrays, "a"), "owed", [0, 2])
