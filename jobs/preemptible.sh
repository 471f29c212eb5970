#!/usr/bin/env bash
# Train in a partition whose jobs may be preempted, or for longer than the time limit. The run saves a checkpoint
# before it is stopped, is queued again and resumes, as often as necessary.
#
#   sbatch --partition=spot jobs/preemptible.sh [OPTIONS OF dlion train]      in the checkout
#
# Slurm sends SIGUSR1 to this script, which forwards it to the ranks. They write a checkpoint together and end with
# exit code 75. This script then requeues the job, which keeps its number and so its --out.
#
#SBATCH --job-name=dlion-preemptible
#SBATCH --output=%x-%j.log
# Append to the output of earlier turns.
#SBATCH --open-mode=append
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --time=01:00:00
# Slurm may requeue the job, and signals this script (B: the batch shell) 60 s before the time limit. On preemption it
# signals immediately if the cluster has PreemptParameters=send_user_signal, and the partition's GraceTime remains. Use
# more than 60 s for a model that takes longer to write.
#SBATCH --requeue
#SBATCH --signal=B:USR1@60

cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}" || exit # Slurm runs a copy of this script
leaving='' # SIGUSR1 may arrive while this script is still preparing
trap 'leaving=yes' USR1
source jobs/prologue.sh

# --requeue: start in --out, or resume from the checkpoint there. Every minute, because a node may fail without a
# signal.
options=(--checkpoint-every 60s --keep-checkpoints 2 --out "runs/preemptible-$run_id" --requeue)

queue_again() {
    say "turn $((${SLURM_RESTART_COUNT:-0} + 1)) has ended, requeued as job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
    exit 75
}
[ -z "$leaving" ] || queue_again

# In the background, because bash handles signals only between commands. The background process is srun or mpirun
# itself, and both forward SIGUSR1 to every rank. Only the result is written to stdout.
result=${TMPDIR:-/tmp}/dlion-result-${SLURM_JOB_ID:-$$}
"${launch[@]}" dlion train --data fashion-mnist --seconds 3000 "${options[@]}" "$@" >"$result" &
ranks=$!
signalled='' cancelled=''
trap 'signalled=yes leaving=yes; say "preempted: saving a checkpoint"; kill -USR1 "$ranks" || true' USR1
# SIGTERM is final: scancel, or the end of a grace period. The job is not requeued.
trap 'signalled=yes cancelled=yes' TERM
while :; do
    code=0
    wait "$ranks" || code=$?
    [ -n "$signalled" ] || break # the ranks have ended; a signal also interrupts the wait
    signalled=''
done

cat "$result"
if [ ! -s "$result" ] && { [ "$code" = 0 ] || [ -n "$leaving" ]; }; then
    # The ranks were still starting, or Slurm has ended mpirun's daemons, after which Open MPI's mpirun returns 0. The
    # last checkpoint, if any, still exists.
    say "the ranks were stopped before they could save a checkpoint"
    code=75
fi
rm -f "$result"
[ "$code" != 75 ] || [ -n "$cancelled" ] || ! in_job || queue_again
exit "$code"
