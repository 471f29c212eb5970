"""Runs as tables and figures, from the metrics that ``--out`` keeps; for scripts and notebooks.

    import analysis

    runs = analysis.load_all(["runs/a", "runs/b"])
    analysis.steps(runs).groupby(["run", "rank"])["wait_s"].mean()

`load` and `load_all` read runs, `labels` names them; `steps`, `links`, `evaluations`, `transfers` and `settings`
are their tables; the figures are in `analysis.figures`. Wants the extra ``analysis`` (pandas and matplotlib).
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

if absent := [name for name in ("matplotlib", "pandas") if find_spec(name) is None]:
    line = f"analysis needs {' and '.join(absent)}: pip install -e '.[analysis]' in the checkout"
    if sys.argv[0] != "-m":
        raise ImportError(line)
    # What Python calls itself on its way to a module of the package that is run as a command.
    print(f"dlion: error: {line}", file=sys.stderr)
    sys.exit(2)

from analysis.tables import evaluations, links, settings, steps, transfers
from dlion_mpi.metrics.reader import labels, load, load_all

__all__ = ["evaluations", "labels", "links", "load", "load_all", "settings", "steps", "transfers"]
