# shellcheck shell=bash
# Settings of your cluster: the only file to edit. All scripts in jobs/ read it. Source it yourself before you call
# sbatch. Variables that your shell has set already keep their values. Options of sbatch override everything, for
# example: sbatch --partition=gpu --account=other jobs/gpu.sh

# Account and partition, read by sbatch. Set those that your cluster requires.
# export SBATCH_ACCOUNT=myproject
# export SBATCH_PARTITION=compute
# export SBATCH_QOS=normal

# The source of Python, MPI and TensorFlow: a file of env/machines, without .sh.
#   checkout   this checkout's .venv with MPI from PyPI, created by env/setup.sh
#   modules    Python and MPI from the cluster's modules, other packages in .venv-system
#   gpu        like modules, with TensorFlow for GPUs
#   container  an Apptainer image built from env/dlion.def
#   active     the environment that is active when you call sbatch, for example conda's
: "${DLION_MACHINE:=checkout}"
# : "${DLION_MODULES:=python/3.11 openmpi/5.0}"        # for modules and gpu
# : "${DLION_IMAGE:=$HOME/dlion.sif}"                  # for container

# Launcher inside a job: srun (Slurm starts and tracks every rank), mpirun, or auto (srun if it supports our MPI).
: "${DLION_LAUNCH:=auto}"

# The two components of jobs/hetero.sh, as options of sbatch.
: "${DLION_HET_A:=--partition=fast --nodes=2 --ntasks-per-node=1 --cpus-per-task=4}"
: "${DLION_HET_B:=--partition=slow --nodes=2 --ntasks-per-node=1 --cpus-per-task=2}"

# Without Slurm: number of ranks, and a file with one line per host, such as "node7 slots=2" (empty: this machine).
: "${DLION_RANKS:=4}"
: "${DLION_HOSTFILE:=}"
