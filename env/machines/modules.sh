# shellcheck shell=bash
# A cluster's own Python and MPI, from its modules (Lmod or Environment Modules), the rest in .venv-system. MPI is then
# the one that knows the cluster's network. Make it before the first job, on the login node, where there is a network:
#   module load python/3.11 openmpi/5.0 && DLION_MPI=system bash env/setup.sh

# shellcheck disable=SC2034 # for the prologue
in_image=()
if ! type module >/dev/null 2>&1; then
    # A batch job's shell is no login shell, and may not have heard of modules.
    for init in /etc/profile.d/lmod.sh /etc/profile.d/modules.sh /usr/share/modules/init/bash /usr/share/lmod/lmod/init/bash; do
        if [ -f "$init" ]; then
            set +u # these are not made for it
            # shellcheck disable=SC1090
            source "$init"
            set -u
            break
        fi
    done
fi
if [ -n "${DLION_MODULES:-}" ]; then
    set +u
    # Word for word: several modules in one variable. What the login shell had loaded does not count.
    # shellcheck disable=SC2086
    module purge && module load $DLION_MODULES
    set -u
fi
export DLION_MPI=system
# shellcheck source=env/setup.sh
source env/setup.sh
