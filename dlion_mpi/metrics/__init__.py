"""What a run records, how it is written, read and turned into series."""

from __future__ import annotations
