"""The measures of a run: declared, recorded, read and turned into series."""

from __future__ import annotations
