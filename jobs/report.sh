#!/usr/bin/env bash
# One page about the runs in a folder; jobs/against-horovod.sh and jobs/sweep.sh submit it to run after theirs.
#
#   sbatch jobs/report.sh FOLDER [RUN...]      RUN: what should have a result in the folder; the job fails without
#
#SBATCH --job-name=dlion-report
#SBATCH --output=%x-%j.log
#SBATCH --ntasks=1
#SBATCH --time=00:15:00

cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}" || exit # Slurm runs a copy of this script from elsewhere
source jobs/prologue.sh

folder=$1
shift
# Runs that failed are on the page too, as far as they came.
"${in_image[@]}" dlion report "$folder"/*/ -o "$folder/report.html"
missing=()
for run in "$@"; do
    [ -s "$folder/$run.json" ] || missing+=("$run")
done
if [ ${#missing[@]} -gt 0 ]; then
    say "without a result: ${missing[*]}"
    exit 1
fi
