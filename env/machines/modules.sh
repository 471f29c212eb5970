# shellcheck shell=bash
# Python and MPI from the cluster's modules (Lmod or Environment Modules), other packages in .venv-system. The
# cluster's MPI supports its network. Create it before the first job, on the login node, which has Internet access:
#   module load python/3.11 openmpi/5.0 && DLION_MPI=system bash env/setup.sh

# shellcheck disable=SC2034 # used by the prologue
in_image=()
if ! type module >/dev/null 2>&1; then
    # The shell of a batch job is not a login shell and may lack the module command.
    for init in /etc/profile.d/lmod.sh /etc/profile.d/modules.sh /usr/share/modules/init/bash /usr/share/lmod/lmod/init/bash; do
        if [ -f "$init" ]; then
            set +u # these files use unset variables
            # shellcheck disable=SC1090
            source "$init"
            set -u
            break
        fi
    done
fi
if [ -n "${DLION_MODULES:-}" ]; then
    set +u
    # Unquoted, because the variable can name several modules. Modules of the login shell are unloaded first.
    # shellcheck disable=SC2086
    module purge && module load $DLION_MODULES
    set -u
fi
export DLION_MPI=system
# shellcheck source=env/setup.sh
source env/setup.sh
