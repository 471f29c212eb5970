#!/usr/bin/env bash
# Run all tests or some parts. Prints a line per part and the total at the end.
#
#   bash env/test.sh [unit|contract|mpi|mpich|system|jax|torch|slurm ...] [-- PYTEST OPTIONS]
#
# unit, contract, system and mpi on 1 rank run several tests at a time. mpi runs tests/mpi on 1 and 4 ranks (system tests
# start 2); mpich on 2 ranks of MPICH, in a separate environment, with the tests of dlion launch. slurm runs on a cluster
# of env/slurm/up.sh (root), in the background of the other parts, because it waits for Slurm most of the time. jax and
# torch run the rows of docs/what-trains.md and the comparison of Keras's backends, each in a separate environment.
# DLION_TEST_RANKS="1 2 4"   other numbers of ranks for mpi and mpich
# DLION_TEST_MPICH=0         skip mpich
# DLION_TEST_BACKENDS="jax"  other backends than jax and torch; empty: skip both
# DLION_TEST_ROWS=all        all rows of docs/what-trains.md, not some of each kind
# DLION_TEST_TIMEOUT_S=900   time limit of a part

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

parts=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case "$1" in
        unit | contract | mpi | mpich | system | jax | torch | slurm) parts+=("$1") ;;
        *)
            echo "env/test.sh: no part '$1': choose unit, contract, mpi, mpich, system, jax, torch or slurm;" \
                "pytest's options go after --" >&2
            exit 2
            ;;
    esac
    shift
done
[ $# -eq 0 ] || shift
if [ ${#parts[@]} -eq 0 ]; then
    parts=(unit contract mpi)
    [ "${DLION_TEST_MPICH:-1}" = 0 ] || parts+=(mpich)
    read -ra backends <<<"${DLION_TEST_BACKENDS-jax torch}"
    parts+=(system "${backends[@]}" slurm)
fi

# shellcheck source=env/setup.sh
source env/setup.sh
timeout_s=${DLION_TEST_TIMEOUT_S:-900}
results=$(mktemp -d)
[ -t 1 ] && color=yes || color=no # explicit, because Open MPI gives every rank a terminal
touch "$results/parts"
background=''
trap 'stop_background; rm -rf "$results"' EXIT
trap 'exit 130' INT TERM
# Without this, each start of Open MPI spends a second searching for network fabrics that one machine does not need.
export OMPI_MCA_btl=${OMPI_MCA_btl:-^ofi}

# run_pytest NAME PATH OPTIONS...
run_pytest() {
    local name=$1 path=$2 code=0 start=$SECONDS
    shift 2
    printf '\n== %s\n' "$name"
    timeout --foreground --kill-after=10 "$timeout_s" \
        python -m pytest "$path" --color="$color" --junitxml="$results/$name.xml" "$@" </dev/null || code=$?
    echo "$name $code $((SECONDS - start))" >>"$results/parts"
}

# Run one rank. Rank 0 prints its output, the other ranks write theirs to a file. The first failure on any rank ends
# the job (-x, and mpi4py's runner, which aborts when pytest fails), because the other ranks would wait for it in MPI.
run_rank() {
    local base=$1.rank${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-${PMIX_RANK:-0}}}
    shift
    [[ $base = *.rank0 ]] || exec >"$base.log" 2>&1
    exec python -m mpi4py -m pytest tests/mpi --with-mpi -x -p no:cacheprovider --junitxml="$base.xml" "$@"
}
export -f run_rank

run_mpi() {
    local name=$1-$2 ranks=$2 code=0 rank failed start=$SECONDS
    shift 2
    printf '\n== %s: tests/mpi on %s\n' "$name" "$ranks ranks"
    # A rank that waits in MPI does not handle signals; only a thread can end it.
    timeout --foreground --kill-after=10 "$timeout_s" dlion launch -n "$ranks" -- \
        bash -c 'run_rank "$@"' run_rank "$results/$name" --color="$color" --timeout-method=thread "$@" </dev/null || code=$?
    if [ "$code" != 0 ]; then
        failed=$(grep -lsE '<(failure|error)[ >]' "$results/$name".rank*.xml || true)
        for ((rank = 1; rank < ranks; rank++)); do
            [[ -z $failed || $failed = *.rank$rank.xml* ]] || continue
            printf '\n-- rank %s of %s, last lines\n' "$rank" "$name"
            tail -n 100 "$results/$name.rank$rank.log" 2>/dev/null || echo "it did not start"
        done
    fi
    echo "$name $code $((SECONDS - start))" >>"$results/parts"
}

# True if pytest's options, such as -k, select no test in a folder. A folder without tests is still a failure.
selects_nothing() {
    local folder=$1 code=0
    shift
    [ $# -gt 0 ] || return
    python -m pytest "$folder" --collect-only --quiet "$@" >/dev/null 2>&1 </dev/null || code=$?
    [ "$code" = 5 ]
}

# The report is tested in a browser. Without one, those tests are skipped with a message.
get_browser() {
    command -v chromedriver >/dev/null || dlion_apt_install chromium chromium-driver fonts-dejavu-core ||
        dlion_say "no headless browser: the tests of the report's page will be skipped"
}

# Start slurm, whose output is shown at the end, and before it get the browser that system needs. Its own process group,
# so that Ctrl-C reaches it through this script.
start_background() {
    set -m
    {
        [[ " ${parts[*]} " != *" system "* ]] || get_browser
        run_part slurm "$@"
    } >"$results/background.log" 2>&1 &
    set +m
    background=$!
}

finish_background() {
    [ -n "$background" ] || return 0
    wait "$background" || true
    background=''
    cat "$results/background.log"
}

# SIGINT, so that pytest takes the cluster down.
stop_background() {
    [ -n "$background" ] || return 0
    kill -INT -- "-$background" || true
    wait "$background" || true
}

run_part() {
    local part=$1 ranks
    shift
    if [[ $part != jax && $part != torch ]] && selects_nothing "tests/${part/mpich/mpi}" "$@"; then
        printf '\n== %s: no test selected\n' "$part"
        return
    fi
    case "$part" in
        mpi)
            for ranks in ${DLION_TEST_RANKS:-1 4}; do
                case "$ranks" in
                    1) run_pytest mpi-1 tests/mpi --with-mpi --numprocesses auto --dist worksteal "$@" ;;
                    *) run_mpi mpi "$ranks" "$@" ;;
                esac
            done
            ;;
        mpich)
            (
                # shellcheck source=env/setup.sh
                DLION_MPI=mpich source env/setup.sh || exit
                for ranks in ${DLION_TEST_RANKS:-2}; do run_mpi mpich "$ranks" "$@"; done
                selects_nothing tests/system/test_launch.py "$@" || run_pytest mpich tests/system/test_launch.py "$@"
            ) || echo "mpich 1 0" >>"$results/parts"
            ;;
        unit | contract) run_pytest "$part" "tests/$part" --numprocesses auto --dist worksteal "$@" ;;
        system)
            get_browser
            # Two at a time: one computes while the other starts or waits. The tests of a file stay in one process, because
            # they share runs, and because emulations would see each other's links.
            run_pytest system tests/system --numprocesses 2 --dist loadfile "$@"
            ;;
        jax | torch)
            (
                # shellcheck source=env/setup.sh
                DLION_BACKEND=$part source env/setup.sh || exit
                tests=(tests/contract/test_{backends,keras_models,padding,shared_replica}.py tests/system/test_keras_rows.py)
                { [ $# -gt 0 ] && selects_nothing "${tests[@]}" "$@"; } || run_pytest "$part" "${tests[@]}" "$@"
            ) || echo "$part 1 0" >>"$results/parts"
            ;;
        slurm) run_pytest slurm tests/slurm "$@" ;;
    esac
}

# A test counts once per part, with its worst result on any rank.
summarise() {
    python - "$results" <<'PYTHON'
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

SEVERITY = ("skipped", "passed", "failed")
results = Path(sys.argv[1])
total = Counter()
ok = True
print("\n{:10} {:6} {:>7} {:>7} {:>7} {:>7}".format("part", "result", *reversed(SEVERITY), "time"))
for line in (results / "parts").read_text().splitlines():
    name, code, seconds = line.split()
    worst = {}
    for path in [*results.glob(f"{name}.xml"), *results.glob(f"{name}.rank*.xml")]:
        for case in ElementTree.parse(path).iter("testcase"):
            tags = {child.tag for child in case}
            state = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
            test = case.get("classname"), case.get("name")
            worst[test] = max(worst.get(test, "skipped"), state, key=SEVERITY.index)
    count = Counter(worst.values())
    if code != "0" and not count["failed"]:
        count["failed"] = 1  # the part itself: a crash, a time-out, or no tests found
    ok &= code == "0"
    total += count
    columns = [count[state] for state in reversed(SEVERITY)]
    print("{:10} {:6} {:7} {:7} {:7} {:>5} s".format(name, "ok" if code == "0" else "FAILED", *columns, seconds))
if ok and not total["passed"]:
    print("no test has run")
    ok = False
print(f"\n{total['passed']} passed, {total['failed']} failed" + f", {total['skipped']} skipped" * (total["skipped"] > 0))
sys.exit(not ok)
PYTHON
}

if [[ ${#parts[@]} -gt 1 && " ${parts[*]} " = *" slurm "* ]]; then
    start_background "$@"
fi
for part in "${parts[@]}"; do
    [[ $part = slurm && -n $background ]] || run_part "$part" "$@"
done
finish_background
summarise
