# shellcheck shell=bash
# This checkout's .venv with MPI from PyPI, for a laptop, a server, or a cluster without a fast network. Create it
# before the first job, on a node with Internet access: bash env/setup.sh

# shellcheck disable=SC2034 # used by the prologue
in_image=()
# shellcheck source=env/setup.sh
source env/setup.sh
