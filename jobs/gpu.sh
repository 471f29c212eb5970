#!/usr/bin/env bash
# Train on GPUs: one rank per GPU.
#
#   sbatch --partition=gpu jobs/gpu.sh [OPTIONS OF dlion train]      in the checkout, after: source jobs/site.sh
#
# Needs TensorFlow for GPUs: DLION_MACHINE=gpu or container in jobs/site.sh.
#
#SBATCH --job-name=dlion-gpu
#SBATCH --output=%x-%j.log
# Four nodes with two ranks each and a GPU per rank. If a rank sees all GPUs of its node, it uses the one with the
# number of its local rank.
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=2
#SBATCH --gpus-per-task=1
# Processors per GPU, for reading data, selecting and encoding gradients, and the MPI thread.
#SBATCH --cpus-per-task=2
#SBATCH --time=01:00:00

cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}" || exit # Slurm runs a copy of this script
source jobs/prologue.sh

# Keep the cache of compiled GPU kernels on the node. Ranks would compete for a cache in a shared home directory.
export CUDA_CACHE_PATH=${TMPDIR:-/tmp}/cuda-cache
"${launch[@]}" dlion train --data fashion-mnist --seconds 600 --out "runs/gpu-$run_id" "$@"
