#!/usr/bin/env bash
# Take down what env/slurm/up.sh has made, or what one that was killed has left: daemons, jobs, namespaces, files.
#
#   bash env/slurm/down.sh [--name NAME]

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=env/setup.sh
command -v dlion >/dev/null || source "$here/../setup.sh"
exec python "$here/cluster.py" down "$@"
