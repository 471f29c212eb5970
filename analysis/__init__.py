"""Runs as tables and figures, from the metrics that ``--out`` keeps; for scripts and notebooks.

    import analysis

    runs = analysis.load_all(["runs/a", "runs/b"])
    analysis.steps(runs).groupby(["run", "rank"])["wait_s"].mean()

`load` and `load_all` read runs, `labels` names them; `steps`, `links`, `evaluations`, `transfers` and `settings`
are their tables; the figures are in `analysis.figures`. Wants the extra ``analysis`` (pandas and matplotlib).
"""

from __future__ import annotations

from analysis.tables import evaluations, links, settings, steps, transfers
from dlion_mpi.runs import labels, load, load_all

__all__ = ["evaluations", "labels", "links", "load", "load_all", "settings", "steps", "transfers"]
