#!/usr/bin/env bash
# Train the Cipher CNN with DLion on this machine: four ranks, about two minutes on two cores.
#
#   bash env/demo.sh [OPTIONS OF dlion train]      for example: bash env/demo.sh --steps 50
#
# DLION_RANKS=4    how many ranks; for DLION_MPI, DLION_TF and DLION_PYTHON see env/setup.sh

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=env/setup.sh
source env/setup.sh

# Print the name of the data to train on, and say why that.
choose_data() {
    local from="Debian's package"
    if [ -d /usr/share/datasets/fashion-mnist ]; then
        dlion_say "data: fashion-mnist, from $from"
    elif dlion_apt_install dataset-fashion-mnist; then
        dlion_say "data: fashion-mnist, from $from, installed just now"
    elif keras_has_fashion_mnist; then
        dlion_say "data: fashion-mnist, from Keras, since $from is not there"
    else
        dlion_say "data: digits, from scikit-learn, since Debian's package dataset-fashion-mnist is not there" \
            "and Keras cannot download it"
        echo digits
        return
    fi
    echo fashion-mnist
}

keras_has_fashion_mnist() {
    dlion_say "asking Keras for fashion-mnist (30 MB)"
    # Interrupted, not terminated, when it takes too long: else Keras would take half a file for a whole one next time.
    timeout --signal=INT --kill-after=10 300 \
        python -c 'import keras; keras.datasets.fashion_mnist.load_data()' >/dev/null 2>&1 </dev/null
}

data=() stop=(--seconds 100)
case " $* " in *" --data"[\ =]*) ;; *) data=(--data "$(choose_data)") ;; esac
case " $* " in *" --steps"[\ =]* | *" --seconds"[\ =]*) stop=() ;; esac

dlion_mpirun "${DLION_RANKS:-4}" dlion train --strategy dlion --model cipher "${data[@]}" "${stop[@]}" \
    --evaluate-every 10s --out "runs/demo-$(date -u +%Y%m%dT%H%M%SZ)" "$@"
