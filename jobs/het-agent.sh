#!/usr/bin/env bash
# How Open MPI's mpirun reaches the nodes of a heterogeneous job, of which by itself it sees the first component only.
# It calls this like ssh, with a host and a command; jobs/prologue.sh tells it to.

set -euo pipefail
while [ "${1#-}" != "$1" ]; do shift; done # options of ssh
host=$1
shift
for ((group = 0; group < SLURM_HET_SIZE; group++)); do
    nodes=SLURM_JOB_NODELIST_HET_GROUP_$group
    hosts=$(scontrol show hostnames "${!nodes}")
    if grep -qxF "$host" <<<"$hosts"; then break; fi
done
if [ "$group" = "$SLURM_HET_SIZE" ]; then
    echo "jobs: $host is not in this job" >&2
    exit 1
fi
# --overlap: it starts ranks where the job's processors are counted as taken.
exec srun --het-group="$group" --nodes=1 --ntasks=1 --nodelist="$host" --mpi=none --overlap bash -c "$*"
