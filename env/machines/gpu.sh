# shellcheck shell=bash
# A GPU cluster: as modules, with TensorFlow for GPUs. Its wheels bring CUDA's libraries, so no CUDA module is needed,
# but the driver is. Make it on a node with a GPU, or as below, which does not look for one:
#   module load python/3.11 openmpi/5.0 && DLION_MPI=system DLION_TF=gpu bash env/setup.sh

export DLION_TF=gpu
# shellcheck source=env/machines/modules.sh
source env/machines/modules.sh
