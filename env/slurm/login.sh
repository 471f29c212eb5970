#!/usr/bin/env bash
# Log in to the login node of the cluster of env/slurm/up.sh: a shell, or one command.
#
#   bash env/slurm/login.sh                          a shell; sbatch, srun, squeue, scancel, sinfo as on a cluster
#   bash env/slurm/login.sh sbatch jobs/cpu.sh       one command, with its exit code

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=env/setup.sh
command -v dlion >/dev/null || source "$here/../setup.sh"
exec python "$here/cluster.py" login "$@"
