"""Lines on stderr."""

from __future__ import annotations

import sys
import time


def say(message: str) -> None:
    """Print one line on stderr, in a single write because ranks share it."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def complain(message: str) -> None:
    """Print an error message on stderr, joined to one line."""
    sys.stdout.flush()
    print(f"dlion: error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def await_reader() -> None:
    """Flush all output, and give mpirun the time to read it: once a rank aborts the job, it may read no more."""
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(0.3)
