# shellcheck shell=bash
# This checkout's .venv, with an MPI of its own from PyPI: a laptop, a server, or a cluster without a fast network.
# Make it before the first job, where there is a network: bash env/setup.sh

# shellcheck disable=SC2034 # for the prologue
in_image=()
# shellcheck source=env/setup.sh
source env/setup.sh
