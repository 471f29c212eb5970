#!/usr/bin/env bash
# Build the documentation as a site in build/docs. Every warning is an error: a broken link, a page without a menu
# entry, a docstring that cannot be parsed.
#
#   bash env/docs.sh [OPTIONS OF sphinx-build]      then open build/docs/index.html
#
# For DLION_MPI, DLION_TF and DLION_PYTHON see env/setup.sh.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=env/setup.sh
source env/setup.sh

site=build/docs

say() {
    printf 'docs: %s\n' "$*" >&2
}

# Pages must work without a network: the browser must not fetch anything from another site.
check_offline() {
    local found
    found=$(grep -rlE '<(script|img|iframe|source)[^>]* src="(https?:)?//|<link[^>]* rel="(stylesheet|preload|icon)"[^>]* href="(https?:)?//|@import|url\((https?:)?//' \
        --include='*.html' --include='*.css' "$site") || return 0
    say "these pages fetch something from another site: $found"
    return 1
}

python -c 'import furo, latex2mathml, myst_parser, sphinx' 2>/dev/null || {
    say "installing the extra 'docs'"
    log=$(python -m pip install --quiet --disable-pip-version-check --no-input --editable '.[docs]' 2>&1 </dev/null) || {
        printf '%s\n' "$log" | tail -n 5 >&2
        say "pip could not install: see above; check the network, the proxy and the disk"
        exit 1
    }
}
rm -rf "$site"
python -m sphinx -q -W --keep-going -E -b html -d build/doctrees -c docs "$@" . "$site"
printf '<meta http-equiv="refresh" content="0; url=docs/index.html">\n' >"$site/index.html"
check_offline
say "the site is in $site: open $site/index.html"
