# shellcheck shell=bash
# The environment that is active where the job is submitted: sbatch and srun hand it on. Your own venv, conda's, or
# what the cluster's support has made for you.

# shellcheck disable=SC2034 # for the prologue
in_image=()
if ! command -v dlion >/dev/null; then
    echo "jobs: there is no dlion on PATH: activate the environment that has it before sbatch, or choose another" \
        "DLION_MACHINE in jobs/site.sh" >&2
    exit 2
fi
