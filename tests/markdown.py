"""The documentation's pages as tests read them: headings, links, fenced blocks, and files that blocks stand for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *ROOT.glob("docs/*.md"),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
    ]
)
FENCE = re.compile(r"^(?P<fence>`{3,})(?P<language>[^\n`]*)\n(?P<text>.*?)^(?P=fence)[ ]*$", re.M | re.S)
FILE = re.compile(r"<!-- file: (?P<name>[\w.-]+) -->\n\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block. ``file``: the name in the comment above it, if it has one: that block is a whole file."""

    page: Path
    line: int
    language: str
    text: str
    file: str | None


@cache
def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        above = FILE.search(text[: match.start()])
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, match["language"].strip(), match["text"], above["name"] if above else None))
    return found


@cache
def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def every_block(*languages: str) -> list[Block]:
    """All blocks of these languages, of all pages."""
    return [block for page in PAGES for block in blocks(page) if block.language in languages]


def label(block: Block) -> str:
    """Where a block is, for a test's name."""
    return f"{block.page.name}:{block.line}"


def links(page: Path) -> Iterator[str]:
    """What the page's links lead to, but for those to other sites."""
    for target in re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page))):
        if not re.match(r"[a-z]+:", target):
            yield target


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of the page's headings, as code hosts and the site make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", prose(page), re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        number = sum(anchor == slug or re.fullmatch(re.escape(slug) + r"-\d+", anchor) is not None for anchor in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found


def write_files(folder: Path) -> None:
    """Write every block that is a whole file into ``folder``."""
    for page in PAGES:
        for block in blocks(page):
            if block.file is not None:
                (folder / block.file).write_text(block.text, encoding="utf-8")
