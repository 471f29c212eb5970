#!/usr/bin/env bash
# The login node of the cluster that env/slurm/up.sh has made: a shell there, or one command.
#
#   bash env/slurm/login.sh                          a shell; sbatch, srun, squeue, scancel, sinfo as on a cluster
#   bash env/slurm/login.sh sbatch jobs/cpu.sh       one command, with its exit code

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=env/setup.sh
command -v dlion >/dev/null || source "$here/../setup.sh"
exec python "$here/cluster.py" login "$@"
