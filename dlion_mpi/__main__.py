"""``python -m dlion_mpi`` and the ``dlion`` program."""

from __future__ import annotations

import sys

from dlion_mpi.cli import main

if __name__ == "__main__":
    sys.exit(main())
