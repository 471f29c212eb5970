#!/usr/bin/env bash
# Train one model on two kinds of nodes at once: a heterogeneous job of two components, one MPI world.
#
#   bash jobs/hetero.sh [OPTIONS OF dlion train]      submits itself; what the components are: jobs/site.sh
#
# Nothing tells DLion which ranks are the fast ones: it times them. Without Slurm this is jobs/cpu.sh over a hostfile
# of unlike nodes.

cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}" || exit
if [ -z "${SLURM_JOB_ID:-}" ] && command -v sbatch >/dev/null; then
    source jobs/site.sh
    # Each component says all of its options: #SBATCH lines here would go to one of them only.
    unset SBATCH_PARTITION
    common=(--job-name=dlion-hetero --time="${DLION_HET_TIME:-01:00:00}")
    # shellcheck disable=SC2086
    exec sbatch --parsable "${common[@]}" --output=%x-%j.log $DLION_HET_A : "${common[@]}" $DLION_HET_B \
        jobs/hetero.sh "$@"
fi
source jobs/prologue.sh

"${launch[@]}" dlion train --data fashion-mnist --seconds 600 --out "runs/hetero-$run_id" "$@"
