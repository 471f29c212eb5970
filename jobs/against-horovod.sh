#!/usr/bin/env bash
# Compare Horovod and DLion on the same nodes: a job array with one run per environment, strategy and seed, and a
# second job that writes the report.
#
#   bash jobs/against-horovod.sh [OPTIONS OF dlion train]      submits both jobs; without Slurm everything runs here
#   bash jobs/against-horovod.sh --target 'accuracy>=0.8' --seconds 600
#
# DLION_STRATEGIES="horovod dlion"   strategies to compare
# DLION_ENVIRONMENTS="none"          none: the nodes as they are. A micro-cloud, for example hetero-sys-a: rank k is slowed
#                                    down to worker k of it. It must have as many workers as ranks. Links are unchanged
# DLION_SEEDS="0 1 2"
# DLION_AT_ONCE=1                    runs at a time; runs that share links disturb each other's measurements
# DLION_SBATCH="--nodes=8"           additional options of sbatch
# DLION_FOLDER=runs/mine             a new folder for the results
# Build Horovod once with env/horovod/build.sh. The strategy allreduce is an alternative that needs no build.
#
#SBATCH --job-name=dlion-against-horovod
#SBATCH --output=%x-%A-%a.log
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
# No other jobs on the nodes, because they would distort the times.
#SBATCH --exclusive
#SBATCH --time=00:30:00

cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}" || exit # Slurm runs a copy of this script
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
