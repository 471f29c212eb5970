"""Figures for a paper: ``python -m analysis.figures RUN... -o figures/`` writes each as PDF and PNG.

They show the figures of `dlion report`, drawn for one column of text. In a notebook, ``analysis.figures.draw(runs)``
returns Matplotlib figures by name.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import MaxNLocator

from dlion_mpi.commands.report import target_of
from dlion_mpi.config.target import Target
from dlion_mpi.errors import UserError
from dlion_mpi.log import complain, say
from dlion_mpi.metrics.reader import Run, labels, load_all
from dlion_mpi.report import comparison, workers
from dlion_mpi.report.colours import LIGHT
from dlion_mpi.report.figure import Figure

COLUMN, PAGE = 3.4, 7.0
"""Widths in inches of one column of text, and of two."""
STYLE: Any = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d7dce2",
    "grid.linewidth": 0.5,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # publishers refuse Matplotlib's default, Type 3
}
DASHES = ("-", "--", "-.", ":")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw all figures of the runs and print their paths. Return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m analysis.figures", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="--out folder of a run")
    parser.add_argument("-o", "--output", default="figures", metavar="DIR", help="(default: figures)")
    parser.add_argument("--target", metavar="METRIC>=VALUE", help="for the time to target: 'accuracy>=0.8'")
    args = parser.parse_args(argv)
    try:
        target = target_of(args.target)
        runs = load_all(args.runs)
        for label, run in zip(labels(runs), runs, strict=True):
            for note in run.notes:
                say(f"figures: {label}: {note}")
        for path in save(draw(runs, target=target), Path(args.output)):
            print(path)
    except UserError as error:
        complain(str(error))
        return 2
    return 0


def draw(runs: Sequence[Run], *, target: Target | str | None = None) -> dict[str, Drawing]:
    """Draw every figure that has data, by name: first the comparisons, then the figures of each run.

    ``target``: for the time to target, such as ``"accuracy>=0.8"``; None: the default of `dlion report`. Raises
    UserError.
    """
    target = Target.parse(target) if isinstance(target, str) else target
    names = labels(runs)
    drawn = {figure["key"]: drawing(figure) for figure in comparison.figures(runs, names, target)}
    for run, name in zip(runs, names, strict=True):
        stem = re.sub(r"[^\w.-]+", "-", name).strip("-.")
        drawn |= {f"{stem}-{figure['key']}": drawing(figure) for figure in workers.figures(run)}
    return {name: made for name, made in drawn.items() if made is not None}


def save(drawn: Mapping[str, Drawing], folder: Path) -> list[Path]:
    """Write each figure as PDF and as PNG. Raises UserError."""
    paths = [folder / f"{name}.{kind}" for name in drawn for kind in ("pdf", "png")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(STYLE):
            for path in paths:
                # Without a date, the same runs give the same file.
                dated = {"CreationDate": None} if path.suffix == ".pdf" else {}
                drawn[path.stem].savefig(path, metadata=dated)
    except OSError as error:
        raise UserError(f"-o {folder}: cannot be written ({error.strerror})") from None
    return paths


def drawing(figure: Figure) -> Drawing | None:
    """Draw a figure of `dlion report` with Matplotlib; None if it has no data."""
    with mpl.rc_context(STYLE):
        return DRAWN[figure["kind"]](figure)


def _lines(figure: Figure) -> Drawing | None:
    panels = figure["panels"]
    if not any(_known(line["y"]) for panel in panels for line in panel["series"]):
        return None
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    made = Drawing(figsize=(COLUMN, 2.3) if len(panels) == 1 else (PAGE, 0.6 + 1.4 * down))
    grid = made.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        axes.set_title(panel["title"], fontsize=8)
        for line in panel["series"]:
            _line(axes, line, figure)
    for axes in grid[-1]:
        axes.set_xlabel(_capital(figure["x"]))
    made.supylabel(_capital(figure["y"]), fontsize=8)
    _limit(grid[0, 0], figure)
    handles = {line.get_label(): line for axes in grid.flat for line in axes.lines}
    if len(handles) > 1:
        names = sorted(handles, key=_natural) if len(panels) > 1 else list(handles)
        columns = 3 if len(panels) == 1 else 6
        made.legend([handles[n] for n in names], names, loc="outside upper center", ncols=columns)
    return made


def _line(axes: Axes, line: Mapping[str, Any], figure: Figure) -> None:
    time_s = line.get("t", figure["t"])
    known = [n for n, value in enumerate(line["y"]) if value is not None]
    style: dict[str, Any] = {"color": LIGHT[line["colour"] % len(LIGHT)], "label": line["name"], "lw": 1.1}
    # Dashes help to distinguish runs, but make many noisy lines harder to see.
    style["ls"] = DASHES[line["colour"] % len(DASHES)] if _compares(figure) else "-"
    marker = "o" if len(known) <= 30 else ""
    axes.plot([time_s[n] for n in known], [line["y"][n] for n in known], marker=marker, ms=2, **style)
    if "low" in line:
        rows = [n for n in known if line["low"][n] is not None]
        times, low, high = ([values[n] for n in rows] for values in (time_s, line["low"], line["high"]))
        axes.fill_between(times, low, high, color=style["color"], alpha=0.16, lw=0)


def _compares(figure: Figure) -> bool:
    """Whether the lines of a figure are whole runs."""
    return figure["key"] == "loss" or (figure["key"].startswith("test-") and not figure["key"].endswith("-of-workers"))


def _limit(axes: Axes, figure: Figure) -> None:
    """Set the axes: from 0 to the limits of the figure, or logarithmic if values are far apart."""
    drawn = [line for panel in figure["panels"] for line in panel["series"]]
    values = [v for line in drawn for name in ("y", "low", "high") for v in _known(line.get(name, ()))]
    low, high = min(values), max(values)
    axes.set_xlim(left=0)
    if figure["log"] and 0 < low < high / 20:
        axes.set_yscale("log")
        return
    top = max(high, figure["top"] or 0)
    axes.set_ylim(bottom=min(0, 1.05 * low), top=1.05 * min(top, figure["cap"] or top) or 1)


def _bars(figure: Figure) -> Drawing | None:
    parts = [part for part in figure["parts"] if any(_known(part["values"]))]
    if not parts:
        return None
    made, axes = _rows(figure["rows"])
    left = [0.0] * len(figure["rows"])
    for part in parts:
        widths = [value or 0.0 for value in part["values"]]
        colour = LIGHT[part["colour"] % len(LIGHT)]
        axes.barh(figure["rows"], widths, left=left, height=0.62, label=part["name"], color=colour, ec="white", lw=0.5)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlabel(_capital(figure["x"]))
    made.legend(loc="outside upper center", ncols=3)
    return made


def _targets(figure: Figure) -> Drawing | None:
    made, axes = _rows(figure["rows"])
    times = [row[figure["chosen"]] for row in figure["reached"]]
    fastest = min(_known(times), default=None)
    for row, (time_s, end_s) in enumerate(zip(times, figure["seconds"], strict=True)):
        colour = LIGHT[row % len(LIGHT)]
        if time_s is None:
            axes.barh(row, end_s, height=0.62, facecolor="none", edgecolor=colour, hatch="////", lw=0.8)
            label = "not reached"
        else:
            axes.barh(row, time_s, height=0.62, color=colour)
            label = f"{time_s:.4g} s" + (f" ({time_s / fastest:.2f}×)" if fastest and len(_known(times)) > 1 else "")
        axes.annotate(
            label, (end_s if time_s is None else time_s, row), (3, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(range(len(times)), figure["rows"])
    metric, sign, unit = (figure[name] for name in ("metric", "sign", "unit"))
    axes.margins(x=0.35)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"Time to test {metric} {sign} {figure['targets'][figure['chosen']]:g}{unit} (s of training)")
    return made


def _matrix(figure: Figure) -> Drawing | None:
    values = [[float("nan") if value is None else value for value in row] for row in figure["values"]]
    if not any(_known(row) for row in figure["values"]):
        return None
    made = Drawing(figsize=(COLUMN, 0.85 * COLUMN))
    axes = made.subplots()
    image = axes.imshow(values, cmap="Blues", vmin=0)
    highest = max(value for row in figure["values"] for value in _known(row))
    for r, row in enumerate(figure["values"] if len(values) <= 8 else ()):
        for c, value in enumerate(row):
            if value is not None:
                text = f"{value:.3g}"
                axes.text(c, r, text, ha="center", va="center", fontsize=7, color="w" if value > highest / 2 else "k")
    axes.grid(visible=False)
    axes.set(xlabel=f"{_capital(figure['x'])} worker", ylabel=f"{_capital(figure['y'])} worker")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    made.colorbar(image, label=figure["unit"])
    return made


def _spans(figure: Figure) -> Drawing | None:
    if not figure["items"]:
        return None
    made, axes = _rows(figure["rows"])
    shown = set()
    for row, requested, done, source, merged, _ in figure["items"]:
        colour = LIGHT[source % len(LIGHT)]
        label = None if source in shown else f"weights of worker {source}"
        shown.add(source)
        face = colour if merged else "none"
        width = max(done - requested, 0.004 * figure["end"])
        axes.barh(row, width, left=requested, height=0.6, facecolor=face, edgecolor=colour, lw=0.8)
        axes.plot([], [], "s", color=colour, label=label)
    axes.set_yticks(range(len(figure["rows"])), figure["rows"])
    axes.set(xlim=(0, figure["end"]), xlabel=_capital(figure["x"]))
    handles = [(line, str(line.get_label())) for line in axes.lines if not str(line.get_label()).startswith("_")]
    made.legend(*zip(*handles, strict=True), loc="outside upper center", ncols=2)
    return made


def _rows(names: Sequence[str]) -> tuple[Drawing, Axes]:
    """An empty figure with a row per name, the first at the top."""
    made = Drawing(figsize=(COLUMN, 0.9 + (0.24 if len(names) <= 12 else 0.12) * len(names)))
    axes = made.subplots()
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0, labelsize=8 if len(names) <= 12 else 5)
    return made, axes


DRAWN: Mapping[str, Callable[[Figure], Drawing | None]] = {
    "lines": _lines,
    "bars": _bars,
    "targets": _targets,
    "matrix": _matrix,
    "spans": _spans,
}


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _natural(name: object) -> list[tuple[int, str]]:
    """Sort key that puts worker 10 after worker 9."""
    return [(int(part or 0), text) for text, part in re.findall(r"(\D*)(\d*)", str(name))]


if __name__ == "__main__":
    sys.exit(main())
