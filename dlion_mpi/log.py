"""Lines on stderr."""

from __future__ import annotations

import sys


def say(message: str) -> None:
    """Print one line on stderr, in a single write because ranks share it."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def complain(message: str) -> None:
    """Print an error message on stderr, joined to one line."""
    sys.stdout.flush()
    print(f"dlion: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
