"""Counts the marks of translated English in the files that the project ships: `python -m tests.english`.

Six projects of the field (nanochat, torchtitan, optax, torchft, hivemind, mpi4py-fft) have 33 of these marks in 108,000
lines, 0.3 per thousand. Each mark is a place where a reader would stumble.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = {".md", ".py", ".sh", ".toml", ".js", ".def", ".txt"}
SHIPPED = ("analysis", "benchmarks", "dlion_mpi", "docs", "env", "jobs", "README.md", "CHANGELOG.md", "CONTRIBUTING.md")

# The mark, and what to write in its place. A space stands for any white space; names in code count like words.
MARKS = {
    "the own": "its, their, local",
    "of (its|their|your|one's) own": "its own, their own, your own",
    "one's": "your",
    "besides?": "in the background, next to, with, also",
    "(go|goes|going|gone|went) on": "continue, resume, remain",
    "now and then": "every N steps, periodically",
    "so many": "that many, N",
    "told": "informed, known, given",
    "under way": "in flight",
    "(take|takes|taken|taking|took) in": "receive, accept",
    "(owe|owes|owed|owing)": "residual",
    "(has|have|had) come": "has arrived",
    "(everyone|everybody)": "all ranks, all workers",
    "(nobody|somebody|anybody|whoever)": "no rank, a rank, any rank that",
    "in the place of": "instead of",
    "by when": "when",
    "at hand": "current, available",
    "anew": "again",
    "for ever": "forever, without end",
    "(glance|sight|seats|outcome|is_quiet)": "snapshot, from_files, shared_replica, result, is_drained",
}
OPENINGS = ("what", "who", "whoever", "whose", "which", "that", "how", "where", "when", "why", "if", "as", "until")
DOCSTRING = "docstring that begins with a clause"


class Mark(NamedTuple):
    """One place to rewrite."""

    path: str
    line: int
    mark: str
    text: str

    def __str__(self) -> str:
        cure = MARKS.get(self.mark, "begin with a verb or a noun phrase")
        return f"{self.path}:{self.line}: {self.text!r} (write: {cure})"


def pattern(mark: str) -> re.Pattern[str]:
    """A whole-word search for a mark; the words may be broken across lines of a comment."""
    return re.compile(r"(?<![A-Za-z])(?:" + mark.replace(" ", r"\s+(?:#\s*)?") + r")(?![A-Za-z])", re.I)


PATTERNS = {mark: pattern(mark) for mark in MARKS}


def files() -> Iterator[Path]:
    """The text files that the project ships, without results and third-party code."""
    for name in SHIPPED:
        for path in sorted((ROOT / name).rglob("*")) if (ROOT / name).is_dir() else [ROOT / name]:
            is_ours = "results" not in path.parts and not path.name.startswith("echarts")
            if path.suffix in SUFFIXES and is_ours and path.is_file():
                yield path


def marks(path: Path) -> Iterator[Mark]:
    """The marks of one file."""
    text = path.read_text(encoding="utf-8")
    where = str(path.relative_to(ROOT))
    for mark, search in PATTERNS.items():
        for found in search.finditer(text):
            yield Mark(where, text.count("\n", 0, found.start()) + 1, mark, " ".join(found.group().split()))
    if path.suffix == ".py":
        yield from (Mark(where, line, DOCSTRING, first) for line, first in openings(text))


def openings(text: str) -> Iterator[tuple[int, str]]:
    """(line, first words) of each docstring that begins with a clause."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = (ast.get_docstring(node) or "").split()[:4]
            if words and words[0].lower() in OPENINGS:
                yield node.body[0].lineno, " ".join(words)


def room(path: str) -> str:
    """The folder that a file's marks are counted with: two levels deep in the package, one elsewhere."""
    parts = Path(path).parts
    return "/".join(parts[:2]) if parts[0] == "dlion_mpi" and len(parts) > 2 else parts[0]


def table(by: str = "room") -> str:
    """Marks, lines and marks per thousand lines, per ``room`` or per ``file``, with the sum in the last row."""
    found: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    for path in files():
        name = str(path.relative_to(ROOT))
        for key in (room(name) if by == "room" else name, "all"):
            found[key] += len(list(marks(path)))
            lines[key] += path.read_text(encoding="utf-8").count("\n")
    rows = [(key, found[key], lines[key]) for key in [*sorted(lines.keys() - {"all"}), "all"]]
    return "\n".join(f"{key:45} {count:5} {total:6} {1000 * count / total:7.1f}" for key, count, total in rows)


if __name__ == "__main__":
    import sys

    print(table(*sys.argv[1:2]))
