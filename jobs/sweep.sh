#!/usr/bin/env bash
# Compare settings: a job array with one run per line of a file, and a second job that writes the report.
#
#   bash jobs/sweep.sh jobs/sweep.txt [OPTIONS OF dlion train]   submits both jobs; without Slurm everything runs here
#
# DLION_AT_ONCE=4, DLION_SBATCH="--nodes=8", DLION_FOLDER=runs/mine: as in jobs/against-horovod.sh
#
#SBATCH --job-name=dlion-sweep
#SBATCH --output=%x-%A-%a.log
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --time=00:30:00

cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}" || exit # Slurm runs a copy of this script
source jobs/prologue.sh
export DLION_FOLDER=${DLION_FOLDER:-runs/sweep-$run_id}

file=${1:?give a file with one run per line, such as jobs/sweep.txt}
shift
mapfile -t lines < <(grep -vE '^[[:space:]]*(#|$)' "$file")
mapfile -t runs < <(printf 'line-%02d\n' $(seq 1 ${#lines[@]}))

if ! in_job && command -v sbatch >/dev/null; then
    mkdir -p "$DLION_FOLDER"
    # The tasks read a copy, because the file may be edited while they wait.
    cp "$file" "$DLION_FOLDER/sweep.txt"
    submit_runs jobs/sweep.sh "${runs[@]}" -- "$DLION_FOLDER/sweep.txt" "$@"
    exit
fi

stop=(--seconds 120)
case " $* ${lines[*]} " in *" --steps"[\ =]* | *" --seconds"[\ =]*) stop=() ;; esac
numbers=("${!lines[@]}")
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || numbers=("$SLURM_ARRAY_TASK_ID")
for number in "${numbers[@]}"; do
    read -ra options <<<"${lines[$number]}"
    # Later options override earlier ones, so the options of the line override those for all runs.
    one_run "${runs[$number]}" dlion train "${stop[@]}" "$@" "${options[@]}"
done
in_job || source jobs/report.sh "$DLION_FOLDER" "${runs[@]}"
