# shellcheck shell=bash
# An Apptainer image with everything except MPI's launcher: one file instead of 40,000, which reduces the load of a
# shared file system when many ranks start. srun or the host's mpirun starts `apptainer exec` once per rank.
#   apptainer build dlion.sif env/dlion.def
# The MPI in the image must be compatible with the launcher: Open MPI 5 in the image, and srun --mpi=pmix or the
# mpirun of an Open MPI 5 outside.

runtime=$(command -v apptainer || command -v singularity || true)
if [ -z "$runtime" ]; then
    echo "jobs: no apptainer on PATH: load its module, or choose another DLION_MACHINE in jobs/site.sh" >&2
    exit 2
fi
if [ ! -f "${DLION_IMAGE:-}" ]; then
    echo "jobs: DLION_IMAGE=${DLION_IMAGE:-} does not exist: build it with 'apptainer build dlion.sif env/dlion.def'," \
        "and set DLION_IMAGE in jobs/site.sh" >&2
    exit 2
fi
in_image=("$runtime" exec --bind "$PWD" --pwd "$PWD")
# --nv makes the host's NVIDIA driver available in the image.
[ ! -e /dev/nvidiactl ] || in_image+=(--nv)
in_image+=("$DLION_IMAGE")
