"""Lines on stderr."""

from __future__ import annotations

import sys


def say(message: str) -> None:
    """One line on stderr, whole: ranks share it."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def complain(message: str) -> None:
    """One line on stderr, whatever the message."""
    sys.stdout.flush()
    print(f"dlion: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
