#!/usr/bin/env bash
# Build the wheel, install it in a new virtual environment, and use it from another folder: train on two ranks, simulate,
# write a report, ask for the help of the figures. Takes a minute.
#
#   bash env/wheel.sh
#
# For DLION_MPI, DLION_TF and DLION_PYTHON see env/setup.sh. All files are in a temporary folder that is removed.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=env/setup.sh
source env/setup.sh
unset PYTHONPATH

work=$(mktemp -d)
log=$work/log
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

say() {
    printf 'wheel: %s\n' "$*" >&2
}

# step NAME COMMAND...: run a command, with its output in the log; if it fails, show the end of the log and stop.
step() {
    local name=$1 start=$SECONDS
    shift
    [ "$(type -t "$1")" = function ] || set -- timeout --foreground --kill-after=10 300 "$@"
    "$@" >"$log" 2>&1 </dev/null || {
        tail -n 15 "$log" >&2
        say "failed: $name"
        exit 1
    }
    say "$name: $((SECONDS - start)) s"
}

# From the files that git knows or would add, so that a build folder left by an earlier build has no effect.
copy_source() {
    mkdir "$work/source"
    git ls-files -z --cached --others --exclude-standard --deduplicate |
        tar --null --ignore-failed-read --files-from=- --create | tar --extract --directory "$work/source"
}

# Every file of the packages is in the wheel, and nothing else.
check_contents() {
    python - "$work/source" "$1" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

source, wheel = Path(sys.argv[1]), sys.argv[2]
paths = [path for package in ("analysis", "dlion_mpi") for path in (source / package).rglob("*")]
expected = {str(path.relative_to(source)) for path in paths if path.is_file()}
found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
if found != expected:
    sys.exit(f"missing in the wheel: {sorted(expected - found)}; not in the source: {sorted(found - expected)}")
PYTHON
}

# TensorFlow (1.6 GB) is not installed again. Its extra is resolved in this environment, and then its packages are lent to
# the new one, which by then has shown that it lacks nothing else.
lend_tensorflow() {
    local libraries
    libraries=lib/python$(dlion_python_version "$DLION_VENV/bin/python")/site-packages
    python -m pip install --quiet --no-input --dry-run "${wheel}[$tensorflow]" &&
        echo "$DLION_VENV/$libraries" >"$work/venv/$libraries/lent.pth"
}

check_imports() {
    "$work/venv/bin/python" -c '
import pkgutil, sys, analysis, dlion_mpi
for package in analysis, dlion_mpi:
    assert package.__file__.startswith(sys.prefix), f"{package.__name__} is imported from {package.__file__}"
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.endswith("__main__"):
            __import__(module.name)'
}

start=$SECONDS
copy_source
step "build" python -m pip wheel --quiet --no-input --no-deps --wheel-dir "$work" "$work/source"
wheel=$(echo "$work"/dlion_mpi-*.whl)
step "contents" check_contents "$wheel"
step "new environment" python -m venv "$work/venv"
extras=$(dlion_extras)
tensorflow=${extras%%,*}
extras=${extras#*,}
extras=${extras/,dev/}
python -m pip list --format=freeze --exclude-editable >"$work/versions"
step "install with $extras" \
    "$work/venv/bin/python" -m pip install --quiet --no-input --constraint "$work/versions" "${wheel}[$extras]"
mkdir "$work/elsewhere"
cd "$work/elsewhere"
step "import everything" check_imports
step "lend TensorFlow" lend_tensorflow
step "train on two ranks" "$work/venv/bin/dlion" launch -n 2 train --data digits --steps 20 --out run
step "simulate" "$work/venv/bin/dlion" simulate --env homo-b --workers 2 --data digits --steps 5
step "report" "$work/venv/bin/dlion" report run -o report.html
step "figures" "$work/venv/bin/python" -m analysis.figures --help
say "the wheel works, after $((SECONDS - start)) s"
