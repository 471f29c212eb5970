#!/usr/bin/env bash
# Start a real Slurm cluster on this machine to try job scripts: one slurmd per worker of an emulated micro-cloud,
# joined by its shaped links. Needs root, and Debian or Ubuntu for the packages.
#
#   bash env/slurm/up.sh [--env NAME|FILE.toml] [--name NAME]      defaults: hetero-sys-a, slurm
#   bash env/slurm/login.sh [--name NAME] [COMMAND...]             a shell, or one command, on the login node
#   bash env/slurm/down.sh [--name NAME]                           removes everything, also after a crash
#
# The cluster uses network namespaces and one temporary folder. It does not touch the host's network, its /etc/slurm,
# or its munge and Slurm daemons. The Debian packages stay installed.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=env/setup.sh
command -v dlion >/dev/null || source "$here/../setup.sh"
exec python "$here/cluster.py" up "$@"
