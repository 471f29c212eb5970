"""Tables and figures of runs, from the metrics that ``--out`` stores, for scripts and notebooks.

    import analysis

    runs = analysis.load_all(["runs/a", "runs/b"])
    analysis.steps(runs).groupby(["run", "rank"])["wait_s"].mean()

`load` and `load_all` read runs, and `labels` names them. `steps`, `links`, `evaluations`, `transfers` and `settings`
return tables. `analysis.figures` draws figures. Requires the extra ``analysis`` (pandas and Matplotlib).
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

if absent := [name for name in ("matplotlib", "pandas") if find_spec(name) is None]:
    line = f"analysis needs {' and '.join(absent)}: pip install -e '.[analysis]' in the checkout"
    if sys.argv[0] != "-m":
        raise ImportError(line)
    # `python -m analysis.MODULE`: Python imports the package before it runs the module.
    print(f"dlion: error: {line}", file=sys.stderr)
    sys.exit(2)

from analysis.tables import evaluations, links, settings, steps, transfers
from dlion_mpi.metrics.reader import labels, load, load_all

__all__ = ["evaluations", "labels", "links", "load", "load_all", "settings", "steps", "transfers"]
