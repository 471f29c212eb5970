"""Eight colours that colour-blind readers can tell apart, for a light page and for a dark one.

They were found by search: each has a contrast to the page of 3 or more, and any two are at least 0.1 apart in Oklab,
also as seen without red, green or blue cones (the model of Machado, Oliveira and Fernandes, 2009).
"""

from __future__ import annotations

LIGHT = ("#0b62b8", "#d9690f", "#12a879", "#b97bc9", "#2c580c", "#98576e", "#8b69f8", "#6e396f")
DARK = ("#5ab0ff", "#f0a030", "#12eafa", "#ae79a2", "#db6545", "#5d77f3", "#7e53a0", "#ae4028")
_PARTS, _OTHER = (0, 6, 1, 3, 2, 4, 7), 5


def part_colour(index: int, count: int) -> int:
    """The colour of one of ``count`` parts of a step; the last part is "other"."""
    return _OTHER if index == count - 1 else _PARTS[index % len(_PARTS)]
