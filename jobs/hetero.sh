#!/usr/bin/env bash
# Train one model on two kinds of nodes at once: a heterogeneous job of two components with one MPI world.
#
#   bash jobs/hetero.sh [OPTIONS OF dlion train]      submits itself; jobs/site.sh defines the components
#
# DLion measures the speed of each rank, so no option says which ranks are fast. Without Slurm, use jobs/cpu.sh with a
# hostfile of different nodes.

cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}" || exit
if [ -z "${SLURM_JOB_ID:-}" ] && command -v sbatch >/dev/null; then
    source jobs/site.sh
    # Each component gets all options explicitly, because #SBATCH lines would apply to one of them only.
    unset SBATCH_PARTITION
    common=(--job-name=dlion-hetero --time="${DLION_HET_TIME:-01:00:00}")
    # shellcheck disable=SC2086
    exec sbatch --parsable "${common[@]}" --output=%x-%j.log $DLION_HET_A : "${common[@]}" $DLION_HET_B \
        jobs/hetero.sh "$@"
fi
source jobs/prologue.sh

"${launch[@]}" dlion train --data fashion-mnist --seconds 600 --out "runs/hetero-$run_id" "$@"
