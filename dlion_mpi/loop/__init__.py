"""The training loop of one worker."""

from __future__ import annotations
