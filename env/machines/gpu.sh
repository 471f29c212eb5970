# shellcheck shell=bash
# A GPU cluster: like modules, with TensorFlow for GPUs. Its wheels contain the CUDA libraries, so only the driver is
# needed and no CUDA module. Create it on any node with:
#   module load python/3.11 openmpi/5.0 && DLION_MPI=system DLION_TF=gpu bash env/setup.sh

export DLION_TF=gpu
# shellcheck source=env/machines/modules.sh
source env/machines/modules.sh
