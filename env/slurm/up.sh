#!/usr/bin/env bash
# A real Slurm cluster on this machine, to test job scripts and to try them out: one slurmd per node of an emulated
# micro-cloud, with its shaped links between them. Needs root, and Debian or Ubuntu for the packages.
#
#   bash env/slurm/up.sh [--env NAME|FILE.toml] [--name NAME]      defaults: hetero-sys-a, slurm
#   bash env/slurm/login.sh [--name NAME] [COMMAND...]             a shell, or one command, on the login node
#   bash env/slurm/down.sh [--name NAME]                           all of it away again, also after a crash
#
# All of it lives in network namespaces and in one temporary folder: the host's network, its /etc/slurm and a munge or
# Slurm of its own are not touched. The Debian packages stay installed.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=env/setup.sh
command -v dlion >/dev/null || source "$here/../setup.sh"
exec python "$here/cluster.py" up "$@"
