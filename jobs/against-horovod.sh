#!/usr/bin/env bash
# Train with Horovod and with DLion on the same nodes, and compare: a job array with a run for every environment,
# strategy and seed, and a job after it that makes the report.
#
#   bash jobs/against-horovod.sh [OPTIONS OF dlion train]      submits both jobs; without Slurm all of it runs here
#   bash jobs/against-horovod.sh --target-accuracy 0.8 --seconds 600
#
# DLION_STRATEGIES="horovod dlion"   which are compared
# DLION_ENVIRONMENTS="none"          none: the nodes as they are. hetero-sys-a or another: the rank of each number is
#                                    slowed down to the worker of that number in that micro-cloud, of which there must
#                                    be as many; links stay what they are
# DLION_SEEDS="0 1 2"
# DLION_AT_ONCE=1                    runs at a time: runs that share links measure each other
# DLION_SBATCH="--nodes=8"           more options of sbatch
# DLION_FOLDER=runs/mine             where to; new
# Horovod itself: bash env/horovod/build.sh, once. The strategy allreduce, in its place, needs nothing.
#
#SBATCH --job-name=dlion-against-horovod
#SBATCH --output=%x-%A-%a.log
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
# Nobody else on the nodes, or the times mean nothing.
#SBATCH --exclusive
#SBATCH --time=00:30:00

cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}" || exit # Slurm runs a copy of this script from elsewhere
source jobs/prologue.sh
export DLION_FOLDER=${DLION_FOLDER:-runs/against-horovod-$run_id}

runs=()
for environment in ${DLION_ENVIRONMENTS:-none}; do
    for seed in ${DLION_SEEDS:-0 1 2}; do
        for strategy in ${DLION_STRATEGIES:-horovod dlion}; do
            runs+=("$environment.$strategy.$seed")
        done
    done
done

if ! in_job && command -v sbatch >/dev/null; then
    submit_runs jobs/against-horovod.sh "${runs[@]}" -- "$@"
    exit
fi

stop=(--seconds 120)
case " $* " in *" --steps"[\ =]* | *" --seconds"[\ =]*) stop=() ;; esac
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || runs=("${runs[$SLURM_ARRAY_TASK_ID]}")
for run in "${runs[@]}"; do
    IFS=. read -r environment strategy seed <<<"$run"
    pace=()
    [ "$environment" = none ] || pace=(env "DLION_ENVIRONMENT=$environment")
    one_run "$run" "${pace[@]}" dlion train --strategy "$strategy" --seed "$seed" "${stop[@]}" "$@"
done
in_job || source jobs/report.sh "$DLION_FOLDER" "${runs[@]}"
