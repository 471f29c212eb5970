#!/usr/bin/env bash
# Train on GPUs: one rank per GPU.
#
#   sbatch --partition=gpu jobs/gpu.sh [OPTIONS OF dlion train]      from the checkout; first: source jobs/site.sh
#
# Needs TensorFlow for GPUs: DLION_MACHINE=gpu or container in jobs/site.sh.
#
#SBATCH --job-name=dlion-gpu
#SBATCH --output=%x-%j.log
# Four nodes, two ranks on each and a GPU for each of them. A rank sees its own GPU, or those of its node, of which it
# then takes the one of its local rank.
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=2
#SBATCH --gpus-per-task=1
# Processors that feed a GPU: reading data, selecting and encoding gradients, MPI's thread.
#SBATCH --cpus-per-task=2
#SBATCH --time=01:00:00

cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}" || exit # Slurm runs a copy of this script from elsewhere
source jobs/prologue.sh

# Kernels compiled for the GPU are kept on the node: in a home directory shared by all ranks they would be fought for.
export CUDA_CACHE_PATH=${TMPDIR:-/tmp}/cuda-cache
"${launch[@]}" dlion train --data fashion-mnist --seconds 600 --out "runs/gpu-$run_id" "$@"
