# shellcheck shell=bash
# The one file to edit: what is different on your cluster. All scripts in jobs/ read it; before an sbatch by hand, source
# it yourself. What is set in your shell already stays. On the command line of sbatch everything can be said otherwise,
# for example: sbatch --partition=gpu --account=other jobs/gpu.sh

# Who pays, and where jobs go. Leave out what your cluster does not ask for: sbatch reads these.
# export SBATCH_ACCOUNT=myproject
# export SBATCH_PARTITION=compute
# export SBATCH_QOS=normal

# Where Python, MPI and TensorFlow come from: a file of env/machines without its .sh.
#   checkout   this checkout's .venv with its own MPI, made by env/setup.sh
#   modules    Python and MPI of the cluster's modules, the rest in .venv-system
#   gpu        as modules, with TensorFlow for GPUs
#   container  an Apptainer image, made from env/dlion.def
#   active     the environment that is active where you say sbatch: your own, conda's
: "${DLION_MACHINE:=checkout}"
# : "${DLION_MODULES:=python/3.11 openmpi/5.0}"        # for modules and gpu
# : "${DLION_IMAGE:=$HOME/dlion.sif}"                  # for container

# How ranks are started inside a job: srun (Slurm does it, and sees every rank), mpirun, or auto: srun where it can.
: "${DLION_LAUNCH:=auto}"

# The two components of jobs/hetero.sh: options of sbatch. All else is as for one kind of nodes.
: "${DLION_HET_A:=--partition=fast --nodes=2 --ntasks-per-node=1 --cpus-per-task=4}"
: "${DLION_HET_B:=--partition=slow --nodes=2 --ntasks-per-node=1 --cpus-per-task=2}"

# Without Slurm: how many ranks, and a file with a line per host, such as "node7 slots=2" (empty: this machine).
: "${DLION_RANKS:=4}"
: "${DLION_HOSTFILE:=}"
