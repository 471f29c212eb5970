"""One HTML page about a run, or a comparison of several runs. It opens without a network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def report(
    runs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] = "report.html",
    *,
    target: str | None = None,
) -> Path:
    """Write the page about some runs and return its path.

    ``runs``: folders that ``--out`` made. ``target``: for the time to target, such as
    ``"accuracy>=0.8"`` or ``"val_loss<=0.3"``. Raises UserError.
    """
    from dlion_mpi.config.target import Target
    from dlion_mpi.metrics.reader import load_all
    from dlion_mpi.report.output import replaced
    from dlion_mpi.report.page import render

    page = render(load_all(runs), target=None if target is None else Target.parse(target))
    with replaced(Path(output)) as file:
        file.write(page.encode())
    return Path(output)
