# shellcheck shell=bash
# The environment that is active when the job is submitted, for example a venv or conda; sbatch and srun pass it on.

# shellcheck disable=SC2034 # used by the prologue
in_image=()
if ! command -v dlion >/dev/null; then
    echo "jobs: no dlion on PATH: activate an environment that has it before you call sbatch, or choose another" \
        "DLION_MACHINE in jobs/site.sh" >&2
    exit 2
fi
