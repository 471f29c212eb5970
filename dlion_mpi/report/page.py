"""The page: template, styles, program and data in one HTML file."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template

from dlion_mpi import __version__
from dlion_mpi.config.target import Target
from dlion_mpi.metrics.reader import Run, labels
from dlion_mpi.report import colours, comparison, workers
from dlion_mpi.report.settings import settings, summary
from dlion_mpi.report.tests import metrics_of


def render(runs: Sequence[Run], *, target: Target | None) -> str:
    """Render the page about some runs. ``target``: for the time to target. Raises UserError."""
    names, metrics = labels(runs), metrics_of(runs)
    rows, single = [], []
    for run, name in zip(runs, names, strict=True):
        found = workers.links_of(run)
        rows.append(summary(run, found, metrics))
        single.append({"label": name, "figures": workers.figures(run, found)})
    data = {
        "comparison": comparison.figures(runs, names, target),
        "runs": single,
        "colours": {"light": colours.LIGHT, "dark": colours.DARK},
    }
    title = f"Run {names[0]}" if len(runs) == 1 else f"{len(runs)} runs compared"
    return Template(_asset("page.html")).substitute(
        title=escape(title),
        made=escape(f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, dlion-mpi {__version__}"),
        styles=_asset("page.css"),
        notes=_notes(runs, names),
        summary=_summary(names, rows, runs),
        settings=_settings(names, runs),
        data=_embedded(data),
        library=_asset("echarts.min.js"),
        program=_asset("charts.js") + _asset("page.js"),
    )


def _asset(name: str) -> str:
    return resources.files("dlion_mpi.report").joinpath("assets", name).read_text(encoding="utf-8")


def _embedded(data: object) -> str:
    """JSON that cannot end its HTML element, whatever text the runs contain."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _notes(runs: Sequence[Run], names: Sequence[str]) -> str:
    lines = [
        f"<li><b>{escape(name)}</b>: {escape(note)}</li>"
        for run, name in zip(runs, names, strict=True)
        for note in run.notes
    ]
    if not lines:
        return ""
    return f'<section class="notes"><h2>Missing data</h2><ul>{"".join(lines)}</ul></section>'


def _summary(names: Sequence[str], rows: Sequence[dict[str, str]], runs: Sequence[Run]) -> str:
    if all(name == row["strategy"] for name, row in zip(names, rows, strict=True)):
        rows = [{column: text for column, text in row.items() if column != "strategy"} for row in rows]
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in ("run", *rows[0]))
    body = ""
    for n, (name, row, run) in enumerate(zip(names, rows, runs, strict=True)):
        cells = "".join(f"<td>{escape(text)}</td>" for text in row.values())
        folder = f"<small>{escape(str(run.path))}</small>" * (str(run.path) != name)
        body += f'<tr><th scope="row"><i class="key" data-colour="{n}"></i>{escape(name)}{folder}</th>{cells}</tr>'
    return f'<table class="summary"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _settings(names: Sequence[str], runs: Sequence[Run]) -> str:
    """The table of settings: those that differ, and the others folded."""
    rows = settings(runs)
    differing = [row for row in rows if row[2]]
    alike = [row for row in rows if not row[2]]
    parts = []
    if len(runs) > 1:
        parts.append(f"<h3>Settings that differ: {len(differing)}</h3>")
        if differing:
            parts.append(_table(names, differing))
    title = f"Settings that all runs share: {len(alike)}" if len(runs) > 1 else f"All {len(alike)} settings"
    parts.append(f"<details><summary>{title}</summary>{_table(names, alike)}</details>")
    return "".join(parts)


def _table(names: Sequence[str], rows: Sequence[tuple[str, list[str], bool]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = ""
    for name, values, differs in rows:
        common = max(values, key=values.count)
        cells = "".join(
            f"<td{' class=other' if differs and value != common else ''}>{escape(value)}</td>" for value in values
        )
        title = escape(name).replace("_", "_<wbr>")
        body += f'<tr{" class=differs" if differs else ""}><th scope="row">{title}</th>{cells}</tr>'
    return (
        f'<div class="scroll"><table class="settings"><thead><tr><th scope="col">setting</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
