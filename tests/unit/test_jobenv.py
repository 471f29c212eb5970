"""What the environment says of the job: the launcher that counts, and ranks that would be alone by mistake."""

from __future__ import annotations

import pytest

from dlion_mpi.mpi import jobenv
from dlion_mpi.mpi.jobenv import Place

STEP = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "3"}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch script
        (OPEN_MPI, Place("mpirun (Open MPI)", 0, 3)),
        ({**STEP, **OPEN_MPI}, Place("mpirun (Open MPI)", 0, 3)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Place("mpirun (MPICH)", 1, 2)),
        ({**STEP, "PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "1"}, Place("mpirun (MPICH)", 1, 2)),
        ({**STEP, "PMIX_NAMESPACE": "slurm.pmix.7.0"}, Place("srun --mpi=pmix", 2, 4)),
        ({**STEP, "PMI_FD": "9", "PMI_RANK": "2", "PMI_SIZE": "4"}, Place("srun --mpi=pmi2", 2, 4)),
        (STEP, Place("srun without --mpi", 2, 4, speaks_mpi=False)),
        ({**STEP, "SLURM_PROCID": "two"}, None),
    ],
)
def test_the_innermost_launcher_counts(environ: dict[str, str], place: Place | None) -> None:
    assert jobenv.place(environ) == place


@pytest.mark.parametrize(
    ("environ", "ranks", "says"),
    [
        ({}, 1, ""),
        (STEP, 4, ""),
        (STEP, 1, "srun without --mpi started 4 processes, but MPI sees one: use srun --mpi=pmix"),
        ({**STEP, "PMIX_NAMESPACE": "slurm.pmix.7.0"}, 1, "srun --mpi=pmix started 4 processes, but MPI sees one"),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, 1, ""),
        ({**STEP, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, 1, ""),
        (OPEN_MPI, 1, "mpirun (Open MPI) started 3 processes, but MPI sees one: use the mpirun that belongs to"),
    ],
)
def test_ranks_that_would_be_alone_by_mistake_are_told(environ: dict[str, str], ranks: int, says: str) -> None:
    problem = jobenv.alone_by_mistake(environ, ranks)
    assert problem.startswith(says)
    assert bool(problem) == bool(says)


def test_a_heterogeneous_job_is_told_with_the_nodes_of_each_component() -> None:
    environ = {
        "SLURM_JOB_ID": "7",
        "SLURM_HET_SIZE": "2",
        "SLURM_JOB_NODELIST": "a1",
        "SLURM_JOB_NODELIST_HET_GROUP_0": "a1",
        "SLURM_JOB_NODELIST_HET_GROUP_1": "b[1-3]",
        "SLURM_JOB_PARTITION": "fast",
        "SLURM_RESTART_COUNT": "2",
    }
    assert jobenv.slurm(environ) == ("Slurm job 7: 2 components on a1 and b[1-3], partition fast, queued again 2 times")
    assert jobenv.slurm({}) == ""


@pytest.mark.parametrize(("cores", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2,5,7-8")])
def test_cores_are_told_in_ranges(cores: list[int], text: str) -> None:
    assert jobenv.ranges(cores) == text
