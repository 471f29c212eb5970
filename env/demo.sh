#!/usr/bin/env bash
# Train the Cipher CNN with DLion on this machine: four ranks, about two minutes on two cores.
#
#   bash env/demo.sh [OPTIONS OF dlion train]      for example: bash env/demo.sh --steps 50
#
# DLION_RANKS=4    number of ranks; for DLION_MPI, DLION_TF and DLION_PYTHON see env/setup.sh

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=env/setup.sh
source env/setup.sh

# Print the name of the data set to train on, and its source on stderr.
choose_data() {
    local from="Debian's package"
    if [ -d /usr/share/datasets/fashion-mnist ]; then
        dlion_say "data: fashion-mnist, from $from"
    elif dlion_apt_install dataset-fashion-mnist; then
        dlion_say "data: fashion-mnist, from $from (now installed)"
    elif keras_has_fashion_mnist; then
        dlion_say "data: fashion-mnist, from Keras ($from is not installed)"
    else
        dlion_say "data: digits, from scikit-learn (Debian's package dataset-fashion-mnist is not installed," \
            "and Keras cannot download the data)"
        echo digits
        return
    fi
    echo fashion-mnist
}

keras_has_fashion_mnist() {
    dlion_say "downloading fashion-mnist with Keras (30 MB)"
    # SIGINT instead of SIGTERM on a timeout, so that Keras removes an incomplete file.
    timeout --signal=INT --kill-after=10 300 \
        python -c 'import keras; keras.datasets.fashion_mnist.load_data()' >/dev/null 2>&1 </dev/null
}

data=() stop=(--seconds 100)
case " $* " in *" --data"[\ =]*) ;; *) data=(--data "$(choose_data)") ;; esac
case " $* " in *" --steps"[\ =]* | *" --seconds"[\ =]*) stop=() ;; esac

dlion launch -n "${DLION_RANKS:-4}" train --strategy dlion --model cipher "${data[@]}" "${stop[@]}" \
    --evaluate-every 10s --out "runs/demo-$(date -u +%Y%m%dT%H%M%SZ)" "$@"
