"""The job and the launcher that started this process, as the environment describes them. No MPI call, no import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """This process among those that its launcher started. ``launcher``: the name by which a user knows it."""

    launcher: str
    rank: int
    size: int
    speaks_mpi: bool = True
    """Whether the launcher gave MPI a way to find the other processes."""


def place(environ: Mapping[str, str]) -> Place | None:
    """Return the place of this process, or None if no launcher says it.

    The innermost launcher counts: mpirun inside a Slurm job starts its processes with srun, whose variables they then
    have too.
    """
    if "OMPI_COMM_WORLD_RANK" in environ:
        return _place(environ, "mpirun (Open MPI)", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    by_srun = "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ
    # MPICH's mpirun counts the ranks of a node in a variable that srun --mpi=pmi2 does not set.
    if "PMI_RANK" in environ and ("MPI_LOCALNRANKS" in environ or not by_srun):
        return _place(environ, "mpirun (MPICH)", "PMI_RANK", "PMI_SIZE")
    if not by_srun:
        return None
    if environ.get("PMIX_NAMESPACE", "").startswith("slurm"):
        return _place(environ, "srun --mpi=pmix", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    if "PMI_FD" in environ:
        return _place(environ, "srun --mpi=pmi2", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    return _place(environ, "srun without --mpi", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", speaks_mpi=False)


def _place(environ: Mapping[str, str], launcher: str, rank: str, size: str, *, speaks_mpi: bool = True) -> Place | None:
    try:
        return Place(launcher, int(environ[rank]), int(environ[size]), speaks_mpi)
    except (KeyError, ValueError):
        return None


def alone_by_mistake(environ: Mapping[str, str], ranks: int) -> str:
    """Return a remedy if the launcher started several processes and MPI sees only this one; else an empty text.

    Each process would train alone and take itself for the whole run.
    """
    here = place(environ)
    if ranks > 1 or here is None or here.size < 2:
        return ""
    started = f"{here.launcher} started {here.size} processes, but MPI sees one"
    if here.launcher.startswith("srun"):
        return f"{started}: use srun --mpi=pmix for Open MPI, --mpi=pmi2 for MPICH, or mpirun inside the job"
    return f"{started}: use the mpirun that belongs to the MPI library (dlion doctor shows both)"


def slurm(environ: Mapping[str, str]) -> str:
    """Return the Slurm job in one line, or an empty text outside of one."""
    if "SLURM_JOB_ID" not in environ:
        return ""
    count = environ.get("SLURM_JOB_NUM_NODES", "?")
    listed = environ.get("SLURM_JOB_NODELIST")
    components = int(environ["SLURM_HET_SIZE"]) if environ.get("SLURM_HET_SIZE", "").isdigit() else 0
    if components:
        groups = [environ.get(f"SLURM_JOB_NODELIST_HET_GROUP_{group}", "?") for group in range(components)]
        nodes = f"{components} components on {' and '.join(groups)}"
    else:
        nodes = f"{count} nodes{f' ({listed})' if listed else ''}, {environ.get('SLURM_NTASKS', '?')} tasks"
    partition = environ.get("SLURM_JOB_PARTITION")
    again = environ.get("SLURM_RESTART_COUNT", "0")
    return (
        f"Slurm job {environ['SLURM_JOB_ID']}: {nodes}"
        + (f", partition {partition}" if partition else "")
        + (f", queued again {again} times" if again != "0" else "")
    )


def visible_gpus(environ: Mapping[str, str]) -> str:
    """Return the variable with the GPUs of this process, or an empty text if the job sets none."""
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        if name in environ:
            return f"{name}={environ[name]}"
    return ""


def ranges(cores: list[int]) -> str:
    """Write sorted core numbers in short: 0-3,8."""
    parts: list[list[int]] = []
    for core in cores:
        if parts and core == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], core]
        else:
            parts.append([core])
    return ",".join("-".join(map(str, part)) for part in parts)
