#!/usr/bin/env bash
# Write a report of the runs in a folder. jobs/against-horovod.sh and jobs/sweep.sh submit it to run after their runs.
#
#   sbatch jobs/report.sh FOLDER [RUN...]      RUN: a run that must have a result in the folder, or the job fails
#
#SBATCH --job-name=dlion-report
#SBATCH --output=%x-%j.log
#SBATCH --ntasks=1
#SBATCH --time=00:15:00

cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}" || exit # Slurm runs a copy of this script
source jobs/prologue.sh

folder=$1
shift
# The report includes the metrics of failed runs.
"${in_image[@]}" dlion report "$folder"/*/ -o "$folder/report.html"
missing=()
for run in "$@"; do
    [ -s "$folder/$run.json" ] || missing+=("$run")
done
if [ ${#missing[@]} -gt 0 ]; then
    say "without a result: ${missing[*]}"
    exit 1
fi
