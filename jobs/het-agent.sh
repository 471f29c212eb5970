#!/usr/bin/env bash
# Launch agent that lets Open MPI's mpirun reach all nodes of a heterogeneous job; by itself it sees only the first
# component. jobs/prologue.sh configures mpirun to call it like ssh, with a host and a command.

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
# --overlap: Slurm counts the job's processors as in use already.
exec srun --het-group="$group" --nodes=1 --ntasks=1 --nodelist="$host" --mpi=none --overlap bash -c "$*"
