"""Every script of jobs/ on a real Slurm: what it trains, where its ranks are, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import BIN, DENSE, Cluster

pytestmark = pytest.mark.timeout(240)
TWO = ("--nodes=2", "--ntasks-per-node=1")
SHORT = (*DENSE, "--steps", "20")
LONG = (*DENSE, "--steps", "1000000", "--progress-every", "1")


def result(log: str) -> dict[str, Any]:
    """The result that a training has printed into its job's log."""
    (line,) = [line for line in log.splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(line)
    return found


def begun(cluster: Cluster, job: str) -> None:
    cluster.wait_for_log(job, "] ")
    cluster.wait_for_log(job, "samples/s")


def test_ranks_on_two_nodes_train_over_the_shaped_links(cluster: Cluster) -> None:
    before = cluster.sent_bytes(0) + cluster.sent_bytes(1)
    job = cluster.submit(
        *TWO, "jobs/cpu.sh", *SHORT, "--dlion.max-n", "100", "--exchange-share", "0", "--out", "runs/cpu"
    )
    ended = cluster.end(job)
    assert (ended.state, ended.code) == ("COMPLETED", 0), ended.log
    outcome = result(ended.log)
    assert (outcome["ranks"], outcome["steps"]) == (2, 20)
    assert ": srun --mpi=pmix" in ended.log
    # Past memory that is shared, and past the host's network: what ranks say they sent went through the links.
    sent = cluster.sent_bytes(0) + cluster.sent_bytes(1) - before
    assert sent > outcome["bytes_sent"] > 20_000
    assert len(list((cluster.checkout / "runs" / "cpu").glob("*.h5"))) == 2


def hetero(cluster: Cluster, launcher: str, *options: str) -> str:
    """Submit a rank on each kind of nodes. Returns the job's number."""
    (job,) = cluster.numbers(
        *("bash", "jobs/hetero.sh", *options),
        DLION_LAUNCH=launcher,
        DLION_HET_A="--partition=fast --nodes=1 --ntasks-per-node=1",
        DLION_HET_B="--partition=slow --nodes=1 --ntasks-per-node=1",
    )
    return job


def test_a_heterogeneous_job_is_one_world_over_both_kinds_of_nodes(cluster: Cluster) -> None:
    job = hetero(cluster, "srun", *SHORT)
    jobs = cluster.ended(job)
    assert [one.state for one in jobs] == ["COMPLETED", "COMPLETED"], jobs[0].log
    assert result(jobs[0].log)["ranks"] == 2
    assert {record["Partition"] for record in cluster.records(job)} == {"fast", "slow"}


def test_a_comparison_by_mpirun_runs_every_cell_once_and_then_reports(cluster: Cluster) -> None:
    array, report = cluster.numbers(
        *("bash", "jobs/against-horovod.sh", *DENSE, "--steps", "10"),
        DLION_LAUNCH="mpirun",
        DLION_STRATEGIES="allreduce dlion",
        DLION_SEEDS="3",
        DLION_SBATCH="--nodes=2",
        DLION_AT_ONCE="2",
        DLION_FOLDER="runs/compared",
    )
    for job in cluster.ended(array):
        assert (job.state, job.code) == ("COMPLETED", 0), job.log
        assert "/mpirun --" in job.log
    ended = cluster.end(report)
    assert (ended.state, ended.code) == ("COMPLETED", 0), ended.log
    folder = cluster.checkout / "runs" / "compared"
    results = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert {name: (run["strategy"], run["ranks"]) for name, run in results.items()} == {
        "none.dlion.3": ("dlion", 2),
        "none.allreduce.3": ("allreduce", 2),
    }
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in results)


def test_a_sweep_reports_what_worked_and_fails_for_what_did_not(cluster: Cluster) -> None:
    lines = cluster.checkout / "sweep.txt"
    lines.write_text("# two runs\n--learning-rate 0.1\n\n--learning-rate none\n", encoding="utf-8")
    array, report = cluster.numbers(
        *("bash", "jobs/sweep.sh", "sweep.txt", *DENSE, "--steps", "20"),
        DLION_SBATCH="--nodes=1",
        DLION_AT_ONCE="2",
        DLION_FOLDER="runs/swept",
    )
    states = sorted((job.state, job.code) for job in cluster.ended(array))
    assert states == [("COMPLETED", 0), ("FAILED", 2)]
    ended = cluster.end(report)
    assert (ended.state, ended.code) == ("FAILED", 1)
    assert "without a result: line-02" in ended.log
    assert (cluster.checkout / "runs" / "swept" / "report.html").exists()


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_a_mistake_fails_the_job_with_its_own_exit_code(cluster: Cluster, launcher: str) -> None:
    job = cluster.submit(*TWO, "jobs/cpu.sh", "--data", "nowhere.h5", DLION_LAUNCH=launcher)
    ended = cluster.end(job)
    assert (ended.state, ended.code) == ("FAILED", 2), ended.log
    assert "nowhere.h5" in ended.log


def test_a_rank_that_dies_fails_the_job_and_takes_the_others_along(cluster: Cluster) -> None:
    job = cluster.submit(*TWO, "jobs/cpu.sh", *LONG, "--out", "runs/dies", DLION_LAUNCH="srun")
    begun(cluster, job)
    killed = [pid for pid in Path("/proc").glob("[0-9]*") if is_rank(pid, cluster, rank="1")]
    assert len(killed) == 1
    os.kill(int(killed[0].name), signal.SIGKILL)
    ended = cluster.end(job, timeout_s=40)
    assert ended.state == "FAILED", ended.log
    assert ended.code != 0
    assert cluster.ranks_left() == []


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_scancel_ends_all_ranks_in_good_order(cluster: Cluster, launcher: str) -> None:
    """By mpirun, on nodes of both kinds, which takes more to reach them."""
    out = f"runs/cancelled-{launcher}"
    if launcher == "srun":
        job = cluster.submit(*TWO, "jobs/cpu.sh", *LONG, "--out", out, DLION_LAUNCH=launcher)
    else:
        job = hetero(cluster, launcher, *LONG, "--out", out)
    begun(cluster, job)
    assert cluster.login("scancel", job).returncode == 0
    ended = cluster.end(job, timeout_s=40)
    assert ended.state == "CANCELLED", ended.log
    assert "2 ranks" in ended.log
    assert cluster.ranks_left() == []
    if launcher == "srun":  # mpirun may end its ranks before they are done
        assert "stopped early: SIGTERM" in ended.log


def is_rank(process: Path, cluster: Cluster, *, rank: str) -> bool:
    try:
        variables = dict(
            entry.split("=", 1)
            for entry in (process / "environ").read_text(errors="replace").split("\0")
            if "=" in entry
        )
        line = (process / "cmdline").read_text(errors="replace")
        folder = os.readlink(process / "cwd")
    except OSError:
        return False
    # By its rank in MPI, which srun itself has not.
    return "dlion\0train" in line and folder == str(cluster.checkout) and variables.get("PMIX_RANK") == rank


def test_srun_without_mpi_is_refused_instead_of_training_four_times(cluster: Cluster) -> None:
    done = cluster.login(
        *("srun", "--nodes=2", "--ntasks-per-node=1", "--mpi=none", f"{BIN}/dlion", "train", *SHORT),
    )
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if "dlion: error:" in line]
    assert len(said) == 1
    assert "srun --mpi=pmix" in said[0]


def test_doctor_says_where_in_the_job_it_is(cluster: Cluster) -> None:
    where = ("--partition=fast", *TWO, "--mpi=pmix", "--output=doctor-%t.json")
    done = cluster.login("srun", *where, f"{BIN}/dlion", "doctor", "--json")
    assert done.returncode == 0, done.stderr
    reports = [json.loads((cluster.checkout / f"doctor-{rank}.json").read_text()) for rank in range(2)]
    assert {report["host"] for report in reports} == {"w0", "w1"}
    jobs = sorted(check["found"] for report in reports for check in report["checks"] if check["name"] == "job")
    for rank, job in enumerate(jobs):
        assert re.fullmatch(
            rf"Slurm job \d+: 2 nodes \(w\[0-1\]\), 2 tasks, partition fast, rank {rank} of 2 by srun --mpi=pmix", job
        )


def test_the_gpu_script_fits_nodes_with_gpus_and_asks_one_for_each_rank(cluster: Cluster) -> None:
    fits = cluster.login("sbatch", "--test-only", "--partition=fast", "--nodes=2", "jobs/gpu.sh")
    assert fits.returncode == 0, fits.stderr
    assert re.search(r"using 8 processors on nodes w\[0-1\]", fits.stderr), fits.stderr
    # Four ranks a node are more than it has GPUs, and slow nodes have none.
    for words in (("--partition=fast", "--nodes=1", "--ntasks-per-node=3"), ("--partition=slow", "--nodes=2")):
        refused = cluster.login("sbatch", "--test-only", "--cpus-per-task=1", *words, "jobs/gpu.sh")
        assert refused.returncode != 0, refused.stderr


def test_a_preempted_run_goes_on_where_it_was(cluster: Cluster) -> None:
    job = cluster.submit(
        *("--partition=spot", *TWO, "jobs/preemptible.sh", *DENSE),
        *("--seconds", "6", "--progress-every", "1", "--out", "runs/preempted"),
    )
    begun(cluster, job)
    urgent = cluster.submit("--partition=all", "--exclusive", "--nodes=4", "--wrap", "sleep 1")
    assert cluster.end(urgent).state == "COMPLETED"
    ended = cluster.end(job, timeout_s=120)
    assert (ended.state, ended.code) == ("COMPLETED", 0), ended.log
    assert cluster.records(job)[0]["Restarts"] == "1"
    assert ended.log.count("turn 1 has ended") == 1
    first, last = [json.loads(line) for line in ended.log.splitlines() if line.startswith("{")]
    # The seconds of training are those of both turns, and the steps too.
    assert first["seconds"] < 6 <= last["seconds"] < 12
    assert last["steps"] > first["steps"] > 0
