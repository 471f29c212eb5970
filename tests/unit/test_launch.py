"""`dlion launch`: the command line for every MPI, from stand-ins of their launchers, and what is refused."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dlion_mpi import cli
from dlion_mpi.mpi import launcher
from dlion_mpi.mpi.launcher import Host, Launcher

VERSIONS = {
    "Open MPI 5.0.11": "mpirun (Open MPI) 5.0.11",
    "Open MPI 4.1.4": "mpirun (Open MPI) 4.1.4",
    "MPICH 5.0.2": "HYDRA build details:\n    Version:                                 5.0.2",
    "Intel MPI": "Intel(R) MPI Library for Linux* OS, Version 2021.11 Build 20231005",
}
SRUN = "MPI plugin types are...\n\tnone\n\tpmi2\n\tpmix\nspecific pmix plugin versions available: pmix_v4"
OPENMPI = Launcher(path="/v/mpirun", kind="openmpi", name="Open MPI 5.0.11")
MPICH = Launcher(path="/v/mpirun", kind="hydra", name="MPICH 5.0.2")
SLURM = Launcher(path="/bin/srun", kind="srun", name="Open MPI 5.0.11", pmi="pmix")


def write_program(path: Path, text: str) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any launcher, job or scripts: `venv` has this Python, `bin` is the PATH."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "PMIX_", "MPI_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "python"))
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "bin"), "/usr/bin", "/bin"]))
    monkeypatch.setattr(launcher, "find_program", hiding("mpirun", below=tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hiding(name: str, below: Path) -> Callable[..., str | None]:
    """`find_program` that finds a program of this name in one folder only: the system may have one, too."""
    real = launcher.find_program

    def find_program(program: str, **places: str | None) -> str | None:
        found = real(program, **places)
        return None if program == name and found and not found.startswith(str(below)) else found

    return find_program


def launched(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What `--dry-run` prints."""
    assert cli.main(["launch", "--dry-run", *words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize("name", VERSIONS)
def test_launchers_are_told_apart_and_the_one_next_to_python_comes_first(name: str, machine: Path) -> None:
    other = write_program(machine / "bin" / "mpirun", "mpirun (Open MPI) 1.2.3")
    assert launcher.find() == Launcher(path=other, kind="openmpi", name="Open MPI 1.2.3")
    path = write_program(machine / "venv" / "mpirun", VERSIONS[name])
    kind = "openmpi" if name.startswith("Open MPI") else "hydra"
    assert launcher.find() == Launcher(path=path, kind=kind, name=name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Open MPI 5.0.11", "--bind-to none --allow-run-as-root --oversubscribe --mca btl ^ofi -n 4"),
        ("Open MPI 4.1.4", "--bind-to none --allow-run-as-root --oversubscribe --mca btl ^ofi -n 4"),
        ("MPICH 5.0.2", "-bind-to none -n 4"),
        ("Intel MPI", "-bind-to none -n 4"),
    ],
)
def test_train_is_the_dlion_next_to_python_with_the_options_that_each_mpi_needs(
    name: str, words: str, machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    mpirun = write_program(machine / "venv" / "mpirun", VERSIONS[name])
    line = launched(capsys, "-n", "4", "train", "--data", "a b", "--", "-n")
    assert shlex.split(line) == [
        mpirun,
        *words.split(),
        sys.executable,
        "-m",
        "dlion_mpi",
        "train",
        "--data",
        "a b",
        "--",
        "-n",
    ]
    dlion = write_program(machine / "venv" / "dlion", "")
    assert launched(capsys, "-np", "4", "train").endswith(f" {dlion} train")


def test_only_root_says_that_it_is_root() -> None:
    assert "--allow-run-as-root" not in launcher.command_line(OPENMPI, ["x"], ranks=1, environ={})


def test_the_users_choice_of_transports_stays() -> None:
    assert "--mca" not in launcher.command_line(OPENMPI, ["x"], ranks=1, environ={"OMPI_MCA_btl": "tcp,self"})


@pytest.mark.parametrize(
    ("starter", "words"),
    [
        (OPENMPI, "/v/mpirun --bind-to none --host a:2,b:1 -x PATH -x PYTHONPATH -n 3 --mca x y prog"),
        (MPICH, "/v/mpirun -bind-to none -hosts a:2,b:1 -n 3 --mca x y prog"),
    ],
)
def test_other_hosts(starter: Launcher, words: str) -> None:
    hosts, environ = [Host("a", 2), Host("b")], {"PATH": "/bin", "PYTHONPATH": "/x"}
    found = launcher.command_line(starter, ["prog"], ranks=3, hosts=hosts, options=["--mca", "x", "y"], environ=environ)
    assert found == words.split()


@pytest.mark.parametrize("host", ["localhost", socket.gethostname()])
def test_this_machine_by_name_needs_no_network(host: str) -> None:
    (here,) = launcher.parse_hosts(f"{host}:3")
    assert launcher.command_line(OPENMPI, ["x"], ranks=3, hosts=[here], environ={}) == launcher.command_line(
        OPENMPI, ["x"], ranks=3, environ={}
    )


def test_a_host_that_only_ssh_knows(machine: Path) -> None:
    ssh = write_program(machine / "bin" / "ssh", "user me\nhostname 127.0.0.1\nport 22")
    assert launcher.parse_hosts("gpu1.invalid:2,localhost") == (Host("gpu1.invalid", 2), Host("localhost"))
    Path(ssh).write_text("#!/bin/sh\necho hostname gpu1.invalid\n", encoding="utf-8")
    with pytest.raises(launcher.UserError, match=r"unknown host gpu1.invalid: check the name"):
        launcher.parse_hosts("gpu1.invalid:2,localhost")


def test_the_number_of_ranks_is_that_of_the_hosts(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_program(machine / "venv" / "mpirun", VERSIONS["MPICH 5.0.2"])
    assert " -n 3 " in launched(capsys, "--hosts", "localhost:2,localhost", "train")
    assert " -n 2 " in launched(capsys, "--hosts", "localhost:2,localhost", "-n", "2", "train")


@pytest.mark.parametrize(
    ("name", "plugins", "starts"),
    [
        (
            "Open MPI 5.0.11",
            SRUN,
            "srun --mpi=pmix --kill-on-bad-exit=0 --wait=10 --disable-status --cpus-per-task=4 -n 6",
        ),
        ("MPICH 5.0.2", SRUN, "srun --mpi=pmi2 --kill-on-bad-exit=0 --wait=10 --disable-status --cpus-per-task=4 -n 6"),
        ("Open MPI 5.0.11", "none pmi2", "mpirun --bind-to none -n 6"),
        ("MPICH 5.0.2", "none pmix", "mpirun -bind-to none -n 6"),
    ],
)
def test_in_a_slurm_job_srun_if_it_can_else_mpirun(
    name: str,
    plugins: str,
    starts: str,
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    write_program(machine / "bin" / "srun", plugins)
    write_program(machine / "bin" / "mpirun", VERSIONS[name])
    for variable, value in (("SLURM_JOB_ID", "7"), ("SLURM_NTASKS", "6"), ("SLURM_CPUS_PER_TASK", "4")):
        monkeypatch.setenv(variable, value)
    script = machine / "mine.py"
    script.touch()
    line = launched(capsys, "mine.py", "--width", "3")
    assert line == f"{machine}/bin/{starts} {sys.executable} mine.py --width 3"
    monkeypatch.delenv("SLURM_NTASKS")
    assert " -n " not in launched(capsys, "mine.py")
    assert " -n 2 " in launched(capsys, "-n", "2", "mine.py")


def test_programs(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_program(machine / "venv" / "mpirun", VERSIONS["MPICH 5.0.2"])
    python = write_program(machine / "venv" / "python", "")
    write_program(machine / "bin" / "python", "")
    mine = write_program(machine / "bin" / "mine", "")
    train = write_program(machine / "bin" / "train", "")
    assert launched(capsys, "-n", "1", "--", "python", "x y.py").endswith(f" -n 1 {python} 'x y.py'")
    assert launched(capsys, "-n", "1", "mine", "-n", "3").endswith(f" -n 1 {mine} -n 3")
    assert launched(capsys, "-n", "1", "--", "train").endswith(f" -n 1 {train}")
    assert launched(capsys, "-n", "1", "--mpi-options", "-print-rank-map -genv 'A=b c'", "mine").endswith(
        f" -print-rank-map -genv 'A=b c' {mine}"
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-n", "0", "train"], "-n 0: must be a whole number from 1"),
        (["-n", "four", "train"], "-n four: must be a whole number from 1"),
        (["train"], "how many ranks? Write for example `dlion launch -n 4 train"),
        (["-n", "2"], "no command given: write for example"),
        (["-n", "2", "--"], "no command given: write for example"),
        (["-n", "2", "trian"], "command 'trian' not found: give train, doctor, a script.py or a program in PATH"),
        (["-n", "2", "no.py"], "script no.py not found"),
        (["-n", "3", "--hosts", "localhost:2", "train"], "-n 3: --hosts localhost:2 has room for 2"),
        (["--hosts", "localhost:0", "train"], "'localhost:0' is no HOST:RANKS"),
        (["--hosts", "localhost,", "train"], "'' is no HOST:RANKS"),
        (["--hosts", "nowhere.invalid:2", "train"], "unknown host nowhere.invalid"),
        (["-n", "2", "--mpi-options", "'x", "train"], "balance the quotes"),
        (["-n", "2", "--ranks", "2", "train"], "unrecognized arguments: --ranks"),
        (["-n", "2", "train"], "no mpirun next to this Python or in PATH: load your cluster's MPI module, or"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(
    words: list[str], says: str, machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "no mpirun" not in says:
        write_program(machine / "bin" / "mpirun", VERSIONS["Open MPI 5.0.11"])
    assert cli.main(["launch", *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("dlion: error: ")
    assert said.err.count("\n") == 1
    assert says in said.err
    assert not said.out


def test_an_mpirun_of_no_known_mpi(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_program(machine / "bin" / "mpirun", "my own")
    assert cli.main(["launch", "-n", "2", "train"]) == 2
    assert f"{path} is of no known MPI (Open MPI, MPICH, Intel MPI)" in capsys.readouterr().err


def test_ranks_start_no_ranks(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", rank)
        assert cli.main(["launch", "-n", "2", "train"]) == 2
        assert capsys.readouterr().err.count("this is rank 0 of 2 under mpirun (Open MPI)") == lines
