#!/usr/bin/env bash
# Remove the cluster of env/slurm/up.sh, or the rest of a killed one: daemons, jobs, namespaces and files.
#
#   bash env/slurm/down.sh [--name NAME]

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=env/setup.sh
command -v dlion >/dev/null || source "$here/../setup.sh"
exec python "$here/cluster.py" down "$@"
