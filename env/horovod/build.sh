#!/usr/bin/env bash
# Build Horovod for this checkout's TensorFlow and MPI, and install it for --strategy horovod. Takes about two minutes
# on two cores. A second run has nothing to do and returns immediately.
#
#   bash env/horovod/build.sh
#
# Horovod's last release does not build with a current TensorFlow. It needs the patch in this folder, two folders of
# headers, and a selection of components (build, below). For DLION_MPI, DLION_TF and DLION_PYTHON see env/setup.sh.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=env/setup.sh
source env/setup.sh

VERSION=0.28.1
SHA256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
here=$PWD/env/horovod
stamp=$DLION_VENV/dlion-horovod-stamp
full_log=$DLION_VENV/horovod-build.log
work=$(mktemp -d)
log=$work/log
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

say() {
    printf 'horovod: %s\n' "$*" >&2
}

fail() {
    [ ! -s "$log" ] || tail -n 5 "$log" >&2
    say "$@"
    exit 1
}

quiet_pip() {
    pip "$1" --disable-pip-version-check --no-input "${@:2}" >"$log" 2>&1 </dev/null
}

# Print the inputs of a build: the MPI that mpi4py loads, Python, TensorFlow, and this folder.
build_key() {
    python - <<'PYTHON'
import sys
from importlib import metadata
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(sys.version, MPI.Get_library_version())
print(sorted((d.name, d.version) for d in metadata.distributions() if d.name.startswith("tensorflow")))
PYTHON
    cat "$here"/*
}

installed() {
    [ -n "$(find "$DLION_VENV"/lib/python*/site-packages/horovod/tensorflow -name 'mpi_lib*.so' 2>/dev/null)" ]
}

need_tools() {
    local tool missing=()
    for tool in g++ make cmake patch; do
        command -v "$tool" >/dev/null || missing+=("$tool")
    done
    [ ${#missing[@]} -eq 0 ] || dlion_apt_install "${missing[@]}" ||
        fail "missing ${missing[*]}: run 'apt-get install ${missing[*]}' as root, or load your cluster's modules"
    command -v mpicxx >/dev/null ||
        fail "no mpicxx on PATH: install your MPI's development files, or unset DLION_MPI"
    python -c 'import packaging, setuptools, wheel' 2>/dev/null || quiet_pip install packaging setuptools wheel ||
        fail "pip could not install packaging, setuptools and wheel: see above; check the network and the proxy"
}

fetch() {
    echo "horovod==$VERSION --hash=sha256:$SHA256" >"$work/requirements.txt"
    quiet_pip download --no-deps --no-binary :all: --no-build-isolation --dest "$work" \
        --require-hashes --requirement "$work/requirements.txt" ||
        fail "pip could not get horovod $VERSION from PyPI: see above; check the network, the proxy and the disk"
    {
        tar -xzf "$work/horovod-$VERSION.tar.gz" -C "$work" &&
            patch --directory="$work/horovod-$VERSION" --strip=1 <"$here/xla.patch" &&
            sed --in-place "s/'RelWithDebInfo'/'Release'/" "$work/horovod-$VERSION/setup.py" # a third less to compile
    } >"$log" 2>&1 || fail "the source of horovod $VERSION could not be unpacked and patched: see above"
}

# The first mpicxx on PATH belongs to the environment's MPI; Horovod would not load with another one. TensorFlow's
# headers include two files of its wheel that are in folders which the compiler does not search.
build() {
    local headers
    headers=$(python -c 'from importlib import util
print(util.find_spec("tensorflow").submodule_search_locations[0])')/include/external
    CPLUS_INCLUDE_PATH=$headers/farmhash_archive/src:$headers/highwayhash${CPLUS_INCLUDE_PATH:+:$CPLUS_INCLUDE_PATH} \
        HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1 \
        HOROVOD_WITH_MPI=1 HOROVOD_WITHOUT_GLOO=1 HOROVOD_CPU_OPERATIONS=MPI \
        TF_CPP_MIN_LOG_LEVEL=3 MAKEFLAGS=-j$(nproc) \
        quiet_pip install --verbose --no-build-isolation "$work/horovod-$VERSION" && return
    cp "$log" "$full_log"
    grep -E 'error:|CMake Error|No space left' "$full_log" | head -n 5 >"$log" || true
    fail "the build failed: see above, and the full log in $full_log"
}

# Two ranks add 1 and 2, with MPI started by mpi4py as in a run.
check() {
    TF_CPP_MIN_LOG_LEVEL=3 timeout --foreground --kill-after=10 120 dlion launch -n 2 -- python -c '
from mpi4py import MPI
import horovod.tensorflow as hvd
import tensorflow as tf
hvd.init(comm=MPI.COMM_WORLD)
total = float(hvd.allreduce(tf.constant(hvd.rank() + 1.0), op=hvd.Sum))
assert (hvd.size(), total) == (2, 3.0), (hvd.size(), total)' >"$log" 2>&1 </dev/null ||
        fail "Horovod was built, but a sum over two ranks fails: see above"
}

key=$(build_key | sha256sum)
if installed && [[ -f $stamp && "$(<"$stamp")" = "$key" ]]; then
    say "Horovod $VERSION is already installed in ${DLION_VENV##*/}"
    exit 0
fi
start=$SECONDS
rm -f "$stamp"
need_tools
say "downloading Horovod $VERSION"
fetch
say "building it for $(python -c 'from importlib import metadata
print(*(f"{d.name} {d.version}" for d in metadata.distributions() if d.name.startswith("tensorflow")))'): about two minutes"
build
check
echo "$key" >"$stamp"
say "installed Horovod $VERSION in ${DLION_VENV##*/} in $((SECONDS - start)) s; try: dlion launch -n 2 train --strategy horovod"
