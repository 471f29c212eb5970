#!/usr/bin/env bash
# Train on the processors of several nodes, with one rank per node.
#
#   sbatch jobs/cpu.sh [OPTIONS OF dlion train]                 in the checkout, after: source jobs/site.sh
#   sbatch --nodes=8 --time=04:00:00 jobs/cpu.sh --seconds 12000
#   bash jobs/cpu.sh --steps 200                                without Slurm, with mpirun
#
#SBATCH --job-name=dlion-cpu
#SBATCH --output=%x-%j.log
# One rank per node. TensorFlow uses all processors of the node.
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --time=01:00:00

cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}" || exit # Slurm runs a copy of this script
source jobs/prologue.sh

# Later options override earlier ones, so yours override these.
"${launch[@]}" dlion train --data fashion-mnist --seconds 600 --out "runs/cpu-$run_id" "$@"
