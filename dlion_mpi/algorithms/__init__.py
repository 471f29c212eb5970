"""Selection, error feedback, bandwidth, batch sizes, transfer, rings: pure functions and small states."""

from __future__ import annotations
