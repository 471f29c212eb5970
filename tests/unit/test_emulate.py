"""The emulator's parts that need no root: tc commands, mpirun command lines, the verdict of a check."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dlion_mpi.commands import emulate
from dlion_mpi.emulation import linkcheck, mpilaunch, netns, records
from dlion_mpi.emulation.linkcheck import Probe
from dlion_mpi.emulation.records import Emulation
from dlion_mpi.errors import RunError, UserError
from dlion_mpi.microcloud import environments
from dlion_mpi.microcloud.environments import Environment, Phase
from dlion_mpi.mpi.launcher import Launcher

SHARED = Environment(name="s", workers=3, phases=(Phase(cores=(1, 1, 1), uplink_mbit=(10, 20, 30)),))
MATRIX = Environment(name="m", workers=2, phases=(Phase(cores=(1, 1), link_mbit=((0, 5), (7, 0))),), latency_s=0.03)
DYNAMIC = Environment(
    name="d",
    workers=2,
    phases=(
        Phase(cores=(24, 24), uplink_mbit=(8, 8), share=0.5),
        Phase(cores=(24, 12), uplink_mbit=(2, 8), share=0.5),
    ),
)


def rates(commands: list[str]) -> dict[str, tuple[str, str]]:
    """Class -> (rate, ceil) in the commands that set classes."""
    words = [command.split() for command in commands if command.startswith("class")]
    return {w[w.index("classid") + 1]: (w[w.index("rate") + 1], w[w.index("ceil") + 1]) for w in words}


def test_a_shared_uplink_guarantees_an_even_part_and_lends_the_rest() -> None:
    commands = netns.shaping(SHARED, 1, SHARED.phases[0], verb="add")
    assert rates(commands) == {
        "1:1": ("20000000bit", "20000000bit"),
        "1:10": ("10000000bit", "20000000bit"),
        "1:12": ("10000000bit", "20000000bit"),
    }
    filters = [command for command in commands if command.startswith("filter")]
    assert any(f"dst {netns.address(0)}/32 flowid 1:10" in line for line in filters)
    assert any(f"dst {netns.address(2)}/32 flowid 1:12" in line for line in filters)
    assert len(filters) == 2


def test_a_matrix_holds_each_link_to_its_own_rate() -> None:
    commands = netns.shaping(MATRIX, 1, MATRIX.phases[0], verb="add")
    assert rates(commands)["1:10"] == ("7000000bit", "7000000bit")


def test_a_change_touches_classes_only() -> None:
    commands = netns.shaping(SHARED, 0, SHARED.phases[0], verb="change")
    assert all(command.startswith("class change ") for command in commands)
    assert len(commands) == 3


def test_one_worker_has_nothing_to_shape() -> None:
    alone = Environment(name="a", workers=1, phases=(Phase(cores=(1,), uplink_mbit=(1,)),))
    assert netns.shaping(alone, 0, alone.phases[0], verb="add") == []
    assert netns.segment_bytes(alone, 0) > 0


def test_segments_are_small_on_slow_links_only() -> None:
    fast = environments.load("homo-a")
    assert netns.segment_bytes(SHARED, 0) == 8 * 1514
    assert netns.segment_bytes(fast, 0) == 65_536


def test_too_many_workers() -> None:
    with pytest.raises(UserError, match=r"251 workers are too many.*dlion simulate"):
        netns.build("x", 251)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns.shutil, "which", lambda tool, path: None if tool == "tc" else f"/bin/{tool}")
    with pytest.raises(UserError, match=r"needs tc: install iproute2.*dlion simulate"):
        netns.require()


def test_not_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "which", lambda tool: f"/bin/{tool}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UserError, match=r"needs root.*dlion simulate"):
        netns.require()


def test_a_kernel_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(
            command, 2, "", "Error: Specified qdisc kind is unknown.\nCommand failed -:1"
        )

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(UserError, match=r"qdisc kind is unknown.*dlion simulate") as raised:
        netns.shape("x", SHARED, SHARED.phases[0], verb="add")
    assert "\n" not in str(raised.value)
    assert netns.delay("x", MATRIX) is False  # the caller says so, and continues without latency
    assert netns.delay("x", SHARED) is True


@pytest.fixture
def place(tmp_path: Path) -> Emulation:
    return Emulation(name="ab", environment="x", workers=2, folder=str(tmp_path))


def test_open_mpi_command(place: Emulation) -> None:
    launcher = Launcher(path="/v/mpirun", kind="openmpi", name="Open MPI 5.0.11")
    line = mpilaunch.launch_command(
        launcher, place, ["/bin/run", "a b"], forward=["DLION_X"], options=["--with-ft", "ulfm"]
    )
    text = " ".join(line)
    waits = line.index("ulfm") + 1
    assert text.endswith(" ".join(["-x DLION_X -n 2 --with-ft ulfm", *line[waits : waits + 3], "/bin/run a b"]))
    assert line[waits + 1 :] == ["-c", f'sleep {mpilaunch.BEFORE_START_S}; exec "$0" "$@"', "/bin/run", "a b"]
    assert "--host w0:1,w1:1 --map-by node --bind-to none" in text
    assert "--net=/run/netns/dlion-ab-hub /v/mpirun" in text
    assert f"sh {place.folder}/agent" in line


def test_mpich_command_keeps_off_shared_memory(place: Emulation) -> None:
    launcher = Launcher(path="/v/mpiexec", kind="hydra", name="MPICH 5.0.2")
    text = " ".join(mpilaunch.launch_command(launcher, place, ["/bin/run"], forward=["DLION_X"]))
    assert f"-launcher ssh -launcher-exec {place.folder}/agent -hosts w0,w1 -ppn 1" in text
    assert "-x DLION_X" not in text
    assert mpilaunch.environ_of(launcher)["UCX_TLS"] == "tcp,self"


def test_an_mpirun_that_knows_no_agent_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mpirun = tmp_path / "mpirun"
    mpirun.write_text("#!/bin/sh\necho 'mpirun (Open MPI) 4.1.4'\n", encoding="utf-8")
    mpirun.chmod(0o755)
    monkeypatch.setattr(mpilaunch.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match=r"is Open MPI 4\.1\.4: emulation needs Open MPI 5 or MPICH"):
        mpilaunch.find_launcher()


def test_commands_are_found_before_anything_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    program = tmp_path / "next-to-python"
    program.write_text("", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(mpilaunch.sys, "executable", str(tmp_path / "python"))
    assert mpilaunch.find_command(["sh", "-c", "x"])[0].endswith("bin/sh")
    assert mpilaunch.find_command(["next-to-python"]) == [str(program)]
    with pytest.raises(UserError, match="'no-such-program' not found"):
        mpilaunch.find_command(["no-such-program"])
    with pytest.raises(UserError, match="no command given"):
        mpilaunch.find_command([])


def test_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLION_RUNTIME_DIR", str(tmp_path / "records"))
    monkeypatch.setattr(records.tempfile, "gettempdir", lambda: str(tmp_path))
    mine = records.claim("homo-b", 2, name="unit-test", owned=True)
    assert records.find_all() == [mine]
    assert mine.owner_lives()
    assert not mine.is_stale()
    with pytest.raises(UserError, match="unit-test exists already"):
        records.claim("homo-b", 2, name="unit-test", owned=True)
    for bad in ("", "A", "a/b", "-a", "x" * 33):
        with pytest.raises(UserError, match="emulation name"):
            records.claim("homo-b", 2, name=bad, owned=False)
    with monkeypatch.context() as spaced:
        spaced.setattr(records.tempfile, "gettempdir", lambda: "/a b")
        with pytest.raises(UserError, match="has a space"):
            records.claim("homo-b", 2, name="other", owned=False)
    (tmp_path / "records" / "broken.json").write_text("{", encoding="utf-8")
    assert records.find_all() == [mine]
    assert records.take_down(mine) == []
    assert not Path(mine.folder).exists()
    assert records.find_all() == []


def test_a_later_process_with_the_same_id_is_not_the_owner() -> None:
    common = {"name": "x", "environment": "homo-b", "workers": 2, "folder": "/nowhere"}
    reused = Emulation(**common, owner_pid=os.getpid(), owner_started=1)  # type: ignore[arg-type]
    assert reused.is_stale()
    by_hand = Emulation(**common)  # type: ignore[arg-type]
    assert not by_hand.is_stale()


def test_arguments() -> None:
    parser = argparse.ArgumentParser()
    emulate.add_arguments(parser)
    args = parser.parse_args(["run", "--env", "homo-b", "--seconds", "5", "--", "train", "--env", "x", "--", "y"])
    assert (args.env, args.seconds) == ("homo-b", 5.0)
    assert args.rank_command[-5:] == ["train", "--env", "x", "--", "y"]
    with pytest.raises(SystemExit):
        parser.parse_args(["down", "--name", "x", "--all"])


def probe(bytes_per_bin: dict[tuple[int, int], list[float]], bins: int = 60) -> Probe:
    """A probe of two workers that received the given Mbit/s on each link, in equal pieces of the run."""
    received_bytes = np.zeros((2, 2, bins), dtype=np.int64)
    for (source, destination), mbit in bytes_per_bin.items():
        received_bytes[destination, source] = np.repeat(np.array(mbit) * 1e6 / 8 * 0.1, bins // len(mbit))
    paces_s = np.array([[[0.2, 0.2], [0.2, 0.2]], [[0.2, 0.2], [0.38, 0.38]]])
    return Probe(bin_s=0.1, received_bytes=received_bytes, paces_s=paces_s)


def test_a_good_probe_passes() -> None:
    report = linkcheck.evaluate(DYNAMIC, probe({(0, 1): [7.6, 1.9], (1, 0): [7.6, 7.6]}), 6.0)
    assert report.ok
    changes = [row for row in report.rows if row.what == "change"]
    assert [(row.worker, row.peer) for row in changes] == [(0, 1)]
    assert changes[0].measured == pytest.approx(0.3)
    assert "all within bounds" in linkcheck.to_table(report)
    assert json.loads(linkcheck.to_json(report))["ok"] is True


@pytest.mark.parametrize(
    ("links", "wrong"),
    [
        ({(0, 1): [7.6, 1.9], (1, 0): [7.6, 7.0]}, ("link", 2, 1)),  # 0.875 of what is set
        ({(0, 1): [7.6, 1.9], (1, 0): [8.3, 7.6]}, ("link", 1, 1)),
        ({(0, 1): [7.6, 1.9], (1, 0): [1.9, 7.6]}, ("link", 1, 1)),
    ],
)
def test_a_link_out_of_bounds(links: dict[tuple[int, int], list[float]], wrong: tuple[str, int, int]) -> None:
    report = linkcheck.evaluate(DYNAMIC, probe(links), 6.0)
    assert [(row.what, row.phase, row.worker) for row in report.rows if not row.ok] == [wrong]
    assert "1 of 9 measurements out of bounds" in linkcheck.to_table(report)


def test_a_late_change_is_out_of_bounds() -> None:
    measured = probe({(0, 1): [7.6, 7.6, 7.6, 1.9, 1.9], (1, 0): [7.6]})  # changed at 3.6 s, not at 3 s
    late = [row for row in linkcheck.evaluate(DYNAMIC, measured, 6.0).rows if row.what == "change"]
    assert late[0].measured == pytest.approx(0.8)
    never = linkcheck.evaluate(DYNAMIC, probe({(0, 1): [7.6], (1, 0): [7.6]}), 6.0)
    assert not never.ok


def test_a_pace_out_of_bounds() -> None:
    measured = probe({(0, 1): [7.6, 1.9], (1, 0): [7.6]})
    measured.paces_s[1, 1, 1] = 0.41
    wrong = [row for row in linkcheck.evaluate(DYNAMIC, measured, 6.0).rows if not row.ok]
    assert [(row.what, row.phase, row.worker) for row in wrong] == [("pace", 2, 1)]


def test_a_probe_that_says_nothing_useful() -> None:
    for text in ("", "hello\n", "[]", '{"bin_s": 0.1}'):
        with pytest.raises(RunError, match="no measurements"):
            linkcheck.read_probe(text, DYNAMIC)


def test_length_of_a_check() -> None:
    assert linkcheck.run_seconds(DYNAMIC, 4.0) == 8.0
    assert linkcheck.run_seconds(MATRIX, 4.0) == 4.0
    starts = tuple(Phase(cores=(1,), uplink_mbit=(1,), start_s=s) for s in (0.0, 9.0))
    assert linkcheck.run_seconds(Environment(name="x", workers=1, phases=starts), 4.0) == 13.0
