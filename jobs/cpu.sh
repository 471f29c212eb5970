#!/usr/bin/env bash
# Train on the processors of several nodes: one rank per node, each as fast as its node and its links are.
#
#   sbatch jobs/cpu.sh [OPTIONS OF dlion train]                 from the checkout; first: source jobs/site.sh
#   sbatch --nodes=8 --time=04:00:00 jobs/cpu.sh --seconds 12000
#   bash jobs/cpu.sh --steps 200                                without Slurm, by mpirun
#
#SBATCH --job-name=dlion-cpu
#SBATCH --output=%x-%j.log
# One rank per node, which takes all of the node's processors: TensorFlow spreads over them by itself.
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --time=01:00:00

cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}" || exit # Slurm runs a copy of this script from elsewhere
source jobs/prologue.sh

# Options given later count, so yours replace these.
"${launch[@]}" dlion train --data fashion-mnist --seconds 600 --out "runs/cpu-$run_id" "$@"
