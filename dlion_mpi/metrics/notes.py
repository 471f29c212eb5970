"""Notes about what a report or a trace cannot show."""

from __future__ import annotations

from collections.abc import Sequence


class Notes:
    """Lines of text. A line that applies to several ranks appears once."""

    def __init__(self) -> None:
        self._ranks: dict[str, list[int]] = {}

    def add(self, text: str, *ranks: int) -> None:
        """Add a line about some ranks, or about the whole run."""
        self._ranks.setdefault(text, []).extend(ranks)

    def lines(self) -> tuple[str, ...]:
        """All lines, with the ranks in front."""
        return tuple(f"{_prefix(ranks)}{text}" for text, ranks in self._ranks.items())


def _prefix(ranks: Sequence[int]) -> str:
    """Format ``[0, 1, 2, 5]`` as ``"ranks 0 to 2, 5: "``."""
    if not ranks:
        return ""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(f"{a} to {b}" if b > a + 1 else f"{a}, {b}" if b > a else f"{a}" for a, b in spans)
    return f"rank{'s' * (len(ranks) > 1)} {text}: "
