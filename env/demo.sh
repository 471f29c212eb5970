#!/usr/bin/env bash
# Train a model with DLion on this machine: four ranks, about two minutes on two cores.
#
#   bash env/demo.sh [--workload WORKLOAD] [OPTIONS OF dlion train]      for example: bash env/demo.sh --steps 50
#
# WORKLOAD     model                      data
# images       the Cipher CNN (default)   Fashion-MNIST
# images-deep  ResNet-20                  Fashion-MNIST
# text         byte-level transformer     the King James Bible
# tables       dense layers, regression   flights out of New York: hours of delay
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

# Print the name of the data set of a workload other than images, once it is installed.
install_data() {
    bash env/workloads.sh "$1" >&2
    echo "$1"
}

workload=images options=()
while [ $# -gt 0 ]; do
    case "$1" in
        --workload)
            workload=${2:-}
            [ $# -eq 1 ] || shift
            ;;
        --workload=*) workload=${1#*=} ;;
        *) options+=("$1") ;;
    esac
    shift
done
set -- ${options[@]+"${options[@]}"}

case "$workload" in
    images) choose=(choose_data) model=(--model cipher) ;;
    images-deep) choose=(choose_data) model=(--model resnet20 --momentum 0.9) ;;
    text) choose=(install_data text) model=(--model transformer --optimizer adamw --learning-rate 0.001) ;;
    tables) choose=(install_data tables) model=(--model mlp --optimizer adam --learning-rate 0.001) ;;
    *)
        dlion_say "--workload $workload is unknown: choose images, images-deep, text or tables"
        exit 2
        ;;
esac

data=() stop=(--seconds 100) tests=(--test-samples 200)
[ "$workload" != images ] || tests=()
case " $* " in *" --data"[\ =]*) ;; *) data=(--data "$("${choose[@]}")") ;; esac
case " $* " in *" --steps"[\ =]* | *" --seconds"[\ =]*) stop=() ;; esac

dlion launch -n "${DLION_RANKS:-4}" train --strategy dlion "${model[@]}" "${data[@]}" "${stop[@]}" "${tests[@]}" \
    --evaluate-every 10s --out "runs/demo-$(date -u +%Y%m%dT%H%M%SZ)" "$@"
