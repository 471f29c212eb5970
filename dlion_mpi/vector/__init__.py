"""The model's variables as one flat vector, and named arrays for checkpoints."""

from __future__ import annotations
