#!/usr/bin/env bash
# Train in a partition whose jobs may be preempted, or for longer than the time limit: the run saves itself when it is
# told to go, is queued again, and goes on where it was. As often as it takes.
#
#   sbatch --partition=spot jobs/preemptible.sh [OPTIONS OF dlion train]      from the checkout
#
# How: Slurm sends SIGUSR1 to this script; it passes it on to the ranks, which write a checkpoint together and end with
# exit code 75; this script then has the job queued again, under the same number, and so with the same --out.
#
#SBATCH --job-name=dlion-preemptible
#SBATCH --output=%x-%j.log
# The next turn's output goes below this one's.
#SBATCH --open-mode=append
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --time=01:00:00
# Slurm may queue it again; and 60 s before the time is up, this script (B: the batch shell) hears of it. Preempted, it
# hears of it at once where the cluster has PreemptParameters=send_user_signal, and as long before the end as the
# partition's GraceTime says. Give a model that takes longer to write more than 60 s.
#SBATCH --requeue
#SBATCH --signal=B:USR1@60

cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}" || exit # Slurm runs a copy of this script from elsewhere
told='' # to go, by SIGUSR1, which may come while this script is still preparing
trap 'told=yes' USR1
source jobs/prologue.sh

# --requeue: start in --out, or go on from the checkpoint there. Every minute, since a node may also fail unannounced.
options=(--checkpoint-every 60s --keep-checkpoints 2 --out "runs/preemptible-$run_id" --requeue)

queue_again() {
    say "turn $((${SLURM_RESTART_COUNT:-0} + 1)) is over, queued again as job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
    exit 75
}
[ -z "$told" ] || queue_again

# In the background, for bash hears signals between commands only. It is srun or mpirun itself that runs there, and
# both pass SIGUSR1 on to every rank. On stdout there is but the result.
result=${TMPDIR:-/tmp}/dlion-result-${SLURM_JOB_ID:-$$}
"${launch[@]}" dlion train --data fashion-mnist --seconds 3000 "${options[@]}" "$@" >"$result" &
ranks=$!
heard='' cancelled=''
trap 'heard=yes told=yes; say "told to go: the ranks save themselves"; kill -USR1 "$ranks" || true' USR1
# SIGTERM is no announcement but the end, by scancel or when a grace is over: then it is not for us to queue again.
trap 'heard=yes cancelled=yes' TERM
while :; do
    code=0
    wait "$ranks" || code=$?
    [ -n "$heard" ] || break # it was the ranks that ended, and no signal that ended the waiting
    heard=''
done

cat "$result"
if [ ! -s "$result" ] && { [ "$code" = 0 ] || [ -n "$told" ]; }; then
    # They were still starting; or Slurm has ended mpirun's daemons, of which Open MPI's says 0. The last checkpoint, if
    # there is one, is still there.
    say "the ranks were ended before they could save themselves"
    code=75
fi
rm -f "$result"
[ "$code" != 75 ] || [ -n "$cancelled" ] || ! in_job || queue_again
exit "$code"
