# shellcheck shell=bash
# An Apptainer image with everything but MPI's launcher: one file instead of 40,000, which spares a shared file system
# when many ranks start. srun or the host's mpirun starts `apptainer exec` once per rank.
#   apptainer build dlion.sif env/dlion.def
# The MPI inside must understand the one that launches: Open MPI 5 in the image, and outside srun --mpi=pmix or an
# Open MPI 5.

runtime=$(command -v apptainer || command -v singularity || true)
if [ -z "$runtime" ]; then
    echo "jobs: there is no apptainer: load its module, or choose another DLION_MACHINE in jobs/site.sh" >&2
    exit 2
fi
if [ ! -f "${DLION_IMAGE:-}" ]; then
    echo "jobs: DLION_IMAGE=${DLION_IMAGE:-} is no file: apptainer build dlion.sif env/dlion.def, and name it in jobs/site.sh" >&2
    exit 2
fi
in_image=("$runtime" exec --bind "$PWD" --pwd "$PWD")
# --nv brings the driver of NVIDIA's GPUs into the image.
[ ! -e /dev/nvidiactl ] || in_image+=(--nv)
in_image+=("$DLION_IMAGE")
